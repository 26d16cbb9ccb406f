"""What the ranks exchange, with its gradient.

Each exchange is a functional collective of PyTorch: `_c10d_functional.all_gather_into_tensor`, `all_to_all_single`,
`reduce_scatter_tensor` and `all_reduce`, each with its `wait_tensor`, which Inductor knows and overlaps with other work. They
have no gradient. Where one is needed a graph calls an op of this file instead, which decomposes at the dispatcher's autograd
keys: a compiler that traces a backward sees the same collectives in both directions.

Every rank computes the loss from the same outputs. So where a tensor is whole on every rank and is used by operations that
every rank runs alike, its gradient is whole on every rank too, and is added up nowhere. Where each rank uses a whole tensor for
its own part, each rank has one summand of the gradient, and the summands are added up once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..graphs.sizes import Size
from ..kernels.ops import LIBRARY, NAMESPACE, TAGS
from .layouts import Ranks, Shard
from .orders import in_order, own_part

functional = torch.ops._c10d_functional

# -- without a gradient


def gathered(front: Tensor, ranks: Ranks) -> Tensor:
    """The tensors of all ranks, one behind the other along dimension 0."""
    return _awaited(functional.all_gather_into_tensor.default(front, ranks.size, ranks.group))


def summed(tensor: Tensor, ranks: Ranks) -> Tensor:
    """The sum of a tensor over the ranks."""
    return _awaited(functional.all_reduce.default(tensor.contiguous(), "sum", ranks.group))


def exchanged(tensor: Tensor, rows: Size, ranks: Ranks) -> Tensor:
    """Gives `rows` rows to each rank, and gets as many from each."""
    return all_exchanged([tensor], rows, ranks)[0]


def all_exchanged(tensors: Sequence[Tensor], rows: Size, ranks: Ranks) -> list[Tensor]:
    """`exchanged` of each tensor; all begin before the first is waited for."""
    split = ranks.rows(dict.fromkeys(range(ranks.size), rows))
    begun = [functional.all_to_all_single.default(each, split, split, ranks.group) for each in tensors]
    return [_awaited(each) for each in begun]


def begun_to_next(tensor: Tensor, ranks: Ranks) -> Tensor:
    """Begins to give a tensor to the next rank, and to get as large a one from the rank before; `arrived` waits for it."""
    to, source = (ranks.rank + 1) % ranks.size, (ranks.rank - 1) % ranks.size
    received, sent = ranks.rows({source: 1}), ranks.rows({to: 1})
    begun = functional.all_to_all_single.default(tensor.reshape(1, -1), received, sent, ranks.group)
    result: Tensor = begun
    return result


def arrived(begun: Tensor) -> Tensor:
    """What `begun_to_next` gets, with one dimension."""
    return _awaited(begun).flatten()


def _whole(part: Tensor, shard: Shard, ranks: Ranks) -> Tensor:
    front = part.movedim(shard.dim, 0).contiguous()
    return in_order(gathered(front, ranks), shard.lengths, ranks.size).movedim(0, shard.dim)


def _own_chunk(tensor: Tensor, ranks: Ranks) -> Tensor:
    size = tensor.shape[0] // ranks.size
    return tensor.narrow(0, ranks.rank * size, size)


def _own_sum(tensor: Tensor, ranks: Ranks) -> Tensor:
    return _awaited(functional.reduce_scatter_tensor.default(tensor.contiguous(), "sum", ranks.size, ranks.group))


def _summed_gradient(tensor: Tensor, ranks: Ranks) -> Tensor:
    if tensor.is_complex():  # not every process group adds complex numbers
        return torch.view_as_complex(summed(torch.view_as_real(tensor.resolve_conj()), ranks))
    return summed(tensor, ranks)


def _summed_gradients(tensors: Sequence[Tensor], ranks: Ranks) -> list[Tensor]:
    dense = [each.contiguous() for each in tensors]
    return [_awaited(each) for each in functional.all_reduce_coalesced.default(dense, "sum", ranks.group)]


def _awaited(result: Tensor) -> Tensor:
    ready: Tensor = functional.wait_tensor.default(result)
    return ready


# -- with a gradient


def _differentiable(name: str, takes: str, forward: Callable[..., Tensor], backward: Callable[..., Tensor]) -> Any:
    """Makes `torch.ops.attnrewrite.<name>(tensor, <takes>, ranks, rank, group)`.

    forward, backward: functions of a tensor, of the further arguments and of `Ranks`. backward: of the gradient of the result;
    returns that of the tensor.
    """

    class Exchange(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: Tensor, *more: Any) -> Tensor:
            ctx.more = more
            return forward(tensor, *more)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Any:
            return (backward(grad, *ctx.more), *[None] * len(ctx.more))

    def run(tensor: Tensor, *args: Any) -> Tensor:
        *more, size, rank, group = args
        result: Tensor = Exchange.apply(tensor, *more, Ranks(size, rank, group))  # type: ignore[no-untyped-call]
        return result

    LIBRARY.define(f"{name}(Tensor tensor, {takes}int ranks, int rank, str group) -> Tensor", tags=TAGS)
    LIBRARY.impl(name, run, "CompositeImplicitAutograd")
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _backward_of_part(grad: Tensor, dim: int, lengths: Sequence[Size], ranks: Ranks) -> Tensor:
    return _whole(
        grad, Shard(dim, tuple(lengths)), ranks
    )  # copies behind the end reach no result: their gradient is zero


# Read by operations that every rank runs alike: the gradient is whole, and a rank takes its own chunk of it.
gathered_op = _differentiable("ranks_gathered", "", gathered, _own_chunk)
# Read by each rank for its own part: the gradients are added up, and a rank takes its own chunk of the sum.
gathered_for_parts_op = _differentiable("ranks_gathered_for_parts", "", gathered, _own_sum)
summed_op = _differentiable("ranks_summed", "", summed, lambda grad, ranks: grad)
exchanged_op = _differentiable("ranks_exchanged", "SymInt rows, ", exchanged, exchanged)
# A tensor that is whole on every rank, read by each for its own part.
used_for_parts_op = _differentiable(
    "used_for_parts", "", lambda tensor, ranks: tensor.view_as(tensor), _summed_gradient
)
# A rank's part of a tensor that every rank has whole.
part_op = _differentiable(
    "own_part",
    "int dim, SymInt[] lengths, ",
    lambda tensor, dim, lengths, ranks: own_part(tensor, Shard(dim, tuple(lengths)), ranks),
    _backward_of_part,
)


class _UsedForParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.ranks = ranks
        ctx.set_materialize_grads(False)  # what has no gradient has none on any rank
        return tuple(each.view_as(each) for each in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        found = iter(_summed_gradients([each for each in grads if each is not None], ctx.ranks))
        return (None, *(None if each is None else next(found) for each in grads))


def _all_used_for_parts(tensors: Sequence[Tensor], size: int, rank: int, group: str) -> list[Tensor]:
    return list(_UsedForParts.apply(Ranks(size, rank, group), *tensors))  # type: ignore[no-untyped-call]


# The same for several tensors of one dtype and device, whose gradients are added up together.
LIBRARY.define("all_used_for_parts(Tensor[] tensors, int ranks, int rank, str group) -> Tensor[]", tags=TAGS)
LIBRARY.impl("all_used_for_parts", _all_used_for_parts, "CompositeImplicitAutograd")
all_used_for_parts_op = torch.ops.attnrewrite.all_used_for_parts.default
