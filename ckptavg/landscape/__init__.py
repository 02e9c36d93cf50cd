"""The landscape: points in weight space, scored."""
