"""Specifications: strings that name models, data and tasks, converted to objects."""
