"""Finds out whether a graph depends on the strides of SDPA's output, and gives a kernel's output these strides."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from .mutations import storage_of
from .nodes import value_of
from .operators import is_higher_order, is_pytorchs
from .sizes import Size, always
from .spellings import name_of

# Operations that return the same result, with the same strides, for all strides of their input.
_NORMALISES = frozenset(
    {"linear", "matmul", "bmm", "baddbmm", "addmm", "layer_norm", "scaled_dot_product_attention", "sum", "mean"}
)
# Operations that return the same result, but maybe with other strides: they are run again to see.
_FOLLOWS = frozenset(
    {"transpose", "permute", "reshape", "flatten", "unflatten", "contiguous", "clone", "unsqueeze", "squeeze", "cat", "stack",
     "conv1d", "conv2d", "conv3d", "einsum"}
)  # fmt: skip
# Operations that read strides, or fail for some strides.
_READS = frozenset({"view", "as_strided", "stride", "is_contiguous", "view_as_complex", "view_as_real"})


def same_strides(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape are known to have equal strides without a guard. Strides of dimensions of size 1 do
    not count."""
    return all(
        always(size == 1) or always(a == b)
        for size, a, b in zip(other.shape, one.stride(), other.stride(), strict=True)
    )


def strides_matter(node: Node, now: torch.Tensor, written: set[int]) -> bool:
    """Whether code after `node` would notice that the value of `node` has the strides of `now`: a `view`, a write into a tensor
    that was a copy and has become a view, or a receiver of the graph's output.

    now: a fake tensor, the new value of `node`.
    written: the storages that some node writes into (`written_storages`).
    """
    values: dict[Node, torch.Tensor | None] = {node: now}  # values with other strides; None: strides not known
    waiting = list(node.users)
    while waiting:
        user = waiting.pop()
        if user in values:
            continue
        name = name_of(user)
        if name in _READS or user.op in ("call_module", "output") or is_higher_order(user.target):
            return True
        if user.op == "call_function" and not is_pytorchs(user.target):  # it may read the memory as it lies
            return True
        if name in _NORMALISES:
            continue
        before = value_of(user)
        if isinstance(before, torch.Tensor) and storage_of(before) in written:
            return True
        values[user] = again = _run(user, values) if name in _FOLLOWS else None
        if again is None or not same_strides(again, before):
            waiting.extend(user.users)
    return False


def _run(node: Node, values: dict[Node, torch.Tensor | None]) -> torch.Tensor | None:
    """Computes a node's value anew from changed `values` of other nodes; None where one of these is not known."""
    if any(source in values and values[source] is None for source in node.all_input_nodes):
        return None
    args: Any = map_arg(node.args, lambda source: values.get(source, value_of(source)))
    kwargs: Any = map_arg(node.kwargs, lambda source: values.get(source, value_of(source)))
    with torch._C.DisableTorchFunction():  # otherwise the emitter would write this call into the graph
        function: Any = getattr(torch.Tensor, str(node.target)) if node.op == "call_method" else node.target
        result = function(*args, **kwargs)
    return result if isinstance(result, torch.Tensor) else None


def restrided(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A dense copy of `tensor` with the memory order of the dimensions of `like`, a dense tensor."""
    order: list[int] = []
    for dim, stride in enumerate(like.stride()):
        place = len(order)
        while place > 0 and _outside(stride, like.stride(order[place - 1])):
            place -= 1
        order.insert(place, dim)
    back = [order.index(dim) for dim in range(like.dim())]
    return tensor.permute(order).contiguous().permute(back)


def _outside(stride: Size, other: Size) -> bool:
    """Whether the dimension with `stride` is outside of the one with `other` in memory. In a dense tensor the outer stride is a
    multiple of the inner one, also where sizes depend on data."""
    return always(stride > other) or (not always(other >= stride) and always(stride % other == 0))  # type: ignore[operator]
