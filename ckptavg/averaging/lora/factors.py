"""Factors of low-rank products, found by the names that different tools use."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ckptavg.averaging.planning.modules import Modules
from ckptavg.formats.checkpoint import Tensor

# The factor that comes first in computing (A of BA), and the second one.
_PAIRS = (("lora_A", "lora_B"), ("lora_a", "lora_b"), ("lora_down", "lora_up"), ("loraA", "loraB"))
# The factors' names below a module that is called lora itself: too common without it.
_WITHIN = {"down": "up", "A": "B", "a": "b"}
_LORA = re.compile(r"(?<![A-Za-z])lora(?=[_.\dAB]|$)")
_OTHER_PRODUCTS = re.compile(
    r"(?<![A-Za-z])(?:hada_[wt]\d|lokr_[wt]\d|oft_(?:blocks|diag)|dora_scale|vera_lambda|glora_)"
)


@dataclass(frozen=True)
class Pair:
    """The two factors of a product, by name.

    Attributes:
        first: A, of the shape (rank, ...).
        second: B, of the shape (..., rank, ...).
        module: The beginning of both names, before the factors' own.
    """

    first: str
    second: str
    module: str


def find_pairs(names: Iterable[str]) -> list[Pair]:
    """Find the pairs of factors among the names of tensors, by any spelling."""
    existing = set(names)
    pairs: list[Pair] = []
    for name in existing:
        pairs += [pair for pair in _candidate_pairs(name) if pair.second in existing]
    # A set of texts has another order in every process.
    return sorted(pairs, key=lambda pair: pair.first)


def is_part_of_product(name: str) -> bool:
    """Tell by the name whether a tensor belongs to a low-rank product."""
    return bool(_LORA.search(name) or _OTHER_PRODUCTS.search(name))


def find_bare_pairs(tensors: Mapping[str, Tensor]) -> list[str]:
    """Find the matrices called A and B that can only be the two factors of a product."""
    bare: list[str] = []
    for module, inner in Modules(tensors):
        for first, second in (("A", "B"), ("a", "b"), ("down", "up")):
            a, b = inner.get(first), inner.get(second)
            if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2:
                continue
            # A rank below both other extents: two square matrices called so may be anything.
            if a.shape[0] == b.shape[1] < min(a.shape[1], b.shape[0]):
                bare += [module + first, module + second]
    return bare


def _candidate_pairs(name: str) -> Iterator[Pair]:
    """List the pairs that a name may be the first factor of."""
    segments = name.split(".")
    for i, segment in enumerate(segments):
        before, after = segments[:i], segments[i + 1 :]
        for first, second in _PAIRS:
            if segment == first or segment.endswith("_" + first):
                stem = segment.removesuffix(first)
                # kohya writes module_lora_down: the underscore belongs to neither.
                module = ".".join([*before, stem.removesuffix("_")]).rstrip(".")
                yield Pair(name, ".".join([*before, stem + second, *after]), module)
        if i and segment in _WITHIN and _LORA.search(segments[i - 1]):
            yield Pair(name, ".".join([*before, _WITHIN[segment], *after]), ".".join(before))
