"""Lists of the blocks of 128 x 128 scores that a mask leaves, for kernels that skip the others (flex, FlashAttention 4).

Everything stays on the device: no shape depends on data and no value is read back. The lists of a mask are built once and
shared by all sites that read the mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..graphs.sizes import Size, is_one
from .calls import AttentionCall
from .ops import opaque

BLOCK = 128  # PyTorch's default block size, and the only one here: the kernels' tiles must divide it


def blocks_in(length: Size) -> Size:
    """How many blocks a length has, the last of which it may cut off."""
    return (length + BLOCK - 1) // BLOCK


def blocks_of(mask: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Of a boolean mask (batch or 1, heads or 1, q_len or 1, kv_len or 1): whether some scores of a block are seen, and whether
    all are. Both (batch or 1, heads or 1, rows of blocks, columns of blocks), bool. A block that a length cuts off is never
    seen whole."""
    rows, columns = blocks_in(call.q_len), blocks_in(call.kv_len)
    whole_rows = is_one(mask.shape[2])  # a mask that is the same for every query is read once
    if is_one(mask.shape[3]):
        mask = mask.expand(*mask.shape[:3], call.kv_len)
    missing: Any = (0, columns * BLOCK - call.kv_len, 0, 0 if whole_rows else rows * BLOCK - call.q_len)
    mask = torch.nn.functional.pad(mask, missing, value=False)
    batch, heads = mask.shape[:2]
    mask = mask.reshape(batch, heads, 1 if whole_rows else rows, 1 if whole_rows else BLOCK, columns, BLOCK)
    some, all_ = mask.any(-1).any(-2), mask.all(-1).all(-2)
    return some.expand(batch, heads, rows, columns), all_.expand(batch, heads, rows, columns)


def listed(some: Tensor, all_: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the blocks that are seen in part: how many there are in each row (..., rows), and the indices of all blocks, these
    first and in order (..., rows, columns). Then the same of those that are seen whole. All int32 and dense."""
    return (*_ordered(some & ~all_), *_ordered(all_))


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    wanted = blocks.to(torch.int32, memory_format=torch.contiguous_format)
    return _dense(wanted.sum(-1, dtype=torch.int32)), _dense(ORDER(wanted))


# The places of each row in the order of the numbers that stand there, the larger first, equal ones as they are. Inductor does
# not look into it: its own sort is a Triton kernel that unrolls every step. flex with key padding was not ready within 60 s
# where that sorts 128 columns ("16,384 tokens of 128, padded" in bench/results/kernels_by_shape_h200.json; torch 2.11), and was
# where there are 56 and fewer, or 257; with this op it is ready there (kernels_by_mask_h200.json).
ORDER = opaque(
    "block_order",
    "(Tensor wanted) -> Tensor",
    lambda wanted: torch.argsort(wanted, dim=-1, descending=True, stable=True).to(torch.int32),
    lambda wanted: torch.empty_like(wanted, dtype=torch.int32),
)


def _dense(tensor: Tensor) -> Tensor:
    """The same tensor with explicit dense strides.

    Inductor gives a dimension of size 1 any stride, but its Triton template for flex steps from batch to batch by the stride of
    the heads, and the lists of a key padding have one head: the template then reads outside of the lists (illegal memory
    access with several batches, torch 2.11).
    """
    strides: list[Any] = [1]
    for size in reversed(tensor.shape[1:]):
        strides.insert(0, strides[0] * size)
    return tensor.contiguous().as_strided(tuple(tensor.shape), tuple(strides))
