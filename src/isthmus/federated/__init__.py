"""Training across parties: the method's hooks, the round that calls them, who computes it."""
