"""What is asked about symbolic sizes while a program is rewritten: what must hold whenever the program runs.

`torch.compile` turns a question about a size into a guard. An exported program has no guards, and its ShapeEnv is frozen: it
answers from the sizes of the example and forgets (torch 2.13). So the answers are noted here, and become nodes
(assertions.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from ..graphs.nodes import value_of
from ..graphs.sizes import QUESTIONS, Questions
from ..passes.context import Found


@dataclass(frozen=True)
class Condition:
    """A relation between sizes that must hold, and the (site, kernel) pairs that need it."""

    relation: Any  # sympy
    needed_by: tuple[tuple[str, str], ...]


@contextmanager
def noted(module: GraphModule, ranges: Any) -> Iterator[Questions]:
    """What runs inside asks about the sizes of this graph; nothing of the program's ShapeEnv changes.

    ranges: the program's range constraints. What they answer needs no check and is not noted.
    """
    questions = Questions()
    modes = _fake_modes(module)
    token = QUESTIONS.set(questions)
    patched = [_answering(mode, questions, ranges) for mode in modes if mode.shape_env is not None]
    caches = [(mode, mode.cache_enabled) for mode in modes]
    for mode in modes:
        mode.cache_enabled = False  # a result from the cache asks no question
    try:
        yield questions
    finally:
        QUESTIONS.reset(token)
        for shape_env in patched:
            del shape_env.evaluate_expr
        for mode, enabled in caches:
            mode.cache_enabled = enabled


def conditions(questions: Questions, swapped: Sequence[Found], ranges: Any) -> tuple[Condition, ...]:
    """The distinct conditions that the swapped sites need, in the order in which they were asked."""
    import sympy  # type: ignore[import-untyped]

    taken = {found.call.site for found in swapped}
    asked = [each for each in questions.asked if each[1] in taken or not each[1]] if taken else []
    asked += [each for found in swapped for each in _some(found, ranges)]
    needed: dict[Any, dict[tuple[str, str], None]] = {}
    for relation, site, kernel in asked:
        for part in relation.args if isinstance(relation, sympy.And) else (relation,):
            if _known(part, ranges, least=0) is not sympy.true:
                needed.setdefault(part, {})[site, kernel] = None
    return tuple(Condition(relation, tuple(sites)) for relation, sites in needed.items())


def _some(found: Found, ranges: Any) -> Iterator[tuple[Any, str, str]]:
    """A kernel that does not take length 0. PyTorch takes symbolic sizes for at least 2, so that asking gives no condition,
    but lets the program run with 0 and 1."""
    import sympy

    kernel = found.kernel
    if kernel is None or kernel.op is None or kernel.empty:
        return
    for size in (found.call.batch, found.call.q_len, found.call.kv_len):
        if isinstance(size, torch.SymInt) and (size.node.expr.free_symbols & set(ranges)):
            relation = sympy.Ge(size.node.expr, 1, evaluate=False)  # sympy takes a size for positive
            if _known(relation, ranges, least=0) is None:
                yield relation, found.call.site, kernel.name


def _answering(mode: Any, questions: Questions, ranges: Any) -> Any:
    """The ShapeEnv, with questions answered here until its attribute is deleted again."""
    import sympy

    shape_env = mode.shape_env
    original = shape_env.evaluate_expr

    def evaluate(expr: Any, *args: Any, **kwargs: Any) -> Any:
        symbols: Any = getattr(expr, "free_symbols", ())
        values = hints_of(shape_env)
        if not symbols or not all(symbol in values for symbol in symbols):
            return original(expr, *args, **kwargs)  # from data: refused, as the caller asked it
        known = _known(expr, ranges, least=2)
        if known is not None:
            return known
        answer = expr.xreplace({symbol: values[symbol] for symbol in symbols})
        if answer is sympy.true:
            questions.asked.append((expr, *questions.subject))
        elif answer is sympy.false:
            questions.asked.append((sympy.Not(expr), *questions.subject))
        else:  # a number is asked for: the program is made for it
            questions.asked.append((sympy.Eq(expr, answer), *questions.subject))
        return answer

    shape_env.evaluate_expr = evaluate
    return shape_env


def hints_of(shape_env: Any) -> Any:
    """The sizes of the example, by symbol."""
    newer = hasattr(shape_env, "backed_var_to_val")  # 2.13
    return shape_env.backed_var_to_val if newer else shape_env.var_to_val


def least_of(bounds: Any, otherwise: int) -> Any:
    """Where a range constraint begins. One that begins with 2 or less says nothing, since no program is held to it
    (torch/_export/utils.py, 2.9 to 2.13)."""
    return bounds.lower if bounds.lower > 2 else otherwise


def _known(expr: Any, ranges: Any, least: int) -> Any:
    """The answer for every size in the program's ranges, None if there is none. Sizes are at least `least`."""
    import sympy
    from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

    if expr in (sympy.true, sympy.false):
        return expr
    bounds = {}
    for symbol in expr.free_symbols:
        lower, upper = least, sympy.oo
        if symbol in ranges:
            lower, upper = least_of(ranges[symbol], least), ranges[symbol].upper
        bounds[symbol] = ValueRanges(lower, upper) if lower <= upper else ranges[symbol]
    found: Any = bound_sympy(expr, bounds)
    if found.is_singleton():
        return found.lower
    relations = {sympy.Eq: "Eq", sympy.Ne: "Ne", sympy.Lt: "Lt", sympy.Le: "Le", sympy.Gt: "Gt", sympy.Ge: "Ge"}
    relation = relations.get(type(expr))
    if relation is None:
        return None
    difference = sympy.expand(expr.lhs - expr.rhs)  # s <= s - s % 16 + 16, where each side alone may be anything
    answer = _holds_within(relation, bound_sympy(difference, bounds))
    if answer is None and difference.is_polynomial(*difference.free_symbols):
        answer = _holds_within(relation, bound_sympy(sympy.factor(difference), bounds))  # s < s ** 2
    return None if answer is None else sympy.sympify(answer)


def _holds_within(relation: str, by: Any) -> bool | None:
    """Whether a relation holds, by the range that the difference of its sides is in; None: for some values only."""
    below, above = by.upper < 0, by.lower > 0
    answers = {
        "Eq": False if below or above else None,
        "Ne": True if below or above else None,
        "Lt": True if below else False if by.lower >= 0 else None,
        "Ge": False if below else True if by.lower >= 0 else None,
        "Gt": True if above else False if by.upper <= 0 else None,
        "Le": False if above else True if by.upper <= 0 else None,
    }
    return answers[relation]


def _fake_modes(module: GraphModule) -> list[Any]:
    modes: dict[int, Any] = {}
    for node in module.graph.nodes:
        mode = getattr(value_of(node), "fake_mode", None)
        if mode is not None:
            modes[id(mode)] = mode
    return list(modes.values())
