"""Walks from the weights of an attention to their product with the values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from ..graphs.axes import Axes, Axis, Dims
from ..graphs.nodes import value_of
from ..graphs.spellings import (
    argument,
    first,
    is_number,
    number,
    shown,
    spelled,
    stays_on,
)
from .found import Missed
from .moves import after
from .opaque_functions import computed_by, is_function, of_one_shape
from .products import Product, leads_to_product, output_dims, read_product
from .scores import DEPTH, MIXERS


@dataclass(frozen=True)
class Values:
    """The product with the values, and the operations between the softmax and the product."""

    product: Product  # weights @ v
    value: Node  # the operand v
    value_dims: Dims  # of the value
    dims: Dims  # of the product
    summed: Axis  # the axis that the product sums over
    width: Axis  # the last axis of the value
    output: Node  # gives the attention's output: the product, or what divides it (softmaxes.py)
    output_dims: Dims
    dropout: Any = 0.0  # probability: a number, or a node that gives one
    nodes: tuple[Node, ...] = ()  # from after the softmax to the output
    obstacle: str | None = None  # why the attention must stay as it is


# Functions that read the shape, strides or dtype of a tensor, but not its values.
_FORM = frozenset(
    {"_assert_tensor_metadata", "sym_size", "size", "sym_stride", "sym_numel", "dim", "full_like", "zeros_like", "ones_like",
     "empty_like", "new_full", "new_zeros", "new_ones", "new_empty", "new_tensor"}
)  # fmt: skip


def readers(node: Node, unread: Set[Node]) -> Iterator[Node]:
    """The users of a node that read its values. unread: nodes whose own values nothing reads, which do not count."""
    for user in node.users:
        if user in unread:
            continue
        like = spelled(user) in ("view", "expand", "to") and node not in (user.args[:1] or (None,))  # x.expand_as(node)
        if spelled(user) in _FORM or like:
            continue
        if spelled(user) == "to" and user.users and not any(readers(user, unread)):
            continue  # a copy that lends its dtype alone: y = x.type_as(scores); x.type_as(y)
        yield user


def find_values(node: Node, dims: Dims, axes: Axes, unread: Set[Node], depth: int = DEPTH) -> Values | Missed:
    """Walks from the weights, which have `dims`, to the product with the values; `Missed` if no reader leads there.

    unread: nodes whose values nothing reads (`graphs.mutations.unread`)."""
    if depth == 0:
        return Missed(f"more than {DEPTH} operations lie after its softmax", node)
    missed = []
    for user in readers(node, unread):
        found = _find_values(user, node, dims, axes, unread, depth)
        if isinstance(found, Values):
            return replace(found, nodes=(user, *found.nodes))
        missed.append(found)
    nearest = (each for each in missed if leads_to_product(each.node, forward=True))
    return next(nearest, missed[0]) if missed else Missed("nothing reads its weights", node)


def _find_values(user: Node, node: Node, dims: Dims, axes: Axes, unread: Set[Node], depth: int) -> Values | Missed:
    product = read_product(user)
    if product is not None:
        return _of_product(product, node, dims, axes)
    if (emptied := _emptied(user, node)) is not None:
        found = find_values(user, dims, axes, unread, depth - 1)
        return replace(found, nodes=(*emptied, *found.nodes)) if isinstance(found, Values) else found
    if is_function(user):
        reason = computed_by("weights", user)
        if not of_one_shape(node, user):
            return Missed(reason, user)
        found = find_values(user, dims, axes, unread, depth - 1)
        return replace(found, obstacle=reason) if isinstance(found, Values) else Missed(reason, user)
    if node is not first(user):
        return Missed(f"its weights are read by {shown(user)}", user)
    name = spelled(user)
    if name == "to":
        if not stays_on(user):
            return Missed("its weights move to another device, or to a dtype that is not floating point", user)
        return find_values(user, dims, axes, unread, depth - 1)
    if name in ("dropout", "native_dropout"):
        return _dropped(user, name, dims, axes, unread, depth)
    if name in MIXERS:
        return Missed(f"its weights are mixed by a learned layer ({shown(user)})", user)
    behind = after(user, dims, axes)
    if behind is None:
        return Missed(f"its weights are read by {shown(user)}", user)
    return find_values(user, behind, axes, unread, depth - 1)


def _of_product(product: Product, weights: Node, dims: Dims, axes: Axes) -> Values | Missed:
    if product.added is not None or product.alpha != 1:
        return Missed("the product with its values is scaled, or a tensor is added to it", product.node)
    if product.left is product.right or weights not in (product.left, product.right):
        return Missed("the product that reads its weights does not multiply them by another tensor", product.node)
    placed = output_dims(product, weights, dims, axes)
    if isinstance(placed, Missed):
        return placed
    others, output, summed, width = placed
    value = product.right if weights is product.left else product.left
    return Values(product, value, others, output, summed, width, product.node, output)


def _emptied(user: Node, weights: Node) -> tuple[Node, ...] | None:
    """The nodes with which a lowered SDPA sets the weights of rows without any key to 0; None if `user` does anything else.

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


def _dropped(user: Node, name: str, dims: Dims, axes: Axes, unread: Set[Node], depth: int) -> Values | Missed:
    probability = argument(user, 1, "p", default=0.5)
    train = argument(user, 2, "training", "train", default=True)
    if isinstance(train, Node) or not is_number(probability):
        return Missed("its dropout is computed in the graph", user)
    output = user
    if name == "native_dropout":
        kept = [each for each in user.users if each not in unread]
        if len(kept) != 1 or kept[0].args[1] != 0:
            return Missed("the mask of its dropout is used", user)
        output = kept[0]
    found = find_values(output, dims, axes, unread, depth - 1)
    if isinstance(found, Missed):
        return found
    if train is not False and found.dropout != 0.0:
        return Missed("its weights have dropout twice", user)
    nodes = found.nodes if output is user else (output, *found.nodes)
    return replace(found, dropout=probability if train is not False else found.dropout, nodes=nodes)
