"""`Search`: what `attnrewrite.tune` was asked for."""

from __future__ import annotations

from dataclasses import dataclass

from ..graphs.inner_compilers import Inner
from ..kernels.records import Numerics
from ..planning.policies import Candidate


@dataclass(frozen=True)
class Search:
    """The arguments of `attnrewrite.tune`, which documents them, and the numbers of rounds."""

    candidates: tuple[Candidate, ...]
    numerics: Numerics = Numerics.REORDERED
    max_error: float | None = None
    min_gain: float = 0.02
    inner: Inner = "inductor"
    time_limit: float = 60.0
    rounds: tuple[int, int] = (7, 25)  # least and most rounds of a site
    max_output_error: float | None = None
    more: int = 3  # factor on the number of rounds where noise hides which kernel is worth choosing
