"""Where a kernel's output lies in memory otherwise than SDPA's did, and somebody would notice."""

from __future__ import annotations

import torch
from torch.fx import Node

from .sizes import known

# What gives the same result whatever the strides of its input, and whose own output has strides of its own.
_NORMALISES = frozenset(
    {"reshape", "flatten", "contiguous", "clone", "linear", "matmul", "bmm", "baddbmm", "addmm", "cat", "stack",
     "conv1d", "conv2d", "conv3d", "layer_norm", "scaled_dot_product_attention", "einsum", "sum", "mean"}
)  # fmt: skip
# What reads strides, or fails on some.
_READS = frozenset({"view", "as_strided", "stride", "is_contiguous", "view_as_complex", "view_as_real", "output"})


def same_strides(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both lie alike in memory, as far as is known without a guard. Sizes of 1 have no stride that counts."""
    return all(
        known(size == 1) or known(a == b) for size, a, b in zip(other.shape, one.stride(), other.stride(), strict=True)
    )


def strides_matter(node: Node) -> bool:
    """Whether anything behind `node` reads the strides of its value: a `view`, or whoever receives the graph's output."""
    seen: set[Node] = set()
    waiting = list(node.users)
    while waiting:
        user = waiting.pop()
        if user in seen:
            continue
        seen.add(user)
        name = str(user.target) if user.op in ("call_method", "output") else getattr(user.target, "__name__", "")
        name = name.split(".")[0]
        if name in _READS or user.op == "call_module" or isinstance(user.target, torch._ops.HigherOrderOperator):
            return True
        if name not in _NORMALISES:
            waiting.extend(user.users)
    return False


def restrided(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A copy of `tensor` whose dimensions lie in memory in the order of those of `like`."""
    hints = [stride if isinstance(stride, int) else stride.node.hint for stride in like.stride()]
    order = sorted(range(like.dim()), key=lambda dim: -hints[dim])
    back = [order.index(dim) for dim in range(like.dim())]
    return tensor.permute(order).contiguous().permute(back)
