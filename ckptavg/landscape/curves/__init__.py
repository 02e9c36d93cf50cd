"""Curves: scores over training, and over the number of averaged checkpoints."""
