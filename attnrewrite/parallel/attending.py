"""`Attentions`: what a rank writes into its graph in the place of an SDPA that the ranks exchange tensors for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from ..graphs.emitting import Emitter
from ..graphs.mutations import storage_of
from ..graphs.nodes import value_of
from ..graphs.operators import as_given
from ..graphs.sizes import Size, always, is_one
from ..kernels.logsumexp import WITH_LOGSUMEXP
from . import plans
from .exchanges import heads_to_tokens, tokens_to_heads, whole
from .layouts import Ranks
from .orders import by_rank, in_own_order, own_part
from .rings import Keys, revived, ring
from .rows import Call
from .steps import Attention


class Attentions:
    """Writes the attentions of one graph.

    names: of the sites.
    writes: the number of writes into each storage so far; it grows as the graph is written.
    """

    def __init__(self, emitter: Emitter, ranks: Ranks, names: Mapping[Node, str], writes: Counter[int | None]) -> None:
        self.emitter = emitter
        self.ranks = ranks
        self.names = names
        self.writes = writes

    def write(
        self, call: Call, how: Attention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any
    ) -> torch.Tensor:
        """The output of this rank's queries. how: with an exchange of `plans.EXCHANGED`. The tensors: as a rank has them."""
        exchange = {plans.ALL_TO_ALL: self._all_to_all, plans.KEYS_GATHERED: self._gathered}.get(
            how.exchange, self._ring
        )
        return exchange(call, how, query, key, value, mask)

    def _gathered(
        self, call: Call, how: Attention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any
    ) -> torch.Tensor:
        """Each rank has a part of the queries, and gathers keys and values: together, if their shapes allow it."""
        shard = how.key
        assert shard is not None
        if key.shape[:-1] == value.shape[:-1]:
            both = whole(torch.cat([key, value], -1), shard, self.ranks, for_parts=True)
            key, value = both.narrow(-1, 0, key.shape[-1]), both.narrow(-1, key.shape[-1], value.shape[-1])
        else:
            key, value = (whole(each, shard, self.ranks, for_parts=True) for each in (key, value))
        return self._run(call, query, key, value, mask)

    def _ring(
        self, call: Call, how: Attention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any
    ) -> torch.Tensor:
        """The keys and values of all ranks come by. A rank has its own queries, or with `together` neighbours their queries,
        of a part of the heads."""
        assert how.query is not None
        assert how.key is not None
        dtype, lead, together = call.output.dtype, query.shape[:-3], how.together
        keys = Keys(how.key, self.ranks.size, together)
        # Autocast, which casts the arguments of SDPA, does not know the op.
        query, key, value = (_four(each).to(dtype) for each in (query, key, value))
        heads = query.shape[1]
        if together > 1:
            group = self.ranks.together(together)
            query, key, value = _all_to_heads(query, key, value, group)
            mask = mask if mask is None else self._of_group(mask, how, call)

        def mask_of(owner: int) -> tuple[torch.Tensor, torch.Tensor]:
            wide = mask if mask.dtype == torch.bool else mask.to(dtype)
            return revived(wide[(None,) * (4 - wide.dim())], keys, owner)

        def shared_mask_of(owner: int) -> Any:
            if mask is None:
                return None
            key = ("ring", *self._state(mask, call), dtype, owner, str(how.key), together)
            return self.emitter.once(key, lambda: mask_of(owner))

        def attend(key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, causal: bool) -> Any:
            scale, site = call.number("scale"), self.names.get(call.node, "attention")
            args = (query, key, value, mask, causal, scale, site)
            return self.emitter.replay(call.node, WITH_LOGSUMEXP, args, {})

        across = self.ranks.across(together)
        result = ring(key, value, keys, across, attend, shared_mask_of, how.causal).to(dtype)
        if together > 1:
            result = heads_to_tokens(result, heads, self.ranks.together(together))
        return _unfolded(result, lead)

    def _of_group(self, mask: torch.Tensor, how: Attention, call: Call) -> torch.Tensor:
        """The mask of the queries of all neighbours, for this rank's part of the heads; built once for all attentions that read
        it."""
        group, shard = self.ranks.together(how.together), how.query
        assert shard is not None

        def build() -> torch.Tensor:
            result = mask
            if mask.dim() > 2 and not is_one(mask.shape[-3]):
                heads = mask.shape[-3] // group.size
                result = result.narrow(-3, group.rank * heads, heads)
            if mask.dim() > 1 and not is_one(mask.shape[-2]):
                rows = shard.along(mask.dim() - 2)
                result = torch.cat(
                    [own_part(result, rows, replace(self.ranks, rank=each)) for each in group.numbers], -2
                )
            return result

        key = ("group", *self._state(mask, call), str(shard), how.together)
        return self.emitter.once(key, build)  # type: ignore[no-any-return]

    def _all_to_all(
        self, call: Call, how: Attention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any
    ) -> torch.Tensor:
        assert how.query is not None
        assert how.key is not None
        leads = [each.shape[:-3] for each in (query, key, value)]  # in which keys may broadcast
        query, key, value = (_four(each) for each in (query, key, value))
        heads = query.shape[1]
        query, key, value = _all_to_heads(query, key, value, self.ranks)
        if how.ordered:
            query = in_own_order(query, how.query, self.ranks.size)
            key, value = (in_own_order(each, how.key, self.ranks.size) for each in (key, value))
        elif mask is not None:
            mask = self._as_exchanged(mask, how, call)
        query, key, value = (_unfolded(each, lead) for each, lead in zip((query, key, value), leads, strict=True))
        attended = self._run(call, query, key, value, mask)
        result = _four(attended)
        if how.ordered:
            result = by_rank(result, 2, how.query.lengths, self.ranks.size)
        result = heads_to_tokens(result, heads, self.ranks)
        return _unfolded(result, attended.shape[:-3])

    def _as_exchanged(self, mask: torch.Tensor, how: Attention, call: Call) -> torch.Tensor:
        """The mask with its queries and keys in the order of ranks, built once for all attentions that read it."""
        assert how.query is not None
        assert how.key is not None
        query, key = how.query.lengths, how.key.lengths

        def build() -> torch.Tensor:
            result = mask
            if mask.dim() > 1 and not is_one(mask.shape[-2]):
                result = by_rank(result, result.dim() - 2, query, self.ranks.size)
            if not is_one(mask.shape[-1]):
                result = by_rank(result, result.dim() - 1, key, self.ranks.size)
            return result

        return self.emitter.once(("exchanged", *self._state(mask, call), str(query), str(key)), build)  # type: ignore[no-any-return]

    def _state(self, mask: torch.Tensor, call: Call) -> tuple[int, int]:
        """Another one after each write into the mask of a call."""
        return id(mask), self.writes[storage_of(value_of(call.tensors[3]))]

    def _run(self, call: Call, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any) -> torch.Tensor:
        arguments = dict(call.arguments) | {"query": query, "key": key, "value": value, "attn_mask": mask}
        args, kwargs = as_given(call.node, arguments)
        target: Callable[..., Any] = call.node.target  # type: ignore[assignment]
        result: torch.Tensor = self.emitter.replay(call.node, target, args, kwargs)
        return result


def _all_to_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ranks: Ranks
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`tokens_to_heads` of all three, together where their sizes allow it."""
    if always(query.shape[2] == key.shape[2]) and always(query.shape[0] == key.shape[0]):
        query, key, value = tokens_to_heads((query, key, value), ranks)
    else:
        (query,) = tokens_to_heads((query,), ranks)
        key, value = tokens_to_heads((key, value), ranks)
    return query, key, value


def _four(tensor: torch.Tensor) -> torch.Tensor:
    """(batch, heads, length, dim) of a tensor of any rank from 3 on."""
    if tensor.dim() == 3:
        return tensor.unsqueeze(0)
    return tensor if tensor.dim() == 4 else tensor.flatten(0, -4)


def _unfolded(tensor: torch.Tensor, lead: Sequence[Size]) -> torch.Tensor:
    """The reverse of `_four`. lead: the sizes of all dimensions before the heads."""
    if len(lead) == 1:
        return tensor
    return tensor.unflatten(0, lead) if lead else tensor.squeeze(0)
