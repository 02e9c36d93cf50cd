"""Modules on a device: weights in, memory, precision, and calling them on a batch."""
