"""Who computes a cohort's visits: `sequential` (the reference) or `vectorised`."""
