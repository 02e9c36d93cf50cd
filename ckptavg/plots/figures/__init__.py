"""Kinds of figures, a module per kind."""
