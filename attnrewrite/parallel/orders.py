"""The elements of a tensor in the order of the whole and in the order of ranks, as plain PyTorch code. No exchange."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..graphs.sizes import Size
from .layouts import Ranks, Shard, chunk, divides, total


def own_part(tensor: torch.Tensor, shard: Shard, ranks: Ranks) -> torch.Tensor:
    """A rank's part of a tensor that it holds whole."""
    pieces: list[torch.Tensor] = []
    start: Size = 0
    for length in shard.lengths:
        pieces.append(_chunk_of(tensor, shard.dim, start, length, ranks.size, ranks.rank))
        start = start + length
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, shard.dim)


def _chunk_of(tensor: torch.Tensor, dim: int, start: Size, length: Size, ranks: int, rank: int) -> torch.Tensor:
    """One rank's chunk of the segment that begins at `start`, with copies of its last element behind its end."""
    size = chunk(length, ranks)
    if divides(ranks, length):
        return tensor.narrow(dim, start + rank * size, size)
    if not isinstance(length, int) or not isinstance(size, int):
        segment = _padded(tensor.narrow(dim, start, length), dim, size * ranks - length)
        return segment.narrow(dim, rank * size, size)
    held = min(max(length - rank * size, 0), size)
    if held == 0:
        last = tensor.narrow(dim, start + length - 1, 1)
        return last.expand(*tensor.shape[:dim], size, *tensor.shape[dim + 1 :])
    return _padded(tensor.narrow(dim, start + rank * size, held), dim, size - held)


def _padded(tensor: torch.Tensor, dim: int, more: Size) -> torch.Tensor:
    """The tensor with `more` copies of its last element along `dim`."""
    if isinstance(more, int) and more == 0:
        return tensor
    last = tensor.narrow(dim, tensor.shape[dim] - 1, 1)
    return torch.cat([tensor, last.expand(*tensor.shape[:dim], more, *tensor.shape[dim + 1 :])], dim)


def in_order(tensor: torch.Tensor, lengths: Sequence[Size], ranks: int) -> torch.Tensor:
    """Sorts dimension 0 from the order of ranks (part of rank 0, part of rank 1, ...) into the order of the whole tensor, and
    drops the copies behind the ends."""
    chunks = [chunk(length, ranks) for length in lengths]
    if len(lengths) == 1:
        return _cut(tensor, lengths[0], ranks)
    by_rank = tensor.unflatten(0, (ranks, total(chunks)))
    pieces: list[torch.Tensor] = []
    start: Size = 0
    for length, size in zip(lengths, chunks, strict=True):
        piece = by_rank.narrow(1, start, size).flatten(0, 1)
        pieces.append(_cut(piece, length, ranks))
        start = start + size
    return torch.cat(pieces)


def _cut(tensor: torch.Tensor, length: Size, ranks: int) -> torch.Tensor:
    """The first `length` elements of the chunks of a segment. A symbolic length gets its own symbol back."""
    return tensor if isinstance(length, int) and divides(ranks, length) else tensor.narrow(0, 0, length)


def held_of(shard: Shard, ranks: int, rank: int) -> list[tuple[Size, Size, Size]]:
    """The elements of the whole that a rank holds, without copies: for each segment of which it holds some, where they begin in
    the rank's part, where they begin in the whole, and how many they are. Lengths that the ranks do not divide are numbers."""
    found: list[tuple[Size, Size, Size]] = []
    here: Size = 0
    start: Size = 0
    for length in shard.lengths:
        size = chunk(length, ranks)
        count = size
        if not divides(ranks, length):
            assert isinstance(length, int)
            assert isinstance(size, int)
            count = min(max(length - rank * size, 0), size)
        if not isinstance(count, int) or count > 0:
            found.append((here, start + rank * size, count))
        here, start = here + size, start + length
    return found


def by_rank(tensor: torch.Tensor, dim: int, lengths: Sequence[Size], ranks: int) -> torch.Tensor:
    """The inverse of `in_order` along `dim`: the parts of rank 0, of rank 1, and so on."""
    if len(lengths) == 1:
        if divides(ranks, lengths[0]):
            return tensor
        return _padded(tensor, dim, chunk(lengths[0], ranks) * ranks - lengths[0])
    return torch.cat([own_part(tensor, Shard(dim, tuple(lengths)), Ranks(ranks, rank)) for rank in range(ranks)], dim)


def in_own_order(tensor: torch.Tensor, shard: Shard, ranks: int) -> torch.Tensor:
    """`in_order` along the tokens of a query, key or value, (batch, heads, length, dim)."""
    if len(shard.lengths) == 1 and not shard.is_padded(ranks):
        return tensor
    return in_order(tensor.movedim(2, 0), shard.lengths, ranks).movedim(0, 2)


def lying_as(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The tensor with its dimensions in the order in which those of `other` lie in memory, where both are dense: a view of the
    whole, or code behind the graph, may ask for it, and random numbers are drawn in this order."""
    order = _order(other)
    if order is None or order == _order(tensor):
        return tensor
    back = sorted(range(len(order)), key=lambda place: order[place])
    return tensor.permute(order).contiguous().permute(back)


def _order(tensor: torch.Tensor) -> list[int] | None:
    """The dimensions from the outermost to the innermost; None for a tensor with gaps or overlaps. A symbolic size counts by
    its hint: the order is no more than a preference."""
    sizes, strides = ([_hint(each) for each in numbers] for numbers in (tensor.shape, tensor.stride()))
    order = sorted(range(len(sizes)), key=lambda dim: (-strides[dim], sizes[dim] == 1, dim))
    inside = 1
    for dim in reversed(order):
        if sizes[dim] != 1 and strides[dim] != inside:
            return None
        inside *= sizes[dim]
    return [dim for dim in order if sizes[dim] != 1] + [dim for dim in order if sizes[dim] == 1]


def _hint(size: Size) -> int:
    return size if isinstance(size, int) else int(size.node.hint)
