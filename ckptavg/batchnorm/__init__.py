"""Running statistics recomputed."""
