"""Processes and threads that share the work."""
