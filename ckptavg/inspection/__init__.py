"""Inspection of weights: geometry of a run, verification against recorded digests."""
