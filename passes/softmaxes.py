"""Reads a softmax: PyTorch's own function, or one that a model computes by hand. The graph is not changed.

    softmax(s)    exp(s) / exp(s).sum()    exp(s - logsumexp(s))    log_softmax(s).exp()    (exp(s) @ v) / exp(s).sum()

The number that a stable softmax takes from its scores, `s - s.amax(-1, keepdim=True)`, is a step of the scores (steps.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from ..graphs.axes import Axes, Axis, Dims
from ..graphs.mutations import Writes, changed_in_place
from ..graphs.nodes import value_of
from ..graphs.spellings import argument, first, same_shape, shown, spelled
from .exponentials import EXPONENTIALS, SUM, alike, exponentials, multiplied, operation_behind, reduced
from .found import Missed
from .moves import after
from .products import leads_to_product
from .repeated import repeated
from .scores import Scores, ScoreStep
from .values import Values, readers


@dataclass(frozen=True)
class Softmax:
    """A softmax. Where its sum divides behind the product with the values, `weights` are the exponentials."""

    node: Node  # its last operation
    source: Node  # the scores
    reader: Node  # the node that reads the scores
    weights: Node
    dims: Dims  # of the scores and the weights
    dim: int  # the dimension that it runs over
    nodes: tuple[Node, ...]  # all operations that it consists of
    divisor: Dims | None = None  # of the sum, if it divides behind the product with the values
    steps: tuple[ScoreStep, ...] = ()  # of the scores: a scale; -inf, where exponentials are set to 0

    def stepped(self, scores: Scores | Missed) -> Scores | Missed:
        return scores if isinstance(scores, Missed) else replace(scores, steps=scores.steps + self.steps)

    def divided(self, values: Values | Missed, axes: Axes, unread: Set[Node]) -> Values | Missed:
        """The values, up to the division by the sum."""
        if isinstance(values, Missed) or self.divisor is None:
            return values
        node, dims = values.output, values.output_dims
        passed: list[Node] = []
        while node is not self.node:
            found = list(readers(node, unread))
            if len(found) != 1:
                return Missed("the product with its values is read before the sum of its exponentials divides it", node)
            node = found[0]
            moved = dims if node is self.node or spelled(node) == "to" else after(node, dims, axes)
            if moved is None:
                return Missed(f"the product with its values is read by {shown(node)}", node)
            dims = moved
            passed.append(node)
        if not _divides(self.divisor, dims, values.width, axes):
            return Missed("the sum of its exponentials does not divide the rows that it belongs to", node)
        return replace(values, output=node, output_dims=dims, nodes=(*values.nodes, *passed))


def may_be_softmax(node: Node) -> bool:
    """Whether a node may be the last operation of a softmax: a question that most nodes of a graph answer at once."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = spelled(node)
    if name == "exp":
        return isinstance(first(node), Node) and spelled(first(node)) in ("sub", "log_softmax")
    divided = any(operation_behind(divisor, SUM) is not None for _, divisor, _ in _divisions(node))
    return name in ("softmax", "softmin", "normalize") or divided


