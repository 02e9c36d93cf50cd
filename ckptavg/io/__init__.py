"""Files and URLs; knows nothing of checkpoints."""
