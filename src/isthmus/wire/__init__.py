"""What crosses and what it costs."""
