"""How a rank gets its part of a tensor, and the whole of a tensor of which each rank has a part.

Where autograd is on and the tensor needs a gradient, the exchange is an op that has one (collectives.py); elsewhere it is the
collective itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..graphs.sizes import Size
from . import collectives
from .layouts import Ranks, Shard
from .orders import in_order, own_part

# Bytes from which query, key and value are exchanged one by one. On two H200 an all-to-all takes 0.05 ms and 1.7 us a MiB: a
# large tensor gains more by going while the next one is computed, and by being written where it is sent from, than two more
# calls cost.
LARGE = 64 * 2**20


def part_of(tensor: torch.Tensor, shard: Shard, ranks: Ranks) -> torch.Tensor:
    """This rank's part of a tensor that it holds whole. No exchange; one all-gather in the backward."""
    if not needs_gradient(tensor):
        return own_part(tensor, shard, ranks)
    part: torch.Tensor = collectives.part_op(tensor, shard.dim, list(shard.lengths), *_as_given(ranks))
    return part


def whole(part: torch.Tensor, shard: Shard, ranks: Ranks, for_parts: bool = False) -> torch.Tensor:
    """The whole tensor, of the parts of all ranks: one all-gather.

    for_parts: whether each rank uses it for its own part, so that the gradients of the ranks are added up, by one
    reduce-scatter in the backward. Otherwise all ranks do the same with it: nothing is exchanged in the backward.
    """
    front = part.movedim(shard.dim, 0).contiguous()
    if needs_gradient(part):
        op = collectives.gathered_for_parts_op if for_parts else collectives.gathered_op
        gathered = op(front, *_as_given(ranks))
    else:
        gathered = collectives.gathered(front, ranks)
    return in_order(gathered, shard.lengths, ranks.size).movedim(0, shard.dim)


def used_for_parts(tensor: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """A tensor that is whole on every rank, as each rank uses it for its own part: one all-reduce in the backward. Without a
    gradient the tensor itself."""
    if not needs_gradient(tensor):
        return tensor
    result: torch.Tensor = collectives.used_for_parts_op(tensor, *_as_given(ranks))
    return result


def all_used_for_parts(tensors: Sequence[torch.Tensor], ranks: Ranks) -> list[torch.Tensor]:
    """`used_for_parts` of tensors that need a gradient and have one dtype and device: one exchange for all of them."""
    results: list[torch.Tensor] = collectives.all_used_for_parts_op(list(tensors), *_as_given(ranks))
    return results


def summed(part: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """The sum of a tensor over the ranks, which all ranks use alike: one all-reduce, and nothing in the backward."""
    if not needs_gradient(part):
        return collectives.summed(part, ranks)
    result: torch.Tensor = collectives.summed_op(part, *_as_given(ranks))
    return result


def needs_gradient(tensor: torch.Tensor) -> bool:
    """Whether what is computed of a tensor here needs a gradient."""
    return tensor.requires_grad and torch.is_grad_enabled()


def _as_given(ranks: Ranks) -> tuple[int, int, str]:
    return ranks.size, ranks.rank, ranks.group


def tokens_to_heads(tensors: Sequence[torch.Tensor], ranks: Ranks) -> list[torch.Tensor]:
    """Gives a part of the tokens of all heads, and gets all tokens of a part of the heads.

    tensors: (batch, heads, length, dim) each, with one length.

    Returns (batch, heads / ranks, length * ranks, dim) of each, in the order of ranks: views in which tokens are the outermost
    dimension. One all-to-all for all tensors; one for each where they are `LARGE`.
    """
    length = tensors[0].shape[2]
    packed = [_by_receiver(tensor, ranks) for tensor in tensors]
    if all(_is_large(tensor) for tensor in tensors):
        # The last, the value, goes first: no norm and no rotation stands in front of it.
        received = _all_to_all([each.flatten(0, 1) for each in reversed(packed)], length, ranks)[::-1]
    else:
        joined = torch.cat(packed, 2) if len(packed) > 1 else packed[0]
        (together,) = _all_to_all([joined.flatten(0, 1)], length, ranks)
        received = list(together.split([each.shape[2] for each in packed], 1))
    results = []
    for tensor, mine in zip(tensors, received, strict=True):
        batch, heads, _, dim = tensor.shape
        results.append(mine.unflatten(1, (batch, heads // ranks.size, dim)).permute(1, 2, 0, 3))
    return results


def _by_receiver(tensor: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """(ranks, length, batch * heads / ranks * dim): what each rank gets of (batch, heads, length, dim)."""
    batch, heads, length, dim = tensor.shape
    split = tensor.reshape(batch, ranks.size, heads // ranks.size, length, dim)
    return split.permute(1, 3, 0, 2, 4).flatten(2)


def _is_large(tensor: torch.Tensor) -> bool:
    """Whether it is worth an exchange of its own. A size that is not known at compile time is not asked for: the answer would
    be a guard."""
    elements = tensor.numel()
    return isinstance(elements, int) and elements * tensor.element_size() >= LARGE


def heads_to_tokens(tensor: torch.Tensor, all_heads: Size, ranks: Ranks) -> torch.Tensor:
    """The way back: (batch, heads / ranks, length * ranks, dim) in the order of ranks to (batch, heads, length, dim).

    all_heads: the number of all heads. Of a symbolic number, `heads // ranks * ranks` is not known to be the same.
    """
    batch, heads, tokens, dim = tensor.shape
    length = tokens // ranks.size
    (received,) = _all_to_all([tensor.permute(2, 0, 1, 3).flatten(1)], length, ranks)
    split = received.reshape(ranks.size, length, batch, heads, dim)
    return split.permute(2, 0, 3, 1, 4).reshape(batch, all_heads, length, dim)


def _all_to_all(tensors: Sequence[torch.Tensor], rows: Size, ranks: Ranks) -> list[torch.Tensor]:
    """Gives `rows` rows of each tensor to each rank, and gets as many from each; in the backward too. All exchanges begin
    before the first is waited for."""
    dense = [tensor.contiguous() for tensor in tensors]
    if any(needs_gradient(tensor) for tensor in dense):
        return [collectives.exchanged_op(tensor, rows, *_as_given(ranks)) for tensor in dense]
    return collectives.all_exchanged(dense, rows, ranks)
