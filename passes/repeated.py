"""Two nodes that compute the same value: a model may write `exp(s) / exp(s).sum(-1, keepdim=True)`."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ..graphs.mutations import Writes, written_by
from ..graphs.nodes import value_of
from ..graphs.spellings import TURNS, spelled
from .products import PRODUCTS

# Operations that give the same result each time.
_REPEATABLE = PRODUCTS | TURNS | {
    "exp", "exp2", "add", "sub", "mul", "div", "neg", "where", "masked_fill", "amax", "max", "logsumexp", "sum", "getitem",
    "to", "view", "clone", "detach", "expand", "eq", "ne", "logical_not",
}  # fmt: skip
_DEPTH = 12  # most operations of a value that is computed twice


def repeated(one: Node, reader: Node, other: Node, other_reader: Node, writes: Writes) -> tuple[Node, ...] | None:
    """The nodes that compute again, for `other`, what `one` holds for its reader; () if it is the same node. None if the two
    may differ."""
    one, other = writes.current(one, reader), writes.current(other, other_reader)
    if one is other:
        first, last = sorted((reader, other_reader), key=lambda node: writes.position[node])
        return () if writes.unchanged(one, first, last) else None
    found: dict[Node, Node] = {}
    return tuple(found) if _are_alike(one, other, writes, found, _DEPTH) else None


def _are_alike(one: Any, other: Any, writes: Writes, found: dict[Node, Node], depth: int) -> bool:
    """Whether two arguments are equal; each node of `other` goes into `found`, with that of `one`."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(_are_alike(a, b, writes, found, depth) for a, b in pairs)
    if isinstance(one, slice) and isinstance(other, slice):
        ends = (one.start, one.stop, one.step), (other.start, other.stop, other.step)
        return _are_alike(ends[0], ends[1], writes, found, depth)
    if not isinstance(one, Node) or not isinstance(other, Node):
        return type(one) is type(other) and bool(one == other)
    if one is other:
        return not writes.writers(one)  # a tensor that is written into may hold two values
    if other in found:
        return found[other] is one
    same = one.op == other.op and one.target == other.target and one.kwargs.keys() == other.kwargs.keys()
    if depth == 0 or not same or spelled(one) not in _REPEATABLE or written_by(one) or writes.writers(one):
        return False
    if writes.writers(other) or not _of_one_kind(one, other):
        return False
    given, again = ((*node.args, *(node.kwargs[name] for name in sorted(one.kwargs))) for node in (one, other))
    if not _are_alike(given, again, writes, found, depth - 1):
        return False
    found[other] = one
    return True


def _of_one_kind(one: Node, other: Node) -> bool:
    """Whether two nodes agree in what autocast and grad mode may have changed between them."""
    values = value_of(one), value_of(other)
    if not all(isinstance(value, torch.Tensor) for value in values):
        return type(values[0]) is type(values[1])
    return bool(values[0].dtype == values[1].dtype and values[0].requires_grad == values[1].requires_grad)
