"""What a rank computes to get its part of a tensor, and what the ranks exchange, as plain PyTorch code.

Every exchange is a functional collective of PyTorch: `_c10d_functional.all_gather_into_tensor`, `all_to_all_single` and
`all_reduce`, each with its `wait_tensor`, which Inductor knows and overlaps with other work.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..graphs.sizes import Size
from .layouts import Ranks, Shard, chunk, divides, total

collectives = torch.ops._c10d_functional


def part_of(tensor: torch.Tensor, shard: Shard, ranks: Ranks) -> torch.Tensor:
    """This rank's part of a tensor that it holds whole. No exchange."""
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


def whole(part: torch.Tensor, shard: Shard, ranks: Ranks) -> torch.Tensor:
    """The whole tensor, of the parts of all ranks: one all-gather."""
    front = part.movedim(shard.dim, 0).contiguous()
    gathered = collectives.wait_tensor.default(
        collectives.all_gather_into_tensor.default(front, ranks.size, ranks.group)
    )
    return in_order(gathered, shard.lengths, ranks.size).movedim(0, shard.dim)


def summed(part: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """The sum of a tensor over the ranks: one all-reduce."""
    result: torch.Tensor = collectives.all_reduce.default(part.contiguous(), "sum", ranks.group)
    return _awaited(result)


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


def by_rank(tensor: torch.Tensor, dim: int, lengths: Sequence[Size], ranks: int) -> torch.Tensor:
    """The inverse of `in_order` along `dim`: the parts of rank 0, of rank 1, and so on."""
    if len(lengths) == 1:
        if divides(ranks, lengths[0]):
            return tensor
        return _padded(tensor, dim, chunk(lengths[0], ranks) * ranks - lengths[0])
    return torch.cat([part_of(tensor, Shard(dim, tuple(lengths)), Ranks(ranks, rank)) for rank in range(ranks)], dim)


def tokens_to_heads(tensors: Sequence[torch.Tensor], ranks: Ranks) -> list[torch.Tensor]:
    """One all-to-all for all of the tensors, (batch, heads, length, dim) each, with one length: a rank gives a part of the
    tokens of all heads, and gets all tokens of a part of the heads, as (batch, heads / ranks, length * ranks, dim) in the
    order of ranks. The results are views of one tensor whose tokens lie in the outermost dimension."""
    packed, widths = [], []
    length = tensors[0].shape[2]
    for tensor in tensors:
        batch, heads, _, dim = tensor.shape
        split = tensor.reshape(batch, ranks.size, heads // ranks.size, length, dim)
        packed.append(split.permute(1, 3, 0, 2, 4).flatten(2))
        widths.append(batch * (heads // ranks.size) * dim)
    joined = torch.cat(packed, 2) if len(packed) > 1 else packed[0]
    received = _all_to_all(joined.contiguous().flatten(0, 1), length, ranks)
    results, start = [], 0
    for tensor, width in zip(tensors, widths, strict=True):
        batch, heads, _, dim = tensor.shape
        mine = received.narrow(1, start, width).unflatten(1, (batch, heads // ranks.size, dim))
        results.append(mine.permute(1, 2, 0, 3))
        start = start + width
    return results


def heads_to_tokens(tensor: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """The way back: (batch, heads / ranks, length * ranks, dim) in the order of ranks to (batch, heads, length, dim)."""
    batch, heads, tokens, dim = tensor.shape
    length = tokens // ranks.size
    received = _all_to_all(tensor.permute(2, 0, 1, 3).contiguous().flatten(1), length, ranks)
    split = received.reshape(ranks.size, length, batch, heads, dim)
    return split.permute(2, 0, 3, 1, 4).reshape(batch, heads * ranks.size, length, dim)


def _all_to_all(tensor: torch.Tensor, rows: Size, ranks: Ranks) -> torch.Tensor:
    """Gives `rows` rows to each rank, and gets as many from each."""
    split = [rows] * ranks.size
    return _awaited(collectives.all_to_all_single.default(tensor, split, split, ranks.group))


def _awaited(result: torch.Tensor) -> torch.Tensor:
    ready: torch.Tensor = collectives.wait_tensor.default(result)
    return ready
