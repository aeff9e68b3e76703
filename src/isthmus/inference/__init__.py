"""Serving in two parts: a weak device drafts, a strong edge verifies, every message is counted."""
