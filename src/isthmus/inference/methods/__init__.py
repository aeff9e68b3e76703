"""One serving method a file."""
