"""Rules of functions that compute an element from the operands' elements at the same indices."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from ..graphs.nodes import value_of
from ..graphs.spellings import base_name, name_of
from .expressions import Value
from .indices import index_of
from .rules import Indices, Reader, argument, number_as


def _computed_in(node: Node) -> torch.dtype | None:
    """The dtype to which a function of one or two operands converts them; None where they are no tensors and numbers."""
    operands = [value_of(argument(node, 0, "input", node.kwargs.get("self")))]
    other = value_of(argument(node, 1, "other"))
    operands += [] if other is None else [other]
    if not all(isinstance(each, torch.Tensor | int | float | torch.SymInt | torch.SymFloat) for each in operands):
        return None
    if len(operands) == 2:
        return torch.result_type(*operands)
    return operands[0].dtype if isinstance(operands[0], torch.Tensor) else None


def compared(name: str) -> Callable[..., Value | None]:
    def rule(reader: Reader, node: Node, values: list[Value], indices: Indices) -> Value | None:
        dtype, make = _computed_in(node), reader.expressions
        a, b = values if dtype is None else (make.operand(value, dtype) for value in values)
        return None if dtype is None or a is None or b is None else make.compare(name, a, b)

    return rule


def conjunction(reader: Reader, node: Node, values: list[Value], indices: Indices) -> Value | None:
    return reader.expressions.and_(*values) if all(value.boolean for value in values) else None


def disjunction(reader: Reader, node: Node, values: list[Value], indices: Indices) -> Value | None:
    return reader.expressions.or_(*values) if all(value.boolean for value in values) else None


def negation(reader: Reader, node: Node, values: list[Value], indices: Indices) -> Value | None:
    return reader.expressions.not_(values[0]) if values[0].boolean else None


def logical(rule: Callable[..., Value | None]) -> Callable[..., Value | None]:
    return lambda reader, node, values, indices: rule(
        reader, node, [reader.expressions.as_boolean(value) for value in values], indices
    )


def arithmetic(function: Callable[..., Any], of_booleans: Callable[..., Value | None] | None = None) -> Any:
    def rule(reader: Reader, node: Node, values: list[Value], indices: Indices) -> Value | None:
        dtype = value_of(node).dtype
        if node.kwargs.get("alpha", 1) != 1 or len(node.args) > len(values) or "rounding_mode" in node.kwargs:
            return None
        if dtype == torch.bool:
            return of_booleans(reader, node, values, indices) if of_booleans is not None else None
        computed_in = _computed_in(node)
        if function is operator.truediv and computed_in is not None and not computed_in.is_floating_point:
            computed_in = dtype
        if computed_in is None or computed_in == torch.bool:
            return None
        found = reader.expressions.arithmetic(function, tuple(values), computed_in)
        return found if found is None or computed_in == dtype else reader.expressions.cast(found, dtype)

    return rule


def chosen(reader: Reader, node: Node, values: list[Value], indices: Indices) -> Value | None:
    """where(condition, a, b)"""
    condition, *sides = values
    dtype = value_of(node).dtype
    a, b = (reader.expressions.cast(side, dtype) for side in sides)
    return None if a is None or b is None or not condition.boolean else reader.expressions.select(condition, a, b)


def masked(reader: Reader, node: Node, values: list[Value], indices: Indices) -> Value | None:
    """x.masked_fill(mask, fill)"""
    return chosen(reader, node, [values[1], values[2], values[0]], indices)


def overwritten(reader: Reader, node: Node, values: list[Value], indices: Indices) -> Value | None:
    return reader.expressions.cast(values[1], value_of(node).dtype)


def zeroed(reader: Reader, node: Node, values: list[Value], indices: Indices) -> Value | None:
    return number_as(reader, 0, value_of(node).dtype) if base_name(node) != name_of(node) else None


def triangle(lower: bool) -> Callable[..., Value | None]:
    def rule(reader: Reader, node: Node, values: list[Value], indices: Indices) -> Value | None:
        diagonal = argument(node, 1, "diagonal", 0)
        outside = number_as(reader, 0, value_of(node).dtype)
        if isinstance(diagonal, Node) or outside is None or len(indices) < 2:
            return None
        above = indices[-1] - indices[-2] - index_of(diagonal)
        return reader.expressions.select(
            reader.expressions.at_least_zero(-above if lower else above), values[0], outside
        )

    return rule


_unary, _binary = ("input",), ("input", "other")
ELEMENTWISE: dict[str, tuple[int, tuple[str, ...], Callable[..., Value | None]]] = {
    **{name: (2, _binary, compared(name)) for name in ("lt", "le", "gt", "ge", "eq", "ne")},
    **dict.fromkeys(("bitwise_and", "__and__"), (2, _binary, conjunction)),
    **dict.fromkeys(("bitwise_or", "__or__"), (2, _binary, disjunction)),
    "bitwise_not": (1, _unary, negation),
    "logical_and": (2, _binary, logical(conjunction)),
    "logical_or": (2, _binary, logical(disjunction)),
    "logical_not": (1, _unary, logical(negation)),
    "add": (2, _binary, arithmetic(operator.add, disjunction)),
    "sub": (2, _binary, arithmetic(operator.sub)),
    "rsub": (2, _binary, lambda reader, node, values, at: arithmetic(operator.sub)(reader, node, values[::-1], at)),
    "mul": (2, _binary, arithmetic(operator.mul, conjunction)),
    "div": (2, _binary, arithmetic(operator.truediv)),
    "floor_divide": (2, _binary, arithmetic(operator.floordiv)),
    "neg": (1, _unary, arithmetic(operator.neg)),
    "abs": (1, _unary, arithmetic(abs)),
    "where": (3, ("condition", "input", "other"), chosen),
    "masked_fill": (3, ("input", "mask", "value"), masked),
    "fill": (2, ("input", "value"), overwritten),
    "zero": (1, _unary, zeroed),
    "tril": (1, _unary, triangle(True)),
    "triu": (1, _unary, triangle(False)),
}
