"""Outputs: checked before any work, hashed, published whole together with a provenance."""
