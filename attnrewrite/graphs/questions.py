"""Notes the questions about symbolic sizes of an exported program, which PyTorch answers from the sizes of its example.

`torch.compile` turns a question about a size into a guard. An exported program has no guards, and its ShapeEnv is frozen: the
ShapeEnv answers from the example and forgets the question (torch 2.13). So the answers are noted here, and aot/conditions.py
turns them into conditions that must hold whenever the program runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule

from .nodes import fake_mode_of, value_of


@dataclass(frozen=True)
class Question:
    """One answered question."""

    relation: Any  # sympy: the relation between sizes that is true in the example
    site: str  # the attention for which it was asked; "" for none
    kernel: str  # the kernel for which it was asked; "" for none


@dataclass
class Questions:
    """All questions, with the site and kernel of the next one."""

    asked: list[Question] = field(default_factory=list)  # in order
    site: str = ""  # see `asking`
    kernel: str = ""  # see `asking`

    def note(self, relation: Any) -> None:
        self.asked.append(Question(relation, self.site, self.kernel))


# A context variable, because records and passes call the functions that ask (`sizes.holds`) and know nothing of export.
_LISTENING: ContextVar[Questions | None] = ContextVar("attnrewrite_questions", default=None)


def listening() -> Questions | None:
    """The object that notes questions now; None under torch.compile, which turns questions into guards."""
    return _LISTENING.get()


@contextmanager
def asking(site: str, kernel: str) -> Iterator[None]:
    """Notes the questions inside for this site and kernel."""
    questions = _LISTENING.get()
    if questions is None:
        yield
        return
    before = questions.site, questions.kernel
    questions.site, questions.kernel = site, kernel
    try:
        yield
    finally:
        questions.site, questions.kernel = before


class Attempt:
    """Lets `forget` drop the questions noted from here on: a refusal is right for other sizes too, only an accepted kernel
    depends on the answers."""

    def __init__(self) -> None:
        self._questions = _LISTENING.get()
        self._from = len(self._questions.asked) if self._questions else 0

    def forget(self) -> None:
        if self._questions is not None:
            del self._questions.asked[self._from :]


@contextmanager
def noted(module: GraphModule, ranges: Mapping[Any, Any]) -> Iterator[Questions]:
    """Notes the questions that the code inside asks about the sizes of this exported graph. Replaces `evaluate_expr` of each
    ShapeEnv of the graph, and restores it at the end.

    ranges: the program's range constraints. A question that they answer needs no check and is not noted.
    """
    questions = Questions()
    modes = _fake_modes(module)
    token = _LISTENING.set(questions)
    shape_envs = [mode.shape_env for mode in modes if mode.shape_env is not None]
    caches = [(mode, mode.cache_enabled) for mode in modes]
    for shape_env in shape_envs:
        shape_env.evaluate_expr = _from_the_example(shape_env, questions, ranges)
    for mode in modes:
        mode.cache_enabled = False  # a result from the cache asks no question
    try:
        yield questions
    finally:
        _LISTENING.reset(token)
        for shape_env in shape_envs:
            del shape_env.evaluate_expr
        for mode, enabled in caches:
            mode.cache_enabled = enabled


def _from_the_example(shape_env: Any, questions: Questions, ranges: Mapping[Any, Any]) -> Any:
    import sympy  # type: ignore[import-untyped]

    original = shape_env.evaluate_expr

    def evaluate(expr: Any, *args: Any, **kwargs: Any) -> Any:
        symbols: Any = getattr(expr, "free_symbols", ())
        values = hints_of(shape_env)
        if not symbols or not all(symbol in values for symbol in symbols):
            return original(expr, *args, **kwargs)  # no symbols, or sizes from data, for which PyTorch raises
        answer = answer_within(expr, ranges, least=2)
        if answer is not None:
            return answer
        answer = expr.xreplace({symbol: values[symbol] for symbol in symbols})
        if answer is sympy.true:
            questions.note(expr)
        elif answer is sympy.false:
            questions.note(sympy.Not(expr))
        else:  # the question asks for a number: the program is bound to it
            questions.note(sympy.Eq(expr, answer))
        return answer

    return evaluate


def _fake_modes(module: GraphModule) -> list[Any]:
    modes = (fake_mode_of(value_of(node)) for node in module.graph.nodes)
    return list({id(mode): mode for mode in modes if mode is not None}.values())


def hints_of(shape_env: Any) -> Any:
    """The sizes of the example, by symbol."""
    newer = hasattr(shape_env, "backed_var_to_val")  # 2.13
    return shape_env.backed_var_to_val if newer else shape_env.var_to_val


def least_of(bounds: Any, otherwise: int) -> Any:
    """The lower bound of a range constraint, or `otherwise` for a bound of 2 or less: PyTorch does not check such a bound
    when the program runs (torch/_export/utils.py, 2.9 to 2.13)."""
    return bounds.lower if bounds.lower > 2 else otherwise


def answer_within(expr: Any, ranges: Mapping[Any, Any], least: int) -> Any:
    """The answer (sympy) that is right for all sizes in the program's ranges, None if there is none. Sizes are at least
    `least`."""
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
    difference = sympy.expand(expr.lhs - expr.rhs)  # decides s <= s - s % 16 + 16, which the bounds of each side do not
    answer = _holds_within(relation, bound_sympy(difference, bounds))
    if answer is None and difference.is_polynomial(*difference.free_symbols):
        answer = _holds_within(relation, bound_sympy(sympy.factor(difference), bounds))  # decides s < s ** 2
    return None if answer is None else sympy.sympify(answer)


def _holds_within(relation: str, by: Any) -> bool | None:
    """Whether a relation holds where left side minus right side is in the range `by`; None: only for some values."""
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
