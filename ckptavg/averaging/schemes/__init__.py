"""Averaging schemes, which turn the records of a run into coefficients."""

from ckptavg.averaging.schemes.given_weights import from_weights
from ckptavg.averaging.schemes.registry import SCHEMES, parse
from ckptavg.averaging.schemes.run_record import RunRecord
from ckptavg.averaging.schemes.scheme import Scheme, SchemeKind, normalize

__all__ = ["SCHEMES", "RunRecord", "Scheme", "SchemeKind", "from_weights", "normalize", "parse"]
