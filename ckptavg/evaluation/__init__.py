"""Candidates × one pass over the data."""
