"""Files and URLs; independent of checkpoints."""
