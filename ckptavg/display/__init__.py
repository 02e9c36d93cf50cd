"""Text, tables and progress for people; independent of checkpoints."""
