"""Follows a dimension of a tensor back through a graph, to where it begins."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch.fx import Node

from ..graphs.nodes import value_of
from ..graphs.sizes import always, has_no_hint
from .rows import CUTS, JOINS, VIEWS, Call, atoms_of

Place = tuple[Node, int]  # a tensor and one of its dimensions


class Calls:
    """The calls of one graph, each read once."""

    def __init__(self) -> None:
        self._known: dict[Node, Call] = {}

    def __getitem__(self, node: Node) -> Call:
        if node not in self._known:
            self._known[node] = Call(node)
        return self._known[node]


def followed(start: Place, calls: Calls, ranks: int | None) -> set[Place]:
    """Every tensor whose dimension the dimension of `start` is, back to where it begins, with `start` itself. A dimension that
    is merged of several is that of the outermost one, if the ranks divide it; ranks=None: it begins there."""
    found: set[Place] = set()
    waiting = [start]
    while waiting:
        place = waiting.pop()
        if place not in found:
            found.add(place)
            waiting += _before(place, calls, ranks)
    return found


def _before(place: Place, calls: Calls, ranks: int | None) -> Iterator[Place]:
    """The same dimension in the tensors of which a tensor is computed."""
    node, dim = place
    if node.op != "call_function":
        return
    if is_member(node):
        yield member_of(node)[0], dim
        return
    call = calls[node]
    if call.name in JOINS and dim == call.dim():
        yield from ((each, dim) for each in call.tensors)
        return
    if call.name in CUTS and dim == call.dim():
        yield call.tensors[0], dim
        return
    for row in call.rows:
        if row.output == dim:
            for each, of_input in zip(call.tensors, row.inputs, strict=True):
                if of_input is not None and of_input >= 0 and is_main(call, each):
                    yield each, of_input
    if call.name in VIEWS and ranks is not None:
        before, after, _ = atoms_of(call)
        for of_input, axis in enumerate(before):
            mine = after[dim]
            if axis and mine and axis != mine and (axis[: len(mine)] == mine or mine[: len(axis)] == axis):
                sizes = call.shape()[of_input], call.output_shape[dim]
                if all(always(size % ranks == 0) for size in sizes):
                    yield call.tensors[0], of_input


def is_main(call: Call, tensor: Node) -> bool:
    """Not a table that broadcasts, as the cosines of a rotary embedding: a rank cuts its part of it where it is used."""
    value = value_of(tensor)
    if torch.Tag.pointwise not in call.node.target.tags or len(call.tensors) == 1:  # type: ignore[union-attr]
        return True
    return value.dtype != torch.bool and tuple(value.shape) == call.output_shape


def is_member(node: Node) -> bool:
    """Whether a node takes one of the results of a call."""
    return node.target is operator.getitem and isinstance(value_of(node.args[0]), tuple | list)


def member_of(node: Node) -> tuple[Node, int]:
    """The call whose result a node takes, and which of its results."""
    source, index = node.args
    assert isinstance(source, Node)
    assert isinstance(index, int)
    return source, index


def is_size(node: Node) -> bool:
    """Whether a node computes a number from sizes: it is computed anew from the sizes of the inputs."""
    value = value_of(node)
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) and not has_no_hint(value)
