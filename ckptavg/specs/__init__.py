"""Specifications: strings of ``--model``, ``--data`` and ``--task`` converted to objects."""
