"""Random tensors for a call: inside a compilation there are no real ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..graphs.sizes import Size, UnbackedSizeError, holds
from ..kernels.calls import SIZES, AttentionCall, Mask, MaskKind
from ..planning.matching import floor
from ..planning.sites import Site
from .capturing import Captured

HIDDEN = 16  # one key of 16 is padding: most prompts are long, and a kernel must not win by the keys that padding hides
DOCUMENTS = 4  # in a mask of documents (`MaskKind.BLOCKS`)


def numbers(call: AttentionCall) -> AttentionCall:
    """Replaces each symbolic size with the power of two at or below it. A guard then limits the compiled code to sizes from
    that power of two to the next. Raises `UnbackedSizeError` for a size that depends on data."""
    sizes: dict[str, Any] = {name: _number(getattr(call, name)) for name in SIZES}
    shape = tuple(_of_mask(size, call, sizes) for size in call.mask.shape)
    return replace(call, site="", role="self", scale=None, mask=replace(call.mask, shape=shape), **sizes)


def _number(size: Size) -> int:
    if isinstance(size, int):
        return size
    if (number := size.node.maybe_as_int()) is not None:
        return int(number)
    if not size.node.has_hint():
        raise UnbackedSizeError(str(size))
    first = floor(int(size.node.hint))
    holds(size >= first)
    holds(size < 2 * first)
    return first


def _of_mask(size: Size, call: AttentionCall, sizes: dict[str, int]) -> int:
    """The number for a symbolic size of the mask: that of the call's size with the same symbol."""
    if isinstance(size, int):
        return size
    for name in ("kv_len", "q_len", "batch", "heads"):
        if str(getattr(call, name)) == str(size):
            return sizes[name]
    return _number(size)


def example(call: AttentionCall, device: torch.device) -> Captured:
    """Makes tensors for a call whose sizes are numbers: normally distributed query, key and value in the call's memory
    layout, and a mask of its kind. The random numbers come from a generator of their own."""
    batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim = (int(getattr(call, name)) for name in SIZES)
    draw = _Draw(device, getattr(torch, call.dtype), call.layout)
    sizes = ((heads, q_len, head_dim), (kv_heads, kv_len, head_dim), (kv_heads, kv_len, value_dim))
    query, key, value = (draw(batch, *size, place=place) for place, size in enumerate(sizes))
    mask, keep, rows = _mask(call, device, draw)
    site = Site(call, (), None)
    return Captured(call, site, query, key, value, mask, keep, rows, heads != kv_heads, None)


class _Draw:
    def __init__(self, device: torch.device, dtype: torch.dtype, layout: str) -> None:
        self._generator = torch.Generator(device).manual_seed(0)
        self._dtype, self._layout, self._device = dtype, layout, device

    def __call__(self, batch: int, heads: int, length: int, dim: int, place: int) -> Tensor:
        """place: 0 for query, 1 for key, 2 for value. In the layout "strided" each is that part of three in its memory, as in
        one projection for all three."""
        if self._layout == "bhsd":
            return self._numbers(batch, heads, length, dim)
        if self._layout == "bshd":
            return self._numbers(batch, length, heads, dim).transpose(1, 2)
        return self._numbers(batch, length, 3, heads, dim)[:, :, place].transpose(1, 2)

    def _numbers(self, *shape: int) -> Tensor:
        made = torch.randn(shape, generator=self._generator, device=self._device, dtype=torch.float32)
        return made.to(self._dtype)

    def like(self, mask: Mask, shape: tuple[int, ...]) -> Tensor:
        made = torch.randn(shape, generator=self._generator, device=self._device, dtype=torch.float32)
        return made.to(getattr(torch, str(mask.dtype)))


def _mask(call: AttentionCall, device: torch.device, draw: _Draw) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The mask as the model would pass it, and the proven tensors (`Captured.mask`, `keep` and `rows`)."""
    mask = call.mask
    if mask.given is None:
        return None, None, None
    shape = _of_rank4([int(size) for size in mask.shape], call)
    if mask.kind is MaskKind.ADDITIVE:
        return draw.like(mask, shape), None, None
    row = torch.arange(int(call.q_len), device=device)[:, None]
    column = torch.arange(int(call.kv_len), device=device)[None, :]
    keys = column < int(call.kv_len) - max(1, int(call.kv_len) // HIDDEN)
    rows = None
    if mask.kind is MaskKind.NONE:
        seen = torch.ones((1, 1), dtype=torch.bool, device=device)
    elif mask.kind is MaskKind.KEY_PADDING:
        seen = keys
    elif mask.kind is MaskKind.QUERY_KEY_PADDING:
        rows = row < int(call.q_len) - max(1, int(call.q_len) // HIDDEN)
        seen = keys & rows
    elif mask.kind is MaskKind.CAUSAL_UPPER_LEFT:
        seen = column <= row
    elif mask.kind is MaskKind.CAUSAL_LOWER_RIGHT:
        seen = column <= row + int(call.kv_len) - int(call.q_len)
    elif mask.kind is MaskKind.CAUSAL_PADDING:
        seen = (column <= row) & keys
    elif mask.kind is MaskKind.SLIDING_WINDOW:
        before, behind = (int(call.kv_len) if size is None else int(size) for size in mask.window or (None, None))
        seen = (column >= row - before) & (column <= row + behind)
    elif mask.kind is MaskKind.BLOCKS:
        wide = max(1, int(call.kv_len) // DOCUMENTS)
        seen = row // wide == column // wide
    else:  # boolean: an arbitrary pattern
        seen = (row * 7 + column * 3) % HIDDEN != 0
    given = seen.expand(_fitting(seen, shape)).contiguous()
    if mask.dtype != "bool":
        bias = torch.zeros(given.shape, dtype=getattr(torch, str(mask.dtype)), device=device)
        given = bias.masked_fill(~given, -10000.0 if mask.no_key == "all keys" else -torch.inf)
    plain = not mask.is_tensor or (mask.kind is MaskKind.BOOLEAN and mask.dtype == "bool")
    keep = None if plain else (keys if rows is not None else seen)
    keep = None if keep is None else keep.expand(shape[0] if len(shape) == 4 else 1, 1, *keep.shape).contiguous()
    return given, keep, None if rows is None else rows[None, None]


def _of_rank4(shape: list[int], call: AttentionCall) -> tuple[int, ...]:
    """The mask's shape for tensors of rank 4. The mask of a rank-3 call has no dimension for the one head; that of a call of
    rank 5 or more has several batch dimensions."""
    if len(shape) > 4:
        shape = [1, *shape[-3:]]
    if len(shape) == 3 and shape[0] not in (1, call.heads):
        shape = [shape[0], 1, *shape[1:]]
    return tuple(shape)


def _fitting(seen: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The mask's shape; a last dimension of size 1 gets the pattern's size."""
    last = tuple(max(a, b) for a, b in zip(seen.shape, shape[-2:], strict=False)) if len(shape) > 1 else seen.shape
    return (*shape[:-2], *last)
