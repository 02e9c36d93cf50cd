"""Outputs: checked before any work, published whole, hashed, with their provenance."""
