"""Attentions that a graph has a part of: a graph break stands between the product of queries and keys and the softmax, or
between the softmax and the product with the values.

A softmax of an input, or one whose weights are an output, may be much else: the gates of experts, a pooling, a map that the
model returns. So what is said to be cut off has four dimensions or more, as scores of a batch, heads, queries and keys have.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from ..graphs.axes import Axes, Dims
from ..graphs.nodes import value_key, value_of
from ..graphs.spellings import TURNS, first, same_shape, spelled
from .found import Missed
from .products import is_weight, read_product
from .scores import Scores
from .softmaxes import Softmax
from .values import Values

LEAST_RANK = 4  # of scores: the gates of experts and the scores of one head have three
FAR = 40  # most operations between the softmax and an input

_VIEWS = frozenset({"view", "to", "clone", "detach", "expand", *TURNS})
_ON_SCORES = frozenset({"add", "sub", "mul", "div", "masked_fill", "where"})  # scales, biases and masks


def scores_from_elsewhere(softmax: Softmax, values: Values, axes: Axes) -> Missed | None:
    """A near miss, if the scores come into the graph as an input and the weights are multiplied by values as in an attention.

    values: what `find_values` found behind the softmax."""
    weights, source = softmax.dims, softmax.source
    keys, value = set(axes.atoms(weights[-1])), _atoms(values.value_dims, axes)
    if not _over_the_last_of_many(softmax) or not keys or keys != set(axes.atoms(values.summed)):
        return None
    rest = _atoms(weights, axes) - keys
    # Without queries of its own it is a pooling, or the gates of experts; without a batch or heads a mean over a table.
    if not rest & value or not rest - value:
        return None
    # In linear attention a softmax over the features of queries or keys is multiplied too: by a product, or into one.
    computed = is_weight(values.value) or read_product(_behind_views(values.value)) is not None
    if computed or _is_multiplied(values.output) or not _comes_in(source) or not _may_be_broken(softmax.node):
        return None
    reason = "its scores come from outside the graph, as behind a graph break: the product of its queries and keys is not in it"
    return Missed(reason, source)


def weights_leave(softmax: Softmax, scores: Scores, missed: Missed) -> Missed | None:
    """A near miss, if the weights are an output of the graph. missed: what `find_values` found instead."""
    if missed.node.op != "output" or not _over_the_last_of_many(softmax) or not scores.product.batched:
        return None
    if any(map(is_weight, (scores.product.left, scores.product.right))) or not _may_be_broken(softmax.node):
        return None
    reason = "its weights leave the graph, as in front of a graph break: the product with its values is not in it"
    return Missed(reason, softmax.node)


def _may_be_broken(node: Node) -> bool:
    """Whether the graph may be a part of what a model computes: an exported program is all of it."""
    module = node.graph.owning_module
    return module is not None and value_key(module) == "example_value"


def _over_the_last_of_many(softmax: Softmax) -> bool:
    return len(softmax.dims) >= LEAST_RANK and softmax.dim == len(softmax.dims) - 1


def _atoms(dims: Dims, axes: Axes) -> set[object]:
    return {atom for axis in dims for atom in axes.atoms(axis)}


def _behind_views(node: Node) -> Node:
    while spelled(node) in _VIEWS and isinstance(first(node), Node):
        node = first(node)
    return node


def _is_multiplied(node: Node) -> bool:
    """Whether a tensor, or a view or a multiple of it, is an operand of another product than a linear layer."""
    waiting = [node]
    for _ in range(FAR):
        if not waiting:
            return False
        for user in waiting.pop().users:
            product = read_product(user)
            if product is not None and not any(map(is_weight, (product.left, product.right))):
                return True
            if spelled(user) in _VIEWS | {"mul", "div"}:
                waiting.append(user)
    return False


def _comes_in(scores: Node) -> bool:
    """Whether all that has the shape of the scores is an input of the graph, and not a parameter."""
    waiting = [scores]
    inputs: list[Node] = []
    for _ in range(FAR):
        if not waiting:
            return any(not is_weight(each) for each in inputs)
        node = waiting.pop()
        if node.op == "placeholder":
            inputs.append(node)
        elif spelled(node) in _VIEWS and isinstance(first(node), Node):
            waiting.append(first(node))
        elif spelled(node) in _ON_SCORES and (whole := _whole(node)):
            waiting += whole
        else:
            return False
    return False


def _whole(node: Node) -> list[Node]:
    """The floating-point operands that have the shape of the result."""
    return [
        each
        for each in node.all_input_nodes
        if isinstance(value := value_of(each), torch.Tensor)
        and value.is_floating_point()
        and same_shape(value, value_of(node))
    ]
