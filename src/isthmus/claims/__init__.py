"""What papers claim, run in miniature: one file a system, found by its name."""
