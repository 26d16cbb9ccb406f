"""Ring attention: each rank keeps its queries, and the keys and values of all ranks come by, one rank's after another.

Liu, Zaharia and Abbeel, "Ring Attention with Blockwise Transformers" (2023). Each step is an attention to the keys of one rank
that returns its log-sum-exp too; steps are put together as in the online softmax, in float32. A transfer is under way while the
step before it is computed. What is written is the unrolled ring, plain operators and collectives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..graphs.sizes import Size, always, is_one
from ..kernels.ops import zero_unless
from . import collectives
from .layouts import Ranks, Shard, total
from .orders import held_of

Part = tuple[Tensor, Tensor]  # an output (batch, heads, q_len, value_dim), and its log-sum-exp (batch, heads, q_len)
Attend = Callable[[Tensor, Tensor, Tensor | None, bool], Part]


class Keys(NamedTuple):
    """How keys are spread over a ring: each of its ranks has those of `together` neighbours, one behind the other."""

    shard: Shard  # over all ranks, along the tokens
    ranks: int
    together: int = 1

    def held(self, owner: int) -> list[tuple[Size, Size, Size]]:
        """`held_of` of one rank of the ring."""
        length = self.shard.local(self.ranks)
        found: list[tuple[Size, Size, Size]] = []
        for place in range(self.together):
            spans = held_of(self.shard, self.ranks, owner * self.together + place)
            found += [(here + place * length, start, count) for here, start, count in spans]
        return found


def ring(
    key: Tensor,
    value: Tensor,
    keys: Keys,
    ranks: Ranks,
    attend: Attend,
    mask_of: Callable[[int], tuple[Tensor, Tensor] | None],
    causal: bool,
) -> Tensor:
    """The output of a rank's queries, (batch, heads, q_len, value_dim) in the dtype of the log-sum-exp.

    key, value: this rank's part, (batch, kv_heads, length, dim).
    keys: how they are spread over the ranks of the ring.
    attend(key, value, mask, is_causal): attends to them.
    mask_of(rank): the mask of the keys of a rank of the ring, as `revived` returns it; None for no mask.
    causal: queries are spread as keys are, in one segment; a query sees the keys up to its own.
    """
    result: Sum | None = None
    packed = _packed(key, value)
    for step in range(ranks.size):
        owner = (ranks.rank - step) % ranks.size
        begun = collectives.begun_to_next(packed, ranks) if step < ranks.size - 1 else None
        own = causal and step == 0  # copies of the last key are behind all queries that are none themselves
        held = [] if causal and owner > ranks.rank else keys.held(owner)
        if own or held:
            seen, values = (each if own else _cut(each, held) for each in (key, value))
            masked = None if own else mask_of(owner)
            result = added(result, _attended(attend, seen, values, masked, own))
        if begun is not None:
            packed = collectives.arrived(begun)  # and goes on as it came
            key, value = _unpacked(packed, key, value)
    assert result is not None  # some rank holds a key
    return averaged(result)


def _attended(attend: Attend, key: Tensor, value: Tensor, masked: tuple[Tensor, Tensor] | None, causal: bool) -> Part:
    mask, alive = masked or (None, None)
    output, logsumexp = attend(key, value, mask, causal)
    if alive is not None:
        logsumexp = torch.where(alive.squeeze(-1), logsumexp, float("-inf"))
    return output.to(logsumexp.dtype), logsumexp


class Sum(NamedTuple):
    """Parts, each times exp(log-sum-exp - largest), and the sum of these weights. A log-sum-exp of the sum itself would be
    lost beside a mask of -3e38."""

    outputs: Tensor
    weights: Tensor
    largest: Tensor  # of the log-sum-exps


def added(before: Sum | None, part: Part) -> Sum:
    output, logsumexp = part
    if before is None:
        return Sum(output, (logsumexp > float("-inf")).to(logsumexp.dtype), logsumexp)
    largest = torch.maximum(before.largest, logsumexp)
    base = torch.where(largest == float("-inf"), 0.0, largest)
    old, new = (before.largest - base).exp(), (logsumexp - base).exp()
    outputs = before.outputs * old.unsqueeze(-1) + output * new.unsqueeze(-1)
    return Sum(outputs, before.weights * old + new, largest)


def averaged(parts: Sum) -> Tensor:
    """Zero where no part sees a key."""
    weights = parts.weights.unsqueeze(-1)
    return zero_unless(weights > 0, parts.outputs / weights)


def revived(mask: Tensor, keys: Keys, owner: int) -> tuple[Tensor, Tensor]:
    """The mask of the keys of one rank of the ring, in which a row that sees none of them sees all, and whether each row sees
    one: a kernel may give any number for a row without a key.

    mask: of rank 4, boolean or added to the scores, for the queries here and all keys in their own order.
    """
    if not is_one(mask.shape[-1]):
        pieces = [mask.narrow(-1, start, count) for _, start, count in keys.held(owner)]
        mask = pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)
    if mask.dtype == torch.bool:
        alive = mask.any(-1, keepdim=True)
        return mask | ~alive, alive
    alive = (mask != float("-inf")).any(-1, keepdim=True)
    return zero_unless(alive, mask), alive


def _cut(tensor: Tensor, held: list[tuple[Size, Size, Size]]) -> Tensor:
    """The keys or values without copies behind the end of a segment."""
    if always(total([count for _, _, count in held]) == tensor.shape[2]):
        return tensor
    pieces = [tensor.narrow(2, here, count) for here, _, count in held]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)


def _packed(key: Tensor, value: Tensor) -> Tensor:
    """Both in one piece of memory, in the order in which projections write them: by tokens, then heads."""
    return torch.cat([each.transpose(1, 2).flatten() for each in (key, value)])


def _unpacked(packed: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value of another rank, of the same sizes."""
    first = key.numel()
    keys, values = packed.narrow(0, 0, first), packed.narrow(0, first, value.numel())
    return _shaped(keys, key), _shaped(values, value)


def _shaped(flat: Tensor, like: Tensor) -> Tensor:
    batch, heads, length, dim = like.shape
    return flat.view(batch, length, heads, dim).transpose(1, 2)
