"""From a softmax back to the product of queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from ..graphs.axes import Axes, Layout
from ..graphs.mutations import Writes, written_by
from ..graphs.nodes import value_of
from ..graphs.spellings import (
    TURNS,
    argument,
    first,
    is_number,
    keeps_order,
    permutation,
    same_shape,
    spelled,
    stays_on,
)
from .products import Product, read_product

DEPTH = 40  # operations between a product and the softmax
VISITS = 200  # nodes that are tried on the way back, masks included
Back = Callable[[Any, "Layout | None"], "Scores | None"]
Narrow = Callable[[Any], "Layout | None"]


@dataclass(frozen=True)
class Step:
    """One thing that happens to the scores between the product and the softmax.

    scale: times `amount` ** `power`. add: plus `amount` * tensor. keep, drop: `amount` where the tensor is False, or True.
    """

    how: str
    amount: Any  # a number, or a node of one
    tensor: Node | None = None
    layout: Layout = ()
    reader: Node | None = None  # the node that reads the tensor
    power: int = 1


@dataclass(frozen=True)
class Scores:
    """product: q k^T, whose value has `layout`. steps: from there to the softmax. nodes: all in between, both included."""

    product: Product
    layout: Layout
    steps: tuple[Step, ...] = ()
    nodes: tuple[Node, ...] = ()
    obstacle: str | None = None

    def then(self, node: Node, *steps: Step, obstacle: str | None = None) -> Scores:
        return replace(self, steps=self.steps + steps, nodes=(*self.nodes, node), obstacle=self.obstacle or obstacle)


def find_scores(
    node: Node, layout: Layout, reader: Node, axes: Axes, writes: Writes, seen: set[Node] | None = None
) -> Scores | None:
    """Walks from what `reader` reads as `node`, whose value has `layout`, back to a product. None where there is none, or
    something on the way is not understood. `seen`: the nodes that were tried before; each is walked once."""
    node = writes.current(node, reader)
    value = value_of(node)
    seen = set() if seen is None else seen
    if node in seen or len(seen) > VISITS or not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return None
    seen.add(node)
    product = read_product(node)
    if product is not None:
        scores = Scores(product, layout, nodes=(node,))
        if product.alpha != 1:
            scores = replace(scores, steps=(Step("scale", product.alpha),))
        if product.added is not None:
            added = axes.broadcast(layout, value_of(product.added).shape, value.shape)
            step = Step("add", product.beta, product.added, added or (), node)
            return replace(scores, steps=(*scores.steps, step)) if added is not None else None
        return scores

    def back(source: Any, expected: Layout | None) -> Scores | None:
        if not isinstance(source, Node) or expected is None:
            return None
        return find_scores(source, expected, node, axes, writes, seen)

    def narrow(source: Any) -> Layout | None:
        known = value_of(source)
        return axes.broadcast(layout, known.shape, value.shape) if isinstance(known, torch.Tensor) else None

    name = spelled(node)
    source = first(node)
    if name == "to":
        found = back(source, narrow(source)) if stays_on(node) else None
        return found.then(node) if found else None
    if name == "tanh":
        found = back(source, layout)
        return found.then(node, obstacle="its scores are capped (tanh)") if found else None
    if name in ("mul", "div"):
        return _scaled(node, name, back, narrow)
    if name in ("add", "sub"):
        return _added(node, name, back, narrow)
    if name == "masked_fill":
        found = back(source, narrow(source))
        return found and _filled(found, node, "drop", argument(node, 1, "mask"), argument(node, 2, "value"), narrow)
    if name == "where":
        condition, one, other = (argument(node, *at) for at in ((0, "condition"), (1, "input", "self"), (2, "other")))
        if node.op == "call_method":  # x.where(condition, other)
            condition, one, other = argument(node, 1, "condition"), node.args[0], argument(node, 2, "other")
        for how, source, fill in (("keep", one, other), ("drop", other, one)):
            if is_number(fill) and isinstance(source, Node):
                found = back(source, narrow(source))
                return found and _filled(found, node, how, condition, fill, narrow)
        return None
    found = back(source, before(node, layout, axes))
    return found.then(node) if found else None


def before(node: Node, layout: Layout, axes: Axes) -> Layout | None:
    """The layout of the first argument of a view, a copy or a permutation, None if the node is something else."""
    source = value_of(first(node))
    if not isinstance(source, torch.Tensor) or source.dtype != value_of(node).dtype or written_by(node):
        return None
    if keeps_order(node):
        return axes.reshaped(layout, source.shape)
    name = spelled(node)
    if name == "expand" and same_shape(source, value_of(node)):
        return layout
    if name in TURNS and (order := permutation(node)) is not None:
        return tuple(layout[order.index(dim)] for dim in range(len(order)))
    return None


def _scaled(node: Node, name: str, back: Back, narrow: Narrow) -> Scores | None:
    one, other = first(node), argument(node, 1, "other")
    if node.kwargs.get("rounding_mode") is not None:
        return None
    power = -1 if name == "div" else 1
    pairs = ((one, other),) if name == "div" else ((one, other), (other, one))
    for source, factor in pairs:
        if is_number(factor) and isinstance(source, Node):
            found = back(source, narrow(source))
            return found.then(node, Step("scale", factor, power=power)) if found else None
    for source, _ in pairs:
        if found := back(source, narrow(source)):
            return found.then(node, obstacle="its scores are multiplied by a tensor")
    return None


def _added(node: Node, name: str, back: Back, narrow: Narrow) -> Scores | None:
    one, other = first(node), argument(node, 1, "other")
    alpha = argument(node, 2, "alpha", default=1)
    if not is_number(alpha) or isinstance(alpha, Node):
        return None
    sign = -alpha if name == "sub" else alpha
    if is_number(other) and isinstance(one, Node) and (found := back(one, narrow(one))):
        return found.then(node)  # the same for every score: the softmax does not see it
    pairs = [(one, other, sign)] + ([(other, one, 1)] if sign == 1 else [])
    both = []
    for source, tensor, factor in pairs:
        layout = narrow(tensor)
        if isinstance(tensor, Node) and layout is not None and (found := back(source, narrow(source))):
            both.append(found.then(node, Step("add", factor, tensor, layout, node)))
    # Where both are products, one is a bias by relative positions: whose keys are no batch's own.
    both.sort(key=lambda each: not each.product.batched)
    return both[0] if both else None


def _filled(found: Scores, node: Node, how: str, mask: Any, fill: Any, narrow: Narrow) -> Scores | None:
    value = value_of(mask)
    if not isinstance(mask, Node) or not isinstance(value, torch.Tensor) or value.dtype != torch.bool:
        return None
    layout = narrow(mask)
    if layout is None or not is_number(fill):
        return None
    return found.then(node, Step(how, fill, mask, layout, node))
