"""Ordered runs of checkpoints without repeats."""
