"""`agree`: every rank must run the same plan. A difference is found when a graph is compiled, not by an exchange that hangs.
`of_all`: what each rank says."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ..graphs.process_groups import awaited, published
from .layouts import Ranks
from .settings import ContextParallel

FAILED = "failed: "
_told: Counter[str] = Counter()  # how often so far, by process group


class RanksDisagreeError(RuntimeError):
    """The ranks of a mesh would run different graphs, or one of them has failed or not come."""


def agree(ranks: Ranks, members: list[int], plan: list[str], seconds: float) -> None:
    """Compares this rank's plan with those of all others, line by line. Every rank calls it once for each graph that it shares.

    members: the global numbers of the ranks. seconds: how long to wait for the others.

    Raises `RanksDisagreeError`, on every rank, with the first difference.
    """
    for number, theirs in zip(members, told_by_all(ranks, members, plan, seconds), strict=True):
        for mine, its in itertools.zip_longest(plan, theirs, fillvalue="nothing more"):
            if mine != its:
                raise RanksDisagreeError(
                    f"the ranks would run different graphs (context_parallel): rank {members[ranks.rank]} has\n    {mine}\n"
                    f"and rank {number} has\n    {its}"
                )


def told_by_all(ranks: Ranks, members: list[int], lines: list[str], seconds: float) -> list[list[str]]:
    """Gives this rank's lines to all others, and returns those of all ranks, its own among them. Every rank calls it as often
    as the others.

    Raises `RanksDisagreeError` if a rank has failed (`give_up`), or has told nothing within `seconds`.
    """
    prefix = _next(ranks)
    published(f"{prefix}/{ranks.rank}", json.dumps(lines))
    found = []
    for other, number in enumerate(members):
        text = json.dumps(lines) if other == ranks.rank else awaited(f"{prefix}/{other}", seconds)
        if text is None:
            raise RanksDisagreeError(
                f"rank {number} has not compiled this graph within {seconds:g} s (context_parallel): it has ended, or it calls "
                "the model with inputs for which it has compiled code already. Every rank must call the model alike"
            )
        theirs: list[str] = json.loads(text)
        if theirs and theirs[0].startswith(FAILED):
            raise RanksDisagreeError(
                f"rank {number} could not compile this graph (context_parallel): {theirs[0][len(FAILED) :]}"
            )
        found.append(theirs)
    return found


def of_all(ranks: ContextParallel | None, value: Any) -> list[Any]:
    """The value of each rank, in their order. ranks: None: this process alone. value: whatever JSON has. Raises as
    `told_by_all`."""
    if ranks is None:
        return [value]
    return [json.loads(text) for (text,) in told_by_all(ranks.ranks, ranks.members, [json.dumps(value)], ranks.timeout)]


_CHOOSING: ContextVar[ContextParallel | None] = ContextVar("choosing", default=None)


@contextmanager
def choosing_with(ranks: ContextParallel | None) -> Iterator[None]:
    """Inside, kernels are chosen together with these ranks (`those_that_choose`). None: by this process alone."""
    before = _CHOOSING.set(ranks)
    try:
        yield
    finally:
        _CHOOSING.reset(before)


def those_that_choose() -> ContextParallel | None:
    return _CHOOSING.get()


def give_up(ranks: Ranks, error: Exception) -> None:
    """Tells the other ranks that this one fails, in the place of `told_by_all`."""
    published(f"{_next(ranks)}/{ranks.rank}", json.dumps([f"{FAILED}{type(error).__name__}: {error}"]))


def _next(ranks: Ranks) -> str:
    _told[ranks.group] += 1
    return f"attnrewrite/{ranks.group}/{_told[ranks.group]}"
