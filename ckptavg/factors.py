"""Factors of low-rank products, under the names that the tools give them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ckptavg.formats.table import Tensor
from ckptavg.modules import Modules

# The factor that comes first in computing (A of BA), and the second one.
_PAIRS = (("lora_A", "lora_B"), ("lora_a", "lora_b"), ("lora_down", "lora_up"), ("loraA", "loraB"))
_WITHIN = {"down": "up", "A": "B", "a": "b"}  # the names where the part above is called lora
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
        module: What comes before the factors' own parts of the names.
    """

    first: str
    second: str
    module: str


def find_pairs(names: Iterable[str]) -> list[Pair]:
    """Pairs of factors among the names of some tensors, by any spelling."""
    known = set(names)
    pairs = (pair for name in known for pair in _pairs_of(name))
    return sorted((pair for pair in pairs if pair.second in known), key=lambda pair: pair.first)


def is_part_of_product(name: str) -> bool:
    """Whether a tensor's name is that of a part of a low-rank product."""
    return bool(_LORA.search(name) or _OTHER_PRODUCTS.search(name))


def find_bare_pairs(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of matrices called A and B that can only be multiplied with each other."""
    bare: list[str] = []
    for module, inner in Modules(tensors):
        for first, second in (("A", "B"), ("a", "b"), ("down", "up")):
            one, other = inner.get(first), inner.get(second)
            if one is None or other is None or len(one.shape) != 2 or len(other.shape) != 2:
                continue
            if one.shape[0] == other.shape[1] < min(one.shape[1], other.shape[0]):
                bare += [module + first, module + second]
    return bare


def _pairs_of(name: str) -> Iterator[Pair]:
    """The pairs that a name may be the first factor of."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        before, after = parts[:i], parts[i + 1 :]
        for first, second in _PAIRS:
            if part == first or part.endswith("_" + first):
                stem = part.removesuffix(first)
                module = ".".join([*before, stem.removesuffix("_")]).rstrip(".")
                yield Pair(name, ".".join([*before, stem + second, *after]), module)
        if i and part in _WITHIN and _LORA.search(parts[i - 1]):
            yield Pair(name, ".".join([*before, _WITHIN[part], *after]), ".".join(before))
