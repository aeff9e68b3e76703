"""Small devices: what they are, what they can run."""
