"""Search for the checkpoints of a training."""
