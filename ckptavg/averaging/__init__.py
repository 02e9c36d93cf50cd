"""Averages of checkpoints: coefficients, plans, and one streaming pass over the inputs."""
