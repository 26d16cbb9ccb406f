"""What the rules of `reading.Reader` share. For each torch function, in all its spellings, a rule says how an element of the
result is computed: moving_rules.py from an element at other indices, elementwise_rules.py from the operands' elements at the
same indices. A rule returns None where it does not apply.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.fx import Node

from ..graphs.nodes import value_of
from .expressions import Expressions, Value, rounded
from .indices import Index

Indices = tuple[Index, ...]


class Reader(Protocol):
    """The part of `reading.Reader` that rules use."""

    expressions: Expressions

    def read(self, node: Node, indices: Indices, at: float) -> Value:
        """The element of a node's tensor at `indices`, as it is at position `at` of the graph."""
        ...

    def operand(self, given: Any, indices: Indices, at: float) -> Value | None:
        """The element of an operand that an elementwise function reads for the element `indices` of its result."""
        ...


def argument(node: Node, place: int, name: str, default: Any = None) -> Any:
    given = node.args[place] if place < len(node.args) else node.kwargs.get(name, default)
    return value_of(given) if isinstance(value_of(given), torch.SymInt) else given


def tensor(node: Node) -> tuple[Node, torch.Tensor] | None:
    """The first argument and its fake tensor; None if it is no tensor."""
    first = argument(node, 0, "input", node.kwargs.get("self"))
    value = value_of(first)
    return (first, value) if isinstance(first, Node) and isinstance(value, torch.Tensor) else None


def number_as(reader: Reader, number: Any, dtype: torch.dtype) -> Value | None:
    """A number as an element of a tensor of this dtype; None if it is no number or too large."""
    if not isinstance(number, bool | int | float):
        return None
    try:
        return reader.expressions.constant(bool(number) if dtype == torch.bool else rounded(number, dtype))
    except OverflowError:
        return None
