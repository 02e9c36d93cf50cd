"""Weights read to tell something of them: geometry, verification."""
