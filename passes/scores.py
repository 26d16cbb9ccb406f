"""Walks from a softmax back to the product of queries and keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from ..graphs.axes import Axes, Dims, size_of
from ..graphs.mutations import Writes, written_by
from ..graphs.nodes import value_of
from ..graphs.sizes import always
from ..graphs.spellings import (
    TURNS,
    argument,
    first,
    is_number,
    same_shape,
    shown,
    spelled,
    stays_on,
)
from .fills import masked_index, number_in, number_written
from .found import Missed
from .moves import Cut, Part, Region, before
from .opaque_functions import computed_by, is_function, of_one_shape
from .products import Product, leads_to_product, read_product

DEPTH = 40  # most operations between a product and the softmax
MIXERS = frozenset({"linear", "conv1d", "conv2d", "conv3d", "convolution"})  # "talking heads" mix scores by one
SCATTERS = frozenset({"slice_scatter", "select_scatter"})
VISITS = 200  # most nodes to try on the way back, masks included
Back = Callable[[Any, "Dims | None"], "Scores | Missed"]
Narrow = Callable[[Any], "Dims | None"]
# Given a node, its reader and its dims: the scores before a write into a part, if the node shows just that part.
Base = Callable[[Node, Node, Dims], "Scores | None"]


@dataclass(frozen=True)
class ScoreStep:
    """One operation on the scores between the product and the softmax.

    how: "scale": times `amount` ** `power`. "times": times `tensor` ** `power`. "add": plus `amount` * `tensor`.
        "keep": `amount` where `tensor` is False. "drop": `amount` where `tensor` is True; without a tensor in all of the part.
    """

    how: str
    amount: Any  # a number, or a node that gives one
    tensor: Node | None = None
    dims: Dims = ()  # of the tensor
    reader: Node | None = None  # the node that reads the tensor
    power: int = 1
    cuts: tuple[Cut, ...] = ()  # the part of the scores that the step changes; () for all of them


@dataclass(frozen=True)
class Scores:
    """The scores of an attention."""

    product: Product  # q k^T
    dims: Dims  # of the product
    steps: tuple[ScoreStep, ...] = ()  # from the product to the softmax, in order
    nodes: tuple[Node, ...] = ()  # from the product to the input of the softmax, both included
    obstacle: str | None = None  # why the attention must stay as it is

    def through(self, nodes: Sequence[Node]) -> Scores:
        """The scores, with more nodes of theirs."""
        return replace(self, nodes=(*self.nodes, *nodes))

    def then(self, node: Node, *steps: ScoreStep, obstacle: str | None = None) -> Scores:
        return replace(self, steps=self.steps + steps, nodes=(*self.nodes, node), obstacle=self.obstacle or obstacle)


def find_scores(
    node: Node,
    dims: Dims,
    reader: Node,
    axes: Axes,
    writes: Writes,
    seen: set[Node] | None = None,
    base: Base | None = None,
) -> Scores | Missed:
    """Walks from `node`, which `reader` reads and which has `dims`, back to a product; `Missed` if it ends anywhere else.

    seen: the nodes that were visited before; each node is visited once.
    base: only for what is written into a part of the scores: where the walk ends."""
    seen = set() if seen is None else seen
    if base is not None and (found := base(node, reader, dims)) is not None:
        return found
    if (edit := writes.last(node, reader)) is not None:
        return _written(edit, node, dims, axes, writes, seen, base)
    read, node = node, writes.current(node, reader)
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        written = f"its scores are written into by {shown(node)}"
        return Missed(written if node is not read else "its scores are not a floating-point tensor", node)
    if node in seen:
        return Missed("its scores are computed twice from one tensor", node)
    if len(seen) > VISITS:
        return Missed(f"more than {VISITS} operations lie before its softmax", node)
    seen.add(node)
    return _computed_by(node, dims, axes, writes, seen, base)


def _computed_by(
    node: Node, dims: Dims, axes: Axes, writes: Writes, seen: set[Node], base: Base | None
) -> Scores | Missed:
    """The scores that the operation of `node` computes."""
    value = value_of(node)
    product = read_product(node)
    if product is not None:
        return _of_product(product, dims, axes)

    def back(source: Any, expected: Dims | None) -> Scores | Missed:
        if not isinstance(source, Node) or expected is None:
            return Missed(
                f"its scores are computed by {shown(node)} from an operand whose shape is not known to match", node
            )
        return find_scores(source, expected, node, axes, writes, seen, base)

    def narrow(source: Any) -> Dims | None:
        known = value_of(source)
        return axes.broadcast(dims, known.shape, value.shape) if isinstance(known, torch.Tensor) else None

    name = spelled(node)
    source = first(node)
    if name == "to":
        if not stays_on(node):
            return Missed("its scores move to another device, or to a dtype that is not floating point", node)
        return _then(back(source, narrow(source)), node)
    if name == "tanh":
        return _then(back(source, dims), node, obstacle="its scores are capped (tanh)")
    if name == "neg":
        return _then(back(source, dims), node, ScoreStep("scale", -1))
    if name in ("mul", "div"):
        return _scaled(node, name, back, narrow)
    if name in ("add", "sub"):
        return _added(node, name, back, narrow, base is not None)
    if name == "masked_fill":
        found = back(source, narrow(source))
        return _filled(found, node, "drop", argument(node, 1, "mask"), argument(node, 2, "value"), narrow)
    if name == "where":
        return _chosen(node, back, narrow)
    if name == "copy" and base is not None:  # copy(slice(scores, ...), source) has the values of the source
        base(source, node, dims)
        copied = argument(node, 1, "src")
        return _then(back(copied, narrow(copied)), node)
    if name in SCATTERS:
        return _scattered(node, dims, axes, writes, seen, base)
    if name == "index_put" and (masked := masked_index(node, dims)) is not None:
        fill = number_written(node)
        missed = Missed("the value that fills its scores is not known to be a number", node)
        return missed if fill is None else _then(back(source, dims), node, ScoreStep("drop", fill, *masked, node))
    if is_function(node):
        return _opaque(node, dims, back)
    earlier = before(node, dims, axes)
    return _then(back(source, earlier), node) if earlier is not None else Missed(_computed(node), node)


def _written(
    edit: Node, node: Node, dims: Dims, axes: Axes, writes: Writes, seen: set[Node], base: Base | None
) -> Scores | Missed:
    """The scores in `node`, which has `dims`, after `edit` wrote into a view of them: `scores[:, :, 1:, 1:] += bias`."""
    part = Part(node, dims, axes)
    written = Missed(f"its scores are written into by {shown(edit)}", edit)
    name = spelled(edit)
    target = first(edit)
    region = part.region(target) if isinstance(target, Node) else None
    mask = masked_index(edit, region.dims) if region is not None and name in ("setitem", "index_put") else None
    if region is not None and name == "setitem" and mask is None:
        region = part.indexed(target, region, edit.args[1])
    if region is None or len(written_by(edit)) != 1:
        return written
    earlier = find_scores(node, dims, edit, axes, writes, seen, base)
    if isinstance(earlier, Missed):
        return earlier
    ends = _base(part, region, earlier, edit, writes)
    part.take(target)
    fill = number_written(edit)
    if fill is not None and (mask is not None or region.cuts):
        of_mask, of_dims = mask or (None, ())
        step = ScoreStep("drop", fill, of_mask, of_dims, edit, cuts=region.cuts)
        return earlier.then(edit, step).through(part.views)
    if mask is not None or name == "index_put":
        return written
    if name in ("setitem", "copy"):
        value = edit.args[2] if name == "setitem" else argument(edit, 1, "src", "other")
        found = _replaced(value, region, edit, axes, writes, seen, ends)
    else:
        found = _computed_by(edit, region.dims, axes, writes, seen, ends)
    found = _in_part(found, earlier, region)
    return written if isinstance(found, Missed) else found.then(edit).through(part.views)


def _scattered(
    node: Node, dims: Dims, axes: Axes, writes: Writes, seen: set[Node], base: Base | None
) -> Scores | Missed:
    """slice_scatter(scores, slice(scores, ...) + bias, ...): what a write into a part is in a functional graph."""
    source = first(node)
    part = Part(source, dims, axes)
    region: Region | None = Region(dims)
    value, nodes = node, []
    # A part by slices of two dimensions is a scatter into a slice that is scattered in turn.
    while isinstance(value, Node) and spelled(value) in SCATTERS:
        there = part.region(first(value))
        if there is None or region is None or set(there.cuts) != set(region.cuts):
            return Missed(_computed(node), node)
        part.take(first(value))
        region = part.along(value, region)
        nodes.append(value)
        value = argument(value, 1, "src")
    earlier = find_scores(source, dims, node, axes, writes, seen, base)
    if isinstance(earlier, Missed) or region is None:
        return Missed(_computed(node), node) if region is None else earlier
    fill = number_in(value)
    if fill is not None and region.cuts:
        given = (value,) if isinstance(value, Node) else ()
        for each in given:  # fill(slice(scores, ...), 0.5), full_like(slice(scores, ...), 0.5)
            if isinstance(first(each), Node) and part.region(first(each)) is not None:
                part.take(first(each))
        step = ScoreStep("drop", fill, reader=node, cuts=region.cuts)
        return earlier.then(node, step).through([*part.views, *given, *reversed(nodes)])
    ends = _base(part, region, earlier, node, writes)
    found = _in_part(_replaced(value, region, nodes[-1], axes, writes, seen, ends), earlier, region)
    if isinstance(found, Missed):
        return Missed(_computed(node), node)
    return found.through([*part.views, *reversed(nodes)])


def _base(part: Part, region: Region, earlier: Scores, edit: Node, writes: Writes) -> Base:
    """`earlier` for each node that shows the region as it was before `edit`."""

    def base(node: Node, reader: Node, dims: Dims) -> Scores | None:
        shown_there = part.region(node)
        if shown_there is None or set(shown_there.cuts) != set(region.cuts):
            return None
        same = part.axes.resolved(dims) == part.axes.resolved(shown_there.dims)
        if not same or not writes.unchanged(part.whole, reader, edit):
            return None
        part.take(node)
        return earlier

    return base


def _replaced(
    value: Any, region: Region, edit: Node, axes: Axes, writes: Writes, seen: set[Node], base: Base
) -> Scores | Missed:
    """The scores of a part that `edit` replaces by `value`."""
    tensor = value_of(value)
    sizes = [size_of(axis) for axis in region.dims]
    if not isinstance(value, Node) or not isinstance(tensor, torch.Tensor) or tensor.dim() != len(sizes):
        return Missed("a part of its scores is replaced", edit)
    if not all(always(a == b) for a, b in zip(tensor.shape, sizes, strict=True)):
        return Missed("a part of its scores is replaced by a tensor of another shape", edit)
    return find_scores(value, region.dims, edit, axes, writes, seen, base)


def _in_part(found: Scores | Missed, earlier: Scores, region: Region) -> Scores | Missed:
    """`found`, with the steps behind `earlier` for the region alone."""
    if isinstance(found, Missed):
        return found
    count = len(earlier.steps)
    kept = zip((*earlier.steps, *earlier.nodes), (*found.steps[:count], *found.nodes), strict=False)
    steps = found.steps[count:]
    last = found.nodes[-1]
    if found.product is not earlier.product or not all(a is b for a, b in kept):
        return Missed("a part of its scores is replaced by others", last)
    if any(step.tensor is None or step.how == "times" for step in steps):
        return Missed("a part of its scores is scaled", last)
    steps = tuple(replace(step, cuts=(*step.cuts, *region.cuts)) for step in steps)
    return replace(found, steps=found.steps[:count] + steps)


def _opaque(node: Node, dims: Dims, back: Back) -> Scores | Missed:
    """The scores are those that the function gets, changed in a way that is not known."""
    reason = computed_by("scores", node)
    for source in node.all_input_nodes:
        if of_one_shape(source, node) and isinstance(found := back(source, dims), Scores):
            return found.then(node, obstacle=reason)
    return Missed(reason, node)


def _computed(node: Node) -> str:
    if node.op in ("placeholder", "get_attr"):
        return "its scores come from outside the graph"
    if written_by(node):
        return f"its scores may be written into by {shown(node)}"
    if spelled(node) in MIXERS:
        return f"its scores are mixed by a learned layer ({shown(node)})"
    if spelled(node) in ("view", *TURNS):
        return f"the axes of its scores cannot be followed through {shown(node)}"
    return f"its scores are computed by {shown(node)}"


def _then(found: Scores | Missed, node: Node, *steps: ScoreStep, obstacle: str | None = None) -> Scores | Missed:
    return found if isinstance(found, Missed) else found.then(node, *steps, obstacle=obstacle)


def _of_product(product: Product, dims: Dims, axes: Axes) -> Scores | Missed:
    scores = Scores(product, dims, nodes=(product.node,))
    if product.alpha != 1:
        scores = replace(scores, steps=(ScoreStep("scale", product.alpha),))
    if product.added is None:
        return scores
    added = axes.broadcast(dims, value_of(product.added).shape, value_of(product.node).shape)
    if added is None:
        return Missed("the tensor that baddbmm adds is not known to broadcast to its scores", product.node)
    step = ScoreStep("add", product.beta, product.added, added, product.node)
    return replace(scores, steps=(*scores.steps, step))


def _scaled(node: Node, name: str, back: Back, narrow: Narrow) -> Scores | Missed:
    one, other = first(node), argument(node, 1, "other")
    if node.kwargs.get("rounding_mode") is not None:
        return Missed("its scores are rounded", node)
    power = -1 if name == "div" else 1
    pairs = ((one, other),) if name == "div" else ((one, other), (other, one))
    for source, factor in pairs:
        if is_number(factor) and isinstance(source, Node):
            return _then(back(source, narrow(source)), node, ScoreStep("scale", factor, power=power))
    missed = []
    # The factor may come from a product too: the scores are the operand that is not broadcast.
    for source, factor in sorted(pairs, key=lambda pair: not _full(pair[0], node)):
        dims = narrow(factor)
        found = back(source, narrow(source))
        if isinstance(found, Scores):
            if not isinstance(factor, Node) or dims is None:
                return Missed("its scores are multiplied by a tensor that is not known to broadcast to them", node)
            return found.then(node, ScoreStep("times", 1, factor, dims, node, power))
        missed.append(found)
    return _nearest(missed)


def _full(source: Any, node: Node) -> bool:
    value = value_of(source)
    return isinstance(value, torch.Tensor) and same_shape(value, value_of(node))


def _added(node: Node, name: str, back: Back, narrow: Narrow, in_part: bool) -> Scores | Missed:
    one, other = first(node), argument(node, 1, "other")
    alpha = argument(node, 2, "alpha", default=1)
    if not is_number(alpha) or isinstance(alpha, Node):
        return Missed("the graph computes the factor (alpha) with which a tensor is added to its scores", node)
    sign = -alpha if name == "sub" else alpha
    missed = []
    if is_number(other) and isinstance(one, Node):
        found = back(one, narrow(one))
        if isinstance(found, Scores) and in_part:
            return Missed("a number is added to a part of its scores", node)
        if isinstance(found, Scores):
            return found.then(node)  # the same number for every score does not change the softmax
        missed.append(found)
    pairs = [(one, other, sign)] + ([(other, one, 1)] if sign == 1 else [])
    both = []
    for source, tensor, factor in pairs:
        dims = narrow(tensor)
        if not isinstance(tensor, Node) or dims is None:
            continue
        found = back(source, narrow(source))
        if isinstance(found, Scores):
            both.append(found.then(node, ScoreStep("add", factor, tensor, dims, node)))
        else:
            missed.append(found)
    # Where both are products, one is a bias by relative positions: its keys have no batch dimension.
    both.sort(key=lambda each: not each.product.batched)
    return both[0] if both else _nearest(missed or [Missed(_computed(node), node)])


def _nearest(missed: list[Missed]) -> Missed:
    """Of several ways back, the first that leads to a product; otherwise the first."""
    return next((each for each in missed if leads_to_product(each.node)), missed[0])


def _filled(found: Scores | Missed, node: Node, how: str, mask: Any, fill: Any, narrow: Narrow) -> Scores | Missed:
    value = value_of(mask)
    if isinstance(found, Missed):
        return found
    if not isinstance(mask, Node) or not isinstance(value, torch.Tensor) or value.dtype != torch.bool:
        return Missed("the mask that fills its scores is not a boolean tensor", node)
    dims = narrow(mask)
    if dims is None:
        return Missed("the mask that fills its scores is not known to broadcast to them", node)
    if not is_number(fill):
        return Missed("the value that fills its scores is not known to be a number", node)
    return found.then(node, ScoreStep(how, fill, mask, dims, node))


def _chosen(node: Node, back: Back, narrow: Narrow) -> Scores | Missed:
    """where(condition, scores, number), or the other way round."""
    condition, one, other = (argument(node, *at) for at in ((0, "condition"), (1, "input", "self"), (2, "other")))
    if node.op == "call_method":  # x.where(condition, other)
        condition, one, other = argument(node, 1, "condition"), node.args[0], argument(node, 2, "other")
    for how, source, fill in (("keep", one, other), ("drop", other, one)):
        if is_number(fill) and isinstance(source, Node):
            return _filled(back(source, narrow(source)), node, how, condition, fill, narrow)
    return Missed("its scores are selected from two tensors (where)", node)
