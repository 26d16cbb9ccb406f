"""Turns SDPA's tensors of any rank, (..., heads, length, dim) or (batch, length, dim), into the rank 4 that kernels take."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..graphs.sizes import Size, is_one


def lead_sizes(*tensors: Tensor) -> tuple[Size, ...]:
    """The sizes before (heads, length, dim), or before (length, dim) where there is one head, broadcast as SDPA does."""
    return tuple(torch.broadcast_shapes(*(tensor.shape[: -3 if tensor.dim() > 3 else -2] for tensor in tensors)))


def rank4(tensor: Tensor, lead: tuple[Size, ...], heads: Size) -> Tensor:
    """Query, key or value as (batch, heads, length, dim), expanded to the leading sizes and heads of the call."""
    if tensor.dim() <= 3:
        tensor = tensor.unsqueeze(-3)
    return tensor.expand(*lead, heads, *tensor.shape[-2:]).reshape(math.prod(lead), heads, *tensor.shape[-2:])


def output_rank4(output: Tensor, heads: int) -> Tensor:
    """An output of SDPA's form as (batch, heads, q_len, value_dim)."""
    return rank4(output, tuple(output.shape[: -3 if output.dim() > 3 else -2]), heads)


def mask_rank4(mask: Tensor, lead: tuple[Size, ...], rank: int) -> Tensor:
    """A mask with four dimensions, each of which may be of size 1, from a mask that broadcasts to scores of `rank`.

    lead: the leading sizes of the call (`lead_sizes`).
    """
    mask = mask[(None,) * (rank - mask.dim())]
    if rank == 2:
        return mask[None, None]
    if rank == 3:
        return mask.unsqueeze(1)
    if rank == 4:
        return mask
    if all(map(is_one, mask.shape[:-3])):
        return mask.reshape(1, *mask.shape[-3:])
    return mask.expand(*lead, *mask.shape[-3:]).reshape(math.prod(lead), *mask.shape[-3:])
