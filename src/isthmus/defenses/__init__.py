"""Defences: rules of the server over n uploads of which some may be hostile, and guards."""
