"""The conditions on sizes that must hold whenever a rewritten program runs. They are the answers about symbolic sizes
(graphs/questions.py) that the swapped sites rely on. assertions.py inserts a check for each of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..graphs.questions import Question, Questions, answer_within
from ..passes.found import Swapped


@dataclass(frozen=True)
class Condition:
    """A relation between sizes that must hold."""

    relation: Any  # of sympy
    needed_by: tuple[tuple[str, str], ...]  # (site, kernel) pairs


def conditions(questions: Questions, swapped: Sequence[Swapped], ranges: Mapping[Any, Any]) -> tuple[Condition, ...]:
    """The distinct conditions that the swapped sites need, in the order in which they were asked."""
    import sympy  # type: ignore[import-untyped]

    taken = {found.call.site for found in swapped}
    asked = [each for each in questions.asked if each.site in taken or not each.site] if taken else []
    asked += [each for found in swapped for each in _some(found, ranges)]
    needed: dict[Any, dict[tuple[str, str], None]] = {}
    for each in asked:
        for part in each.relation.args if isinstance(each.relation, sympy.And) else (each.relation,):
            if answer_within(part, ranges, least=0) is not sympy.true:
                needed.setdefault(part, {})[each.site, each.kernel] = None
    return tuple(Condition(relation, tuple(sites)) for relation, sites in needed.items())


def _some(found: Swapped, ranges: Mapping[Any, Any]) -> Iterator[Question]:
    """Conditions `size >= 1` for a kernel that does not take length 0. PyTorch assumes that symbolic sizes are at least 2, so
    the kernel's question about 0 gave no condition; but PyTorch lets the program run with sizes 0 and 1."""
    import sympy

    kernel = found.kernel
    if kernel is None or kernel.op is None or kernel.empty:
        return
    for size in (found.call.batch, found.call.q_len, found.call.kv_len):
        if isinstance(size, torch.SymInt) and (size.node.expr.free_symbols & set(ranges)):
            relation = sympy.Ge(size.node.expr, 1, evaluate=False)  # sympy assumes sizes are positive
            if answer_within(relation, ranges, least=0) is None:
                yield Question(relation, found.call.site, kernel.name)
