"""One file a method, both halves in it."""
