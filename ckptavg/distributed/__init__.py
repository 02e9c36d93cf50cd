"""The processes and threads that share the work."""
