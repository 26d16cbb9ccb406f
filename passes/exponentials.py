"""Reads the parts of a softmax that a model computes by hand: the exponentials, and the sum that divides them."""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..graphs.axes import Axes, Dims
from ..graphs.mutations import Writes
from ..graphs.nodes import value_of
from ..graphs.spellings import argument, first, is_number, number, same_shape, shown, spelled, stays_on
from .found import Missed
from .moves import after
from .products import read_product
from .repeated import repeated
from .scores import DEPTH, ScoreStep

SUM, EXPONENTIALS = frozenset({"sum"}), frozenset({"exp", "exp2"})
_NEAR = 4  # most operations between a division, its sum and the exponentials of something that is nearly a softmax


@dataclass(frozen=True)
class Reduction:
    node: Node  # sum or logsumexp
    dims: Dims  # of what is read, without the atoms of the dimension that is reduced
    dim: int
    nodes: tuple[Node, ...]  # the reduction, and the views and casts behind it


def reduced(node: Node, name: str, dims: Dims, axes: Axes) -> Reduction | None:
    """What `node` shows of the reduction `name` over one dimension of a tensor with `dims`, through views and casts."""
    behind: list[Node] = []
    while spelled(node) != name:
        if not isinstance(first(node), Node) or len(behind) > DEPTH:
            return None
        behind.append(node)
        node = first(node)
    dim, keep = argument(node, 1, "dim", "axis"), argument(node, 2, "keepdim", default=False)
    dim = dim[0] if isinstance(dim, list | tuple) and len(dim) == 1 else dim
    if (
        not isinstance(dim, int)
        or isinstance(dim, bool)
        or "out" in node.kwargs
        or not value_of(node).is_floating_point()
    ):
        return None
    dim %= len(dims)
    shown_dims: Dims | None = (*dims[:dim], *(((),) if keep else ()), *dims[dim + 1 :])
    for each in reversed(behind):
        if spelled(each) == "to" and stays_on(each):
            continue
        if spelled(each) == "expand" and value_of(each).dim() == value_of(first(each)).dim():
            continue  # over the reduced dimension, which has no atoms
        shown_dims = after(each, shown_dims, axes) if shown_dims is not None else None
    return None if shown_dims is None else Reduction(node, shown_dims, dim, (node, *reversed(behind)))


@dataclass(frozen=True)
class Exponentials:
    node: Node  # what is summed, without casts
    reader: Node  # the node that reads it
    exponential: Node
    nodes: tuple[Node, ...]  # from the exponential to the sum
    steps: tuple[ScoreStep, ...] = ()


def exponentials(node: Any, reader: Node, dims: Dims, axes: Axes, writes: Writes) -> Exponentials | Missed:
    """The exponentials that a sum reads, some of them set to 0 by a mask."""
    nodes: list[Node] = []
    steps: list[ScoreStep] = []
    top: tuple[Node, Node] | None = None
    while isinstance(node, Node):
        if writes.last(node, reader) is not None:
            return Missed("its exponentials are written into", node)
        node = writes.current(node, reader)
        nodes.append(node)
        if spelled(node) == "to" and stays_on(node):
            node, reader = first(node), node
            continue
        top = top or (node, reader)
        if spelled(node) in EXPONENTIALS and isinstance(first(node), Node) and "out" not in node.kwargs:
            if spelled(node) == "exp2":
                steps.append(ScoreStep("scale", math.log(2)))
            return Exponentials(*top, node, tuple(reversed(nodes)), tuple(reversed(steps)))
        step = _emptied(node, dims, axes)
        if step is None:
            break
        steps.append(step[0])
        node, reader = step[1], node
    return Missed(f"its exponentials are changed by {shown(nodes[-1])} before they are summed", nodes[-1])


def _emptied(node: Node, dims: Dims, axes: Axes) -> tuple[ScoreStep, Node] | None:
    """The step on the scores that masked_fill(e, mask, 0), where(mask, e, 0) or e * mask amounts to, and e."""
    name = spelled(node)
    choices: list[tuple[str, Any, Any, Any]] = []
    if name == "masked_fill":
        choices.append(("drop", first(node), argument(node, 1, "mask"), argument(node, 2, "value")))
    elif name == "where":
        mask, one, other = (
            argument(node, 0, "condition"),
            argument(node, 1, "input", "self"),
            argument(node, 2, "other"),
        )
        if node.op == "call_method":
            mask, one = argument(node, 1, "condition"), node.args[0]
        choices += [("keep", one, mask, other), ("drop", other, mask, one)]
    elif name == "mul":
        one, other = first(node), argument(node, 1, "other")
        choices += [("keep", one, _boolean(other), 0), ("keep", other, _boolean(one), 0)]
    for how, source, mask, fill in choices:
        known = value_of(mask) if isinstance(mask, Node) else None
        if not isinstance(source, Node) or not isinstance(known, torch.Tensor) or known.dtype != torch.bool:
            continue
        if not is_number(fill) or number(fill) != 0 or not same_shape(value_of(source), value_of(node)):
            continue
        narrow = axes.broadcast(dims, known.shape, value_of(node).shape)
        if narrow is not None:
            return ScoreStep(how, -math.inf, mask, narrow, node), source
    return None


def _boolean(node: Any) -> Any:
    """The boolean tensor that a tensor of zeros and ones was cast from."""
    while isinstance(node, Node) and spelled(node) == "to" and isinstance(first(node), Node):
        node = first(node)
    return node


def alike(
    node: Any, reader: Node, given: Exponentials, writes: Writes, through: Set[str]
) -> tuple[Node | None, tuple[Node, ...]]:
    """The node before `node` that gives the same exponentials, and the nodes that compute them again for it."""
    passed: list[Node] = []
    for _ in range(DEPTH):
        if not isinstance(node, Node):
            break
        again = repeated(given.node, given.reader, node, reader, writes)
        if again is not None:
            return writes.current(node, reader), (*again, *passed)
        if through and spelled(node) not in through:
            break
        if spelled(node) == "to":
            passed.append(node)
        node, reader = first(node), node
    return None, ()


def multiplied(node: Node, given: Exponentials, writes: Writes) -> tuple[Node | None, tuple[Node, ...]]:
    """The exponentials among the operands of the product that `node` shows."""
    for _ in range(DEPTH):
        product = read_product(node)
        if product is not None:
            ways = (alike(each, node, given, writes, frozenset()) for each in (product.left, product.right))
            return next((way for way in ways if way[0] is not None), (None, ()))
        if not isinstance(first(node), Node):
            break
        node = first(node)
    return None, ()


def operation_behind(
    node: Any, names: Set[str], reader: Node | None = None, writes: Writes | None = None
) -> Node | None:
    """An operation of `names` within few operations before a node, or the node itself; with `writes` also one in place."""
    front = [(node, reader)] if isinstance(node, Node) else []
    for _ in range(_NEAR):
        if writes is not None:
            front = [(each if by is None else writes.current(each, by), by) for each, by in front]
        if (found := next((each for each, _ in front if spelled(each) in names), None)) is not None:
            return found
        front = list(dict.fromkeys((source, each) for each, _ in front for source in each.all_input_nodes))
    return None
