"""What one call of a graph becomes on a rank: `Step`, and the rules for calls along the dimension that is shared.

A rule takes a call and the placement of one of its tensors, and returns None where it does not apply: the tensors are gathered
then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch

from ..graphs.nodes import value_of
from ..graphs.sizes import Size, always
from .layouts import Placement, Shard, chunk, divides, same_lengths, total
from .rows import ANY, CUTS, JOINS, VIEWS, Call, atoms_of

Placements = Sequence[Placement]
FAR = 2**62  # the end of `x[a:]` in a graph is the largest number of 64 bits


@dataclass(frozen=True)
class Attention:
    """What the ranks do at one SDPA."""

    exchange: str  # of plans.py
    reason: str = ""
    query: Shard | None = None  # along the tokens
    key: Shard | None = None
    ordered: bool = True  # behind the all-to-all, the tokens are brought into their own order
    causal: bool = False
    together: int = 1  # the number of neighbours that share the heads beside a ring


@dataclass(frozen=True)
class Step:
    """How a rank runs one call."""

    inputs: tuple[Any, ...]  # the placement of each tensor, or ANY
    output: Any = None  # the placement of the result; a tuple of them for several results
    changed: Mapping[str, Any] = field(default_factory=dict)  # arguments that differ on a rank
    summed: str = ""  # "sum" or "mean": the result is one over the rank's part, and is added up over the ranks
    then: Placement = None  # every rank has the whole result, and goes on with this part
    attention: Attention | None = None

    @property
    def differs(self) -> bool:
        """Whether each rank computes something else, so that a gradient of a tensor that all of them read is one summand on
        each rank."""
        outputs = self.output if isinstance(self.output, tuple) else (self.output,)
        return bool(self.summed) or any(each is not None for each in outputs)


def by_row(call: Call, position: int, shard: Shard) -> Step | None:
    """The call treats each element along the shared dimension by itself."""
    for row in call.rows:
        if row.inputs[position] == shard.dim:
            inputs = tuple(
                dim if dim is None or dim == ANY else (shard if at == position else shard.along(dim))
                for at, dim in enumerate(row.inputs)
            )
            return Step(inputs, _for_each(call, shard.along(row.output)))
    return None


def _for_each(call: Call, placement: Placement) -> Any:
    return placement if isinstance(call.output, torch.Tensor) else (placement,) * len(call.output)


def joined(call: Call, placements: Placements, shard: Shard) -> Step | None:
    """cat along the shared dimension: each rank joins its own parts."""
    if call.name not in JOINS or shard.dim != call.dim():
        return None
    dim = shard.dim
    parts = []
    for position, placement in enumerate(placements):
        if call.rank(position) != call.rank() or always(call.shape(position)[dim] == 0):
            return None
        own = placement is not None and placement.dim == dim
        parts.append(placement if own else Shard(dim, (call.shape(position)[dim],)))
    lengths = tuple(length for part in parts if part is not None for length in part.lengths)
    return Step(tuple(parts), Shard(dim, lengths))


def cut(call: Call, shard: Shard, ranks: int) -> Step | None:
    """slice, narrow and split_with_sizes along the shared dimension, where the cuts are the ends of segments."""
    if call.name not in CUTS or call.dim() != shard.dim:
        return None
    ends: list[Size] = [0, *accumulate(shard.lengths, lambda a, b: a + b)]
    local: list[Size] = [0, *accumulate((chunk(length, ranks) for length in shard.lengths), lambda a, b: a + b)]

    def at(place: Any) -> int | None:
        return next((i for i, end in enumerate(ends) if always(place == end)), None)

    if call.name == "slice":
        start, end = (_from_zero(call.number(name), shard.total) for name in ("start", "end"))
        start, end = 0 if start is None else start, shard.total if end is None else end
        to_the_end = (isinstance(end, int) and end >= FAR) or always(end >= shard.total)
        first, last = at(start), len(ends) - 1 if to_the_end else at(end)
        if first is None or last is None or last <= first or call.number("step") != 1:
            return None
        changed = {"start": local[first], "end": local[last]}
        return Step((shard,), Shard(shard.dim, shard.lengths[first:last]), changed)
    if call.name == "narrow":
        start, length = _from_zero(call.number("start"), shard.total), call.number("length")
        first, last = at(start), at(start + length)
        if first is None or last is None or last <= first:
            return None
        changed = {"start": local[first], "length": local[last] - local[first]}
        return Step((shard,), Shard(shard.dim, shard.lengths[first:last]), changed)
    if call.name == "split_with_sizes":
        sizes = [value_of(size) for size in call.arguments["split_sizes"]]
        places = [at(total(sizes[:number])) for number in range(len(sizes) + 1)]
        if any(place is None for place in places):
            return None
        pairs = [(a, b) for a, b in pairwise(places) if a is not None and b is not None]
        if any(a >= b for a, b in pairs):
            return None
        parts = tuple(Shard(shard.dim, shard.lengths[a:b]) for a, b in pairs)
        return Step((shard,), parts, {"split_sizes": [local[b] - local[a] for a, b in pairs]})
    return None


def _from_zero(place: Any, size: Size) -> Any:
    return place + size if isinstance(place, int) and place < 0 else place


def regrouped(call: Call, shard: Shard, ranks: int) -> Step | None:
    """A view that merges the shared dimension with dimensions inside it, or splits it: the outermost part stays shared, where
    each rank has the same number of whole rows."""
    if call.name not in VIEWS or len(shard.lengths) != 1 or not divides(ranks, shard.total):
        return None
    before, after, _ = atoms_of(call)
    mine = before[shard.dim] if before else ()
    for out, axis in enumerate(after):
        size = call.output_shape[out]
        if mine and axis[: len(mine)] == mine:
            return Step((shard,), Shard(out, (size,)))
        if axis and mine[: len(axis)] == axis and divides(ranks, size):
            return Step((shard,), Shard(out, (size,)))
    return None


def reduced(call: Call, shard: Shard, ranks: int) -> Step | None:
    """sum and mean over the shared dimension: each rank reduces its part, and the ranks add the results."""
    over = call.name in ("sum", "mean") and shard.dim in call.dims() and isinstance(call.output, torch.Tensor)
    if not over or shard.is_padded(ranks) or call.output.dtype == torch.bool:
        return None
    return Step((shard,), None, summed=call.name)


def whole(call: Call, then: Placement = None, attention: Attention | None = None) -> Step:
    """Every rank gathers the arguments and computes the whole result."""
    return Step((None,) * len(call.tensors), _for_each(call, None), then=then, attention=attention)


def equal(one: Shard, other: Shard) -> bool:
    return one.dim == other.dim and same_lengths(one.lengths, other.lengths)
