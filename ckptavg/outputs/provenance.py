"""Provenance built from the checkpoints that an output is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ckptavg.formats import Checkpoint
from ckptavg.formats.provenance import PENDING, Provenance, Source
from ckptavg.formats.running_statistics import Statistics
from ckptavg.io.paths import without_secrets


def build_provenance(
    scheme: str,
    checkpoints: Sequence[Checkpoint],
    coefficients: Sequence[float],
    statistics: Statistics,
    ties: Sequence[Sequence[str]] = (),
    base: Checkpoint | None = None,
) -> Provenance:
    """Record the origin of an output.

    Args:
        scheme: The scheme's whole specification.
        checkpoints: The selected checkpoints, in order.
        coefficients: One per checkpoint, normalized.
        statistics: The state of the BatchNorm running statistics.
        ties: Groups of names that share their contents.
        base: The checkpoint that the tensors outside the average come from, where it is not one of
            ``checkpoints``.
    """
    inputs: list[Source] = []
    for checkpoint, coefficient in zip(checkpoints, coefficients, strict=True):
        inputs.append(_source_of(checkpoint, checkpoint.step, coefficient))
    base_source = None if base is None else _source_of(base)
    return Provenance.of(scheme, inputs, statistics, ties, base_source)


def with_digests(
    provenance: Provenance,
    checkpoints: Sequence[Checkpoint],
    digest_of: Callable[[Checkpoint], str] = lambda _: PENDING,
    output: str = PENDING,
) -> Provenance:
    """Add digests to a provenance, whose length then does not depend on the digests' values.

    Args:
        provenance: The provenance of an output.
        checkpoints: The checkpoints that the provenance lists, then the base if it has one.
        digest_of: Returns the digest of a checkpoint. By default a placeholder of the same length.
        output: The digest of the output.
    """
    hashed: list[Source] = []
    for (_, source), checkpoint in zip(provenance.sources, checkpoints, strict=True):
        hashed.append(source.with_digest(digest_of(checkpoint), checkpoint.key))
    return provenance.with_digests(hashed, output)


def _source_of(
    checkpoint: Checkpoint, step: float | None = None, coefficient: float | None = None
) -> Source:
    return Source(
        # A URL may hold credentials, which must not be stored in the output.
        path=without_secrets(str(checkpoint.path)),
        size=checkpoint.size,
        mtime=max(stamp.mtime_ns for stamp in checkpoint.files) / 1e9,
        step=step,
        coefficient=coefficient,
    )
