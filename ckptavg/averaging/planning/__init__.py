"""The decision for each tensor: averaged, taken from the last checkpoint, or refused."""
