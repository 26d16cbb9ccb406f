"""How the ranks share one SDPA."""

from __future__ import annotations

import torch

from ..graphs.nodes import value_of
from ..graphs.sizes import always, described, is_one
from . import plans
from .exchanges import needs_gradient
from .layouts import Placement, Shard, divides, same_lengths
from .rows import Call
from .steps import Attention, Placements, Step, whole


def shared_attention(call: Call, placements: Placements, ranks: int, kind: str) -> Step:
    """The step for an SDPA whose tensors have these placements. kind: of `ContextParallel`."""
    query = placements[0]
    rank = call.rank()
    if query is None or query.dim == rank - 1 or len({call.rank(position) for position in range(3)}) != 1:
        return _whole(call, None, "its queries are not shared")
    if obstacle := _obstacle(call):
        return _whole(call, query, obstacle)
    if query.dim == rank - 2:
        return _tokens(call, placements, query, ranks, kind)
    return _batch(call, query)


def _obstacle(call: Call) -> str:
    if not isinstance(call.number("dropout_p"), int | float) or call.number("dropout_p") != 0:
        return "it has dropout, whose random numbers are drawn for the whole tensor"
    if not isinstance(call.number("is_causal"), bool) or not isinstance(call.number("enable_gqa"), bool):
        return "its is_causal or enable_gqa is computed in the graph"
    return ""


def _whole(call: Call, query: Placement, reason: str) -> Step:
    return whole(call, query, Attention(plans.WHOLE, reason))


def _batch(call: Call, query: Shard) -> Step:
    """Each rank has a part of the batch or of the heads: no exchange."""
    sizes = [call.shape(position)[query.dim] for position in range(3)]
    inputs: list[Placement] = [query]
    for size in sizes[1:]:
        if always(size == sizes[0]):
            inputs.append(query)
        elif is_one(size):
            inputs.append(None)
        else:
            return _whole(call, query, f"{sizes[0]} heads of queries and {size} of keys are shared unlike")
    inputs += [_of_mask(call, {query.dim: query}) for _ in call.tensors[3:]]
    return Step(tuple(inputs), query, attention=Attention(plans.BATCH, query=query))


def _of_mask(call: Call, wanted: dict[int, Shard]) -> Placement:
    """The part of the mask that belongs to a part of the scores. wanted: the shared dimension of the scores."""
    shape = call.shape(3)
    for dim, shard in wanted.items():
        at = dim - (call.rank() - len(shape))
        if at >= 0 and not is_one(shape[at]):
            return shard.along(at)
    return None


def _tokens(call: Call, placements: Placements, query: Shard, ranks: int, kind: str) -> Step:
    rank, masked = call.rank(), len(call.tensors) > 3
    causal = call.number("is_causal")
    by_query = [_of_mask(call, {rank - 2: query}) for _ in call.tensors[3:]]
    key = placements[1]  # the value is brought to the placement of the key
    if key is None or key.dim != rank - 2:
        if causal:
            return _whole(call, query, "it is causal, and its keys are not shared")
        inputs = (query, None, None, *by_query)
        return Step(inputs, query, attention=Attention(plans.KEYS_WHOLE, query=query))
    together = _together(call, ranks) if kind == "ulysses+ring" else 1
    if kind in ("ring", "ulysses+ring") and together < ranks:
        if not (reason := _no_ring(call, query, key, ranks)):
            if together == 1:
                ring = Attention(plans.RING, "", query, key, causal=causal)
                return Step((query, key, key, *by_query), query, attention=ring)
            groups = f"{together} of {ranks} ranks divide its heads"
            ring = Attention(plans.GROUPS, groups, query, key, causal=causal, together=together)
            return Step((query, key, key, *[None] * masked), query, attention=ring)
        reason = f"no ring: {reason}"
    else:
        reason = _no_all_to_all(call, ranks) if kind != "gather" else 'kind is "gather"'
    if reason and causal:
        return _whole(call, query, f"it is causal, and {reason}")
    if reason:
        inputs = (query, key, key, *by_query)
        return Step(inputs, query, attention=Attention(plans.KEYS_GATHERED, reason, query, key))
    # Attention does not see the order of tokens; a mask and a padded length do.
    padded = query.is_padded(ranks) or key.is_padded(ranks)
    several = len(query.lengths) > 1 or len(key.lengths) > 1
    ordered = not several or padded or causal
    heads = rank - 3
    of_mask: list[Placement] = []
    if masked:
        size = call.shape(0)[heads]
        of_mask = [_of_mask(call, {heads: Shard(heads, (size,))})]
    how = Attention(plans.ALL_TO_ALL, "", query, key, ordered, causal)
    return Step((query, key, key, *of_mask), query, attention=how)


def _no_ring(call: Call, query: Shard, key: Shard, ranks: int) -> str:
    """Why keys and values cannot come by one rank after another; "" where they can."""
    masks = [value_of(node) for node in call.tensors[3:]]
    queries, keys, values = (call.shape(position) for position in range(3))
    scale = call.number("scale")
    inputs = [value_of(node) for node in call.node.graph.find_nodes(op="placeholder")]
    if any(isinstance(each, torch.Tensor) and needs_gradient(each) for each in inputs):
        return 'a gradient is needed, which a ring does not have: use kind="ulysses"'
    if call.output.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"it computes in {call.output.dtype}"
    if scale is not None and (not isinstance(scale, int | float) or not scale > 0):
        return "its scale is not above 0" if isinstance(scale, int | float) else "its scale is computed in the graph"
    if len(queries) < 3:
        return "it has no heads"
    if len(queries) > 4 and masks:
        return f"it has a mask, and tensors of {len(queries)} dimensions"
    grouped = len(queries) > 3 and call.number("enable_gqa")
    alike = zip(
        (*queries[: -3 if grouped else -2], *keys[:-2]), (*keys[: -3 if grouped else -2], *values[:-2]), strict=True
    )
    if not all(always(one == other) for one, other in alike):
        return "its tensors broadcast"
    for length in key.lengths:
        if not divides(ranks, length) and not isinstance(length, int):
            return f"{ranks} ranks do not divide its {described(length)} keys, a length that is not fixed"
    if any(mask.dtype != torch.bool for mask in masks) and key.is_padded(ranks):
        return f"it has a mask of numbers, and {ranks} ranks do not divide its keys: the ranks would weigh hidden rows unlike"
    if call.number("is_causal"):
        if masks:
            return "it has a mask too"
        if len(query.lengths) > 1 or not same_lengths(query.lengths, key.lengths):
            return "its queries and keys are no single sequence"
    return ""


def _together(call: Call, ranks: int) -> int:
    """The largest part of the ranks that could share the heads."""
    parts = (number for number in range(ranks, 1, -1) if ranks % number == 0)
    return next((number for number in parts if not _no_all_to_all(call, number)), 1)


def _no_all_to_all(call: Call, ranks: int) -> str:
    """Why the heads cannot be shared; "" where they can."""
    if call.rank() < 3:
        return "it has no heads"
    heads, of_keys, of_values = (call.shape(position)[-3] for position in range(3))
    if not always(of_keys == of_values) or not (call.number("enable_gqa") or always(heads == of_keys)):
        return "its heads broadcast"
    for size, name in ((heads, "heads"), (of_keys, "heads of keys")):
        if not divides(ranks, size):
            return f"{ranks} ranks do not divide its {size} {name}"
    return ""
