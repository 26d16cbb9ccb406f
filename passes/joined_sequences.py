"""Finds the parts, as of video and text, of which a graph joins the sequence of a self attention.

cat([video, text], dim=1) -> linear -> unflatten -> norm -> rotary embedding -> transpose  =  query  ->  (32640, 256)

The tokens are followed back from query, key and value through operations that treat each token by itself, to the nearest
concatenation along the tokens. Kernels that are exact for any sequence may use this where it makes them better.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch.fx import Node

from ..graphs.axes import Axes
from ..graphs.nodes import value_of
from ..graphs.sizes import Size, always, is_one
from ..graphs.spellings import argument, first, same_shape, spelled
from ..graphs.trees import leaves
from ..kernels.calls import AttentionCall
from ..masks.moving_rules import items
from .found import Operand, Operands
from .moves import before

Place = tuple[Node, int]  # a tensor and the dimension of its tokens
Parts = tuple[Size, ...]

JOINS = frozenset({"cat", "concat", "concatenate"})
CUTS = frozenset({"chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split"})
# Of their tensors, those with the rank of the result have the result's tokens, if the dimension has the same size.
ROWWISE = frozenset(
    {"linear", "matmul", "addmm", "layer_norm", "native_layer_norm", "rms_norm", "dropout", "to", "clone", "add", "sub", "mul",
     "div", "neg", "pow", "square", "sqrt", "rsqrt", "mean", "exp", "silu", "gelu", "relu", "sigmoid", "tanh", "where",
     "addcmul", "masked_fill", "nan_to_num", "clamp", "expand", "slice", "narrow", "view_as_complex", "view_as_real",
     "scaled_dot_product_attention"}
)  # fmt: skip


class Joins:
    """The joined sequences of one graph."""

    def __init__(self) -> None:
        self._apart: set[Place] = set()  # behind these no concatenation was found

    def of(self, call: AttentionCall, operands: Operands | None) -> Parts:
        """The lengths of the parts of which query, key and value are joined alike, in order; () where the graph does not show
        them."""
        if operands is None or call.role != "self" or not always(call.q_len == call.kv_len):
            return ()
        found: Parts = ()
        for operand in (operands.query, operands.key, operands.value):
            place = _tokens(operand)
            parts = self._parts(place) if place is not None else ()
            same = len(parts) == len(found) and all(
                always(one == other) for one, other in zip(parts, found, strict=True)
            )
            if not parts or (found and not same):
                return ()
            found = parts
        return found

    def _parts(self, start: Place) -> Parts:
        waiting, seen = deque([start]), {start}
        while waiting:
            node, dim = waiting.popleft()
            if spelled(node) in JOINS and dim == _dim(node):
                return tuple(value_of(each).shape[dim] for each in argument(node, 0, "tensors"))
            new = [place for place in _back(node, dim) if place not in seen and place not in self._apart]
            seen.update(new)
            waiting.extend(new)
        self._apart |= seen
        return ()


def _tokens(operand: Operand) -> Place | None:
    """The dimension of an operand's tensor that its views make the tokens, known by its size and stride."""
    given, viewed = value_of(operand.node), operand.value
    if not operand.views:
        return operand.node, given.dim() - 2
    dims = [
        dim
        for dim, (size, stride) in enumerate(zip(given.shape, given.stride(), strict=True))
        if not is_one(size) and always(size == viewed.shape[-2]) and always(stride == viewed.stride(-2))
    ]
    return (operand.node, dims[0]) if len(dims) == 1 else None


def _back(node: Node, dim: int) -> list[Place]:
    """The same tokens in the tensors of which a tensor is computed; [] where the operation does more than it does to each."""
    name, value = spelled(node), value_of(node)
    source: Any = first(node)
    if name is None or not isinstance(value, torch.Tensor) or is_one(value.shape[dim]):
        return []
    if name in JOINS | {"stack"}:
        return _side_by_side(node, name, dim)
    if name == "getitem" and isinstance(value_of(source), tuple | list):
        return _of_several(source, dim)
    if name == "select":
        removed = argument(node, 1, "dim") % value_of(source).dim()
        return [(source, dim + (dim >= removed))]
    if isinstance(source, Node) and isinstance(value_of(source), torch.Tensor):
        axes = Axes()
        dims = axes.fresh(value.shape)
        if (old := before(node, dims, axes)) is not None:
            mine = axes.atoms(dims[dim])
            return [(source, place) for place, axis in enumerate(axes.resolved(old)) if axis == mine]
        if name == "getitem":
            return _indexed(source, node.args[1], dim, value.shape[dim])
    return _rowwise(node, dim) if name in ROWWISE else []


def _rowwise(node: Node, dim: int) -> list[Place]:
    value, name = value_of(node), spelled(node)
    rank = value.dim() + {"view_as_complex": 1, "view_as_real": -1}.get(str(name), 0)
    found = []
    for each in node.all_input_nodes:
        given = value_of(each)
        if isinstance(given, torch.Tensor) and given.dim() == rank and dim < rank:
            found += [each] if always(given.shape[dim] == value.shape[dim]) else []
    # A table that broadcasts, as of a rotary embedding, has tokens of its own.
    full = [each for each in found if same_shape(value_of(each), value)]
    return [(each, dim) for each in (full or found)]


def _side_by_side(node: Node, name: str, dim: int) -> list[Place]:
    tensors = argument(node, 0, "tensors")
    if name == "stack":
        new = argument(node, 1, "dim", default=0) % value_of(node).dim()
        return [] if dim == new else [(each, dim - (dim > new)) for each in tensors]
    return [(each, dim) for each in tensors]


def _of_several(call: Node, dim: int) -> list[Place]:
    """One of the results of chunk, split, unbind or a norm."""
    source, name = first(call), spelled(call)
    if not isinstance(source, Node) or not isinstance(value_of(source), torch.Tensor):
        return []
    rank = value_of(source).dim()
    if name == "unbind":
        removed = argument(call, 1, "dim", default=0) % rank
        return [(source, dim + (dim >= removed))]
    if name in CUTS:
        along = argument(call, 2, "dim", default=0)
        return [] if along % rank == dim else [(source, dim)]
    return [(source, dim)] if name == "native_layer_norm" else []


def _indexed(source: Node, index: Any, dim: int, size: Size) -> list[Place]:
    """source[index], where no index is a tensor: slices that keep all tokens."""
    shape = value_of(source).shape
    entries = items(index, len(shape))
    if entries is None or any(isinstance(value_of(each), torch.Tensor) for each in leaves(entries)):
        return []
    of_source, of_result = 0, 0
    for entry in entries:
        if (entry is None or isinstance(entry, slice)) and of_result == dim:
            return [(source, of_source)] if entry is not None and always(shape[of_source] == size) else []
        of_result += entry is None or isinstance(entry, slice)
        of_source += entry is not None
    return []


def _dim(node: Node) -> int:
    dim, rank = int(argument(node, 1, "dim", "axis", default=0)), int(value_of(node).dim())
    return dim % rank
