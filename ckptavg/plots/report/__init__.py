"""The report: one self-contained HTML page on a run, for whoever has to decide about it."""