def read_softmax(node: Node, writes: Writes, axes: Axes) -> Softmax | Missed | None:
    """The softmax whose last operation is `node`, one that `may_be_softmax`. `Missed` for what is nearly a softmax between two
    products; None for any other operation."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or value.is_nested or value.layout != torch.strided or "out" in node.kwargs:
        return None
    name, dim = spelled(node), argument(node, 1, "dim")
    if name in ("softmax", "softmin"):
        if not isinstance(first(node), Node) or not isinstance(dim, int):
            return None
        turned = (ScoreStep("scale", -1),) if name == "softmin" else ()
        dims = axes.fresh(value.shape)
        return Softmax(node, first(node), node, node, dims, dim % value.dim(), (node,), None, turned)
    if name == "exp":
        return _of_logarithms(node, writes, axes)
    if name == "normalize":
        exponents = operation_behind(first(node), EXPONENTIALS)
        near = exponents is not None and leads_to_product(exponents) and leads_to_product(node, forward=True)
        return (
            Missed("its exponentials are divided by a norm that has a least value (normalize)", node) if near else None
        )
    for numerator, divisor, around in _divisions(node):
        if (found := _divided(node, numerator, divisor, around, writes, axes)) is not None:
            return found
    return None


def _of_logarithms(node: Node, writes: Writes, axes: Axes) -> Softmax | Missed | None:
    """exp(s - logsumexp(s, dim)), exp(log_softmax(s, dim))."""
    value, inner = value_of(node), first(node)
    inner = writes.current(inner, node) if isinstance(inner, Node) else None
    if inner is None or not isinstance(first(inner), Node) or not _tracked_alike(node, inner):
        return None
    source, dims = first(inner), axes.fresh(value.shape)
    if spelled(inner) == "log_softmax" and isinstance(dim := argument(inner, 1, "dim"), int):
        return Softmax(node, source, inner, node, dims, dim % value.dim(), (inner, node))
    other = argument(inner, 1, "other")
    if spelled(inner) != "sub" or argument(inner, 2, "alpha", default=1) != 1 or not isinstance(other, Node):
        return None
    logarithm = operation_behind(other, frozenset({"logsumexp", "log"}))
    if logarithm is None or not same_shape(value_of(source), value):
        return None
    written_out = spelled(logarithm) == "log"
    if written_out and operation_behind(first(logarithm), SUM) is None:
        return None
    log = reduced(other, "logsumexp", dims, axes)
    again = None if log is None else repeated(source, inner, first(log.node), log.node, writes)
    if written_out:
        reason = "the logarithm that is taken from its scores is not known to be their logsumexp"
    elif log is None:
        reason = f"its logsumexp is changed by {shown(other)}"
    elif again is None:
        reason = "its logsumexp is that of something else"
    elif not _tracked_alike(node, other):
        reason = "its logsumexp has no gradient"
    elif _divides(log.dims, dims, dims[log.dim], axes):
        return Softmax(node, source, inner, node, dims, log.dim, (*again, *log.nodes, inner, node))
    else:
        reason = "its logsumexp is not that of the rows that it is taken from"
    return Missed(reason, other) if leads_to_product(source) and leads_to_product(node, forward=True) else None


def _divisions(node: Node) -> Iterator[tuple[Node, Node, tuple[Node, ...]]]:
    """The (numerator, divisor, nodes from the divisor to the result) of n / d, n * (1 / d), n * d.reciprocal(), n * d ** -1."""
    one, other = first(node), argument(node, 1, "other")
    if not isinstance(one, Node) or not isinstance(other, Node):
        return
    if spelled(node) == "div" and node.kwargs.get("rounding_mode") is None:
        yield one, other, (node,)
    for factor, inverse in ((one, other), (other, one)) if spelled(node) == "mul" else ():
        passed = [node]
        # torch.export writes `1 / d` as d.reciprocal() * 1.
        while spelled(inverse) == "mul" and argument(inverse, 1, "other") == 1 and isinstance(first(inverse), Node):
            passed.append(inverse)
            inverse = first(inverse)
        name, source, second = spelled(inverse), first(inverse), argument(inverse, 1, "other", "exponent")
        if name == "reciprocal" or (name == "pow" and not isinstance(second, Node) and second == -1):
            divisor = source
        elif name == "div" and not isinstance(source, Node) and source == 1:
            divisor = second
        else:
            continue
        if isinstance(divisor, Node):
            yield factor, divisor, (inverse, *reversed(passed))


def _divided(
    node: Node, numerator: Node, divisor: Node, around: tuple[Node, ...], writes: Writes, axes: Axes
) -> Softmax | Missed | None:
    """The softmax in which `node` divides exponentials, or their product with the values, by their sum."""
    total_of = operation_behind(divisor, SUM)
    exponential = None if total_of is None else operation_behind(first(total_of), EXPONENTIALS, total_of, writes)
    if exponential is None or not leads_to_product(exponential):
        return None

    def near(reason: str, where: Node) -> Missed | None:
        between = leads_to_product(node, forward=True) or leads_to_product(numerator)
        return Missed(reason, where) if between else None

    dims = axes.fresh(value_of(exponential).shape)
    total = reduced(divisor, "sum", dims, axes)
    if total is None:
        return near(f"the sum of its exponentials is changed by {shown(divisor)} before it divides", divisor)
    given = exponentials(first(total.node), total.node, dims, axes, writes)
    if isinstance(given, Missed):
        return near(given.reason, given.node)
    weights, again = alike(numerator, node, given, writes, through=frozenset({"to"}))
    behind = None
    if weights is None:
        behind, again = multiplied(numerator, given, writes)
    if weights is None and behind is None:
        return near("the sum of its exponentials divides something else", node)
    nodes = (*given.nodes, *again, *total.nodes, *around)
    if not all(_tracked_alike(given.exponential, each) for each in (*given.nodes, *total.nodes, *around[:-1])):
        return near("the sum of its exponentials has no gradient", total.node)
    written = changed_in_place(node)
    if written is not None and any(writes.position[user] > writes.position[node] for user in written.users):
        return near(f"its weights are written into by {shown(node)}", node)
    source, steps = first(given.exponential), given.steps
    softmax = Softmax(node, source, given.exponential, node, dims, total.dim, nodes, None, steps)
    if behind is not None:
        return replace(softmax, weights=behind, divisor=total.dims)
    if not same_shape(value_of(node), value_of(exponential)) or not _divides(total.dims, dims, dims[total.dim], axes):
        return near("the sum of its exponentials does not divide the rows that it belongs to", node)
    return softmax


def _tracked_alike(one: Node, other: Node) -> bool:
    """Whether both have a gradient, or none."""
    values = value_of(one), value_of(other)
    return (
        all(isinstance(value, torch.Tensor) for value in values) and values[0].requires_grad == values[1].requires_grad
    )


def _divides(divisor: Dims, dims: Dims, lost: Axis, axes: Axes) -> bool:
    """Whether a divisor has each dimension of `dims`, in its place, without that of `lost`."""
    if len(divisor) > len(dims):
        return False
    known = axes.resolved(((),) * (len(dims) - len(divisor)) + divisor)
    wanted = tuple(() if axis == axes.atoms(lost) else axis for axis in axes.resolved(dims))
    return known == wanted
