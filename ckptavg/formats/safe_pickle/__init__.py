"""Pickles read without running anything of theirs."""
