"""`products`: the FLOPs of the matrix products and convolutions in a graph of operators, counted from shapes.

The formulas of PyTorch's flop counter (`torch.utils.flop_counter`) stand at operators below autograd. A graph that ranks share
is above it, with `linear`, `matmul` and SDPA whole: these have their formulas here, and the rest is looked up there, where a
library may have registered its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils.flop_counter import flop_registry

from ..graphs.nodes import value_of
from ..graphs.operators import is_higher_order, is_opaque, is_operator, qualified_name
from ..graphs.sizes import Size
from ..graphs.trees import leaves
from ..kernels.logsumexp import WITH_LOGSUMEXP
from .rows import ATTENTION, Call


@dataclass(frozen=True)
class Products:
    """The FLOPs of one call of a graph. A product of two numbers and its sum are two."""

    flops: dict[str, int]  # of the products whose result has a dtype, as {"bfloat16": 12 * 10**12}
    uncounted: tuple[str, ...] = ()  # operators that have no formula, though they may hold products

    @property
    def total(self) -> int:
        return sum(self.flops.values())


def products(graph: Graph) -> Products | None:
    """Counts a graph of aten operators. None where a size is symbolic.

    Elements that a mask hides count. Of causal attention count the pairs of a query and a key that it sees.
    """
    flops: dict[str, int] = {}
    uncounted: dict[str, None] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        formula = _formula(node)
        if formula is None:
            if name := _may_multiply(node.target):
                uncounted[name] = None
            continue
        if not _is_fixed(node):
            return None
        result = next(each for each in leaves(value_of(node)) if isinstance(each, torch.Tensor))
        dtype = str(result.dtype).removeprefix("torch.")
        flops[dtype] = flops.get(dtype, 0) + int(formula(Call(node)))
    return Products(flops, tuple(uncounted))


Formula = Callable[[Call], int]


def _formula(node: Node) -> Formula | None:
    target = node.target
    if target is WITH_LOGSUMEXP:
        return _attention
    if not is_operator(target):
        return None
    call = Call(node)
    if call.name == "einsum" and len(call.tensors) > 2:
        return None
    if call.name in FORMULAS:
        return FORMULAS[call.name]
    return _registered if target.overloadpacket in flop_registry else None


# Operators of aten that multiply, and whose number of products depends on more than two shapes.
_OTHERS = frozenset(
    {"bilinear", "chain_matmul", "einsum", "gru", "linalg_multi_dot", "lstm", "rnn_relu", "rnn_tanh", "tensordot"}
)


def _may_multiply(target: Any) -> str:
    """The name of an operator that may hold products, and has no formula; "" for others."""
    if is_higher_order(target):
        return str(target)
    if is_opaque(target):
        return str(getattr(target, "__name__", target))
    space, _, name = qualified_name(target).partition("::")
    if space in ("", "prims", "attnrewrite", "_c10d_functional"):
        return ""
    return f"{space}::{name}" if space != "aten" or name in _OTHERS else ""


def _is_fixed(node: Node) -> bool:
    values = [value_of(each) for each in (*node.all_input_nodes, node)]
    tensors = [each for each in leaves(values) if isinstance(each, torch.Tensor)]
    return all(isinstance(size, int) for tensor in tensors for size in tensor.shape)


def _elements(shape: Sequence[Size]) -> int:
    return prod(map(int, shape))


def _summed(call: Call) -> int:
    """Each element of the result is a sum over the last dimension of the first factor."""
    return 2 * _elements(call.output_shape) * int(call.shape()[-1])


def _attention(call: Call) -> int:
    query, key, value = (call.shape(position) for position in range(3))
    q_len, kv_len = int(query[-2]), int(key[-2])
    pairs = q_len * kv_len
    if call.number("is_causal") is True:
        seen = min(q_len, kv_len)
        pairs = seen * (seen + 1) // 2 + (q_len - seen) * kv_len
    return 2 * _elements(call.output_shape[:-2]) * pairs * int(query[-1] + value[-1])


def _convolution(call: Call) -> int:
    """Each element of the output is a sum over a kernel of the weight (out, in / groups, ...)."""
    weight = call.shape(1)
    return 2 * _elements(call.output_shape) * _elements(weight[1:])


def _transposed(call: Call) -> int:
    """Each element of the input goes to a kernel of the weight (in, out / groups, ...)."""
    weight = call.shape(1)
    return 2 * _elements(call.shape()) * _elements(weight[1:])


def _einsum(call: Call) -> int:
    """Of two tensors: an element of the result is a sum over the letters that it does not have."""
    given, arrow, result = call.arguments["equation"].replace(" ", "").partition("->")
    if len(call.tensors) < 2:
        return 0  # it moves or adds elements
    sizes: dict[str, int] = {}
    for position, term in enumerate(given.split(",")):
        for letter, size in _letters(term, call, position):
            sizes[letter] = max(size, sizes.get(letter, 1))  # 1 is repeated
    if not arrow:
        result = "".join(letter for letter in sizes if given.count(letter) == 1)
    return 2 * _elements(call.output_shape) * prod(size for letter, size in sizes.items() if letter not in result)


def _letters(term: str, call: Call, position: int) -> Iterator[tuple[str, int]]:
    """The letters of a term, each with its size. Those in the place of an ellipsis all stand in the result."""
    shape: Any = call.shape(position)
    front, _, back = term.partition("...")
    yield from zip(front, shape, strict=False)
    yield from zip(reversed(back), reversed(shape), strict=False)


def _registered(call: Call) -> int:
    node: Any = call.node
    args, kwargs = map_arg(node.args, value_of), map_arg(node.kwargs, value_of)
    return int(flop_registry[node.target.overloadpacket](*args, **kwargs, out_val=call.output))


FORMULAS: dict[str, Formula] = {
    ATTENTION: _attention,
    "linear": _summed,
    "matmul": _summed,
    "inner": _summed,
    "mv": _summed,
    "einsum": _einsum,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed),
}
