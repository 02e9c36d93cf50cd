"""Planes of weight space: a grid of points on each, scored from coarse to fine."""
