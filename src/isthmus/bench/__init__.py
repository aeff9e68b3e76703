"""Measured figures, each beside the goal it is held to."""
