"""Search: the best average of a run, chosen and judged on different samples."""
