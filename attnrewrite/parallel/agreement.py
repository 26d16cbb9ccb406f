"""`agree`: every rank must run the same plan. A difference is found when a graph is compiled, not by an exchange that hangs."""

from __future__ import annotations

import itertools
import json
from collections import Counter

from ..graphs.process_groups import awaited, published
from .layouts import Ranks

FAILED = "failed: "
_compiled: Counter[str] = Counter()  # graphs so far, by process group


class RanksDisagreeError(RuntimeError):
    """The ranks of a mesh would run different graphs, or one of them has failed or not come."""


def agree(ranks: Ranks, members: list[int], plan: list[str], seconds: float) -> None:
    """Compares this rank's plan with those of all others, line by line. Every rank calls it once for each graph that it shares.

    members: the global numbers of the ranks. seconds: how long to wait for the others.

    Raises `RanksDisagreeError`, on every rank, with the first difference.
    """
    prefix = _next(ranks)
    published(f"{prefix}/{ranks.rank}", json.dumps(plan))
    for other, number in enumerate(members):
        if other == ranks.rank:
            continue
        text = awaited(f"{prefix}/{other}", seconds)
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
        for mine, its in itertools.zip_longest(plan, theirs, fillvalue="nothing more"):
            if mine != its:
                raise RanksDisagreeError(
                    f"the ranks would run different graphs (context_parallel): rank {members[ranks.rank]} has\n    {mine}\n"
                    f"and rank {number} has\n    {its}"
                )


def give_up(ranks: Ranks, error: Exception) -> None:
    """Tells the other ranks that this one fails, in the place of `agree`."""
    published(f"{_next(ranks)}/{ranks.rank}", json.dumps([f"{FAILED}{type(error).__name__}: {error}"]))


def _next(ranks: Ranks) -> str:
    _compiled[ranks.group] += 1
    return f"attnrewrite/{ranks.group}/{_compiled[ranks.group]}"
