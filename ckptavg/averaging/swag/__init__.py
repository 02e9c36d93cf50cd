"""SWAG: weights sampled from a Gaussian that is fitted to checkpoints."""
