"""Text, tables and progress as people see them; knows nothing of checkpoints."""
