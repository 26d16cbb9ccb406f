"""From the weights of an attention on to their product with the values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from ..graphs.axes import Axes, Axis, Layout
from ..graphs.mutations import written_by
from ..graphs.nodes import value_of
from ..graphs.spellings import (
    TURNS,
    argument,
    first,
    is_number,
    keeps_order,
    number,
    permutation,
    same_shape,
    spelled,
    stays_on,
)
from .products import Product, output_layouts, read_product
from .scores import DEPTH


@dataclass(frozen=True)
class Values:
    """product: weights @ v, whose value has `layout`; `value` has `value_layout`. nodes: from the softmax to the product."""

    product: Product
    value: Node
    value_layout: Layout
    layout: Layout
    summed: Axis  # what the product sums over
    width: Axis
    dropout: Any = 0.0
    nodes: tuple[Node, ...] = ()


def after(node: Node, layout: Layout, axes: Axes) -> Layout | None:
    """The other way round: the layout of the node where its first argument has `layout`."""
    source, value = value_of(first(node)), value_of(node)
    if not isinstance(value, torch.Tensor) or source.dtype != value.dtype or written_by(node):
        return None
    if keeps_order(node):
        return axes.reshaped(layout, value.shape)
    name = spelled(node)
    if name == "expand" and same_shape(source, value):
        return layout
    if name in TURNS and (order := permutation(node)) is not None:
        return tuple(layout[dim] for dim in order)
    return None


# What reads the form of a tensor and not its values.
_FORM = frozenset(
    {"_assert_tensor_metadata", "sym_size", "size", "sym_stride", "sym_numel", "dim", "full_like", "zeros_like", "ones_like",
     "empty_like", "new_full", "new_zeros", "new_ones", "new_empty", "new_tensor"}
)  # fmt: skip


def readers(node: Node) -> Iterator[Node]:
    """The users of a node that read its values."""
    for user in node.users:
        like = spelled(user) in ("view", "expand", "to") and node not in (user.args[:1] or (None,))  # x.expand_as(node)
        if spelled(user) not in _FORM and not like:
            yield user


def find_values(node: Node, layout: Layout, axes: Axes, depth: int = DEPTH) -> Values | None:
    """Walks from the weights, whose value has `layout`, to the product with the values. None where there is none."""
    if depth == 0:
        return None
    for user in readers(node):
        found = _find_values(user, node, layout, axes, depth)
        if found is not None:
            return replace(found, nodes=(user, *found.nodes))
    return None


def _find_values(user: Node, node: Node, layout: Layout, axes: Axes, depth: int) -> Values | None:
    product = read_product(user)
    if product is not None:
        if product.added is not None or product.alpha != 1 or product.left is product.right:
            return None
        if node not in (product.left, product.right):
            return None
        placed = output_layouts(product, node, layout, axes)
        if placed is None:
            return None
        others, output, summed, width = placed
        value = product.right if node is product.left else product.left
        return Values(product, value, others, output, summed, width)
    if (emptied := _emptied(user, node)) is not None:
        found = find_values(user, layout, axes, depth - 1)
        return replace(found, nodes=(*emptied, *found.nodes)) if found is not None else None
    if node is not first(user):
        return None
    name = spelled(user)
    if name == "to":
        return find_values(user, layout, axes, depth - 1) if stays_on(user) else None
    if name in ("dropout", "native_dropout"):
        return _dropped(user, name, layout, axes, depth)
    behind = after(user, layout, axes)
    return find_values(user, behind, axes, depth - 1) if behind is not None else None


def _emptied(user: Node, weights: Node) -> tuple[Node, ...] | None:
    """The nodes by which a lowered SDPA gives rows without any key the weights 0, None if `user` does something else.

    where(~any(~(scores == -inf), -1, keepdim), 0, softmax(scores))
    """
    if spelled(user) != "where" or len(user.args) != 3 or user.args[2] is not weights or not is_number(user.args[1]):
        return None
    nodes: list[Node] = []
    node: Any = user.args[0]
    for name in ("logical_not", "any", "logical_not", "eq"):
        if not isinstance(node, Node) or spelled(node) != name:
            return None
        nodes.append(node)
        node = first(node)
    empty, compared = nodes[1], nodes[3]
    along = (argument(empty, 1, "dim"), argument(empty, 2, "keepdim")) == (-1, True)
    dim = argument(weights, 1, "dim") if node is first(weights) else None
    to = argument(compared, 1, "other")
    if not along or dim not in (-1, value_of(weights).dim() - 1) or not is_number(to):
        return None
    if number(to) != -math.inf or number(user.args[1]) != 0:
        return None
    zero = (user.args[1],) if isinstance(user.args[1], Node) else ()
    return (*zero, *reversed(nodes))


def _dropped(user: Node, name: str, layout: Layout, axes: Axes, depth: int) -> Values | None:
    probability = argument(user, 1, "p", default=0.5)
    train = argument(user, 2, "training", "train", default=True)
    if isinstance(train, Node) or not is_number(probability):
        return None
    output = user
    if name == "native_dropout":
        kept = [each for each in user.users if each.users]
        if len(kept) != 1 or kept[0].args[1] != 0:
            return None
        output = kept[0]
    found = find_values(output, layout, axes, depth - 1)
    if found is None or (train is not False and found.dropout != 0.0):
        return None
    nodes = found.nodes if output is user else (output, *found.nodes)
    return replace(found, dropout=probability if train is not False else found.dropout, nodes=nodes)
