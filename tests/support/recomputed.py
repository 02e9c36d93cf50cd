"""Averages with recomputed statistics, written by a call of one line."""

from ckptavg.averaging import pipeline
from ckptavg.averaging.pipeline import WriteOptions, prepare_targets


def write_averages(averages, outs, statistics_pass, **options):
    """Result of the pass, and provenance as written, of each average."""
    options = WriteOptions(**options)
    targets = prepare_targets(list(zip(averages, outs, strict=True)), options)
    written = pipeline.write_averages(averages, targets, options, statistics_pass=statistics_pass)
    return list(zip(written.passes, written.provenances, strict=True))
