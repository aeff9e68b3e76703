"""A Flower app, written for Flower alone."""
