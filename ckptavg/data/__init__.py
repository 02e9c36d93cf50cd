"""Samples: which, in which order, and to which process."""
