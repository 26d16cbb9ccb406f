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
from .settings import ContextParallel

_told: Counter[str] = Counter()  # how often so far, by process group


class RanksDisagreeError(RuntimeError):
    """The ranks of a mesh would run different graphs, or one of them has failed or not come."""


def agree(ranks: ContextParallel, plan: list[str]) -> None:
    """Compares this rank's plan with those of all others, line by line. Every rank calls it once for each graph that it shares.

    Raises `RanksDisagreeError`, on every rank, with the first difference; and as `of_all`.
    """
    members = ranks.members
    for number, theirs in zip(members, of_all(ranks, plan), strict=True):
        for mine, its in itertools.zip_longest(plan, theirs, fillvalue="nothing more"):
            if mine != its:
                raise RanksDisagreeError(
                    f"the ranks would run different graphs (context_parallel): rank {members[ranks.ranks.rank]} has\n"
                    f"    {mine}\nand rank {number} has\n    {its}"
                )


def of_all(ranks: ContextParallel | None, value: Any) -> list[Any]:
    """The value of each rank, in their order. Every rank calls it as often as the others.

    ranks: None: this process alone. value: whatever JSON has.

    Raises `RanksDisagreeError` if a rank has failed (`give_up`), or has told nothing within `ranks.timeout` seconds.
    """
    if ranks is None:
        return [value]
    prefix, own = _next(ranks), json.dumps({"value": value})
    published(f"{prefix}/{ranks.ranks.rank}", own)
    found = []
    for other, number in enumerate(ranks.members):
        text = own if other == ranks.ranks.rank else awaited(f"{prefix}/{other}", ranks.timeout)
        if text is None:
            raise RanksDisagreeError(
                f"rank {number} has not compiled this graph within {ranks.timeout:g} s (context_parallel): it has ended, or it "
                "calls the model with inputs for which it has compiled code already. Every rank must call the model alike"
            )
        told = json.loads(text)
        if "failed" in told:
            raise RanksDisagreeError(f"rank {number} could not compile this graph (context_parallel): {told['failed']}")
        found.append(told["value"])
    return found


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


def give_up(ranks: ContextParallel, error: Exception) -> None:
    """Tells the other ranks that this one fails, in the place of `of_all`."""
    published(f"{_next(ranks)}/{ranks.ranks.rank}", json.dumps({"failed": f"{type(error).__name__}: {error}"}))


def _next(ranks: ContextParallel) -> str:
    group = ranks.ranks.group
    _told[group] += 1
    return f"attnrewrite/{group}/{_told[group]}"
