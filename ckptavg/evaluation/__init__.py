"""Evaluation: scoring of candidates on the same data, comparison and tables."""
