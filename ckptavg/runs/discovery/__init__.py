"""The search for the checkpoints of a training."""
