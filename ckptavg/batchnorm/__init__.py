"""Recomputation of running statistics for fixed weights."""
