"""Unpickler that runs no code of a pickle."""
