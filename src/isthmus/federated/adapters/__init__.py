"""Aggregations of LoRA adapters: one file each, pure functions on lists of factors."""
