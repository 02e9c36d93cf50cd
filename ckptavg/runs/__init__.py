"""A directory → an ordered run of checkpoints without repeats."""
