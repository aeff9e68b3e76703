"""The visit: one party's local training, alone or for a whole cohort at once."""
