"""Key padding for kernels without a mask argument: keys and values that take part are put in front.

Variable-length kernels get them packed, one sequence behind the other (`packing`); kernels that take how many keys of
each batch element are in use (FlashAttention's `seqused_k`) get those in front of its others (`leading`).

Everything stays on the device: no shape depends on data and nothing is read back, so that it holds under `fullgraph`, CUDA
graphs and export. What is made of a mask is made once and shared by all sites that read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from .calls import AttentionCall, MaskKind
from .decisions import Step


@dataclass(frozen=True)
class Packing:
    """Where sequences begin in the packed queries and keys (int32, batch + 1), and which keys to take in which order."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    keys: Tensor | None  # int64, batch * kv_len: those that take part first; None: all, as they lie


@dataclass(frozen=True)
class Leading:
    """How many keys take part (int32, (batch,)), and all keys in the order that has those in front (int64, batch * kv_len)."""

    seqused_k: Tensor
    keys: Tensor


def packing_steps(call: AttentionCall) -> tuple[Step, ...]:
    if call.mask.kind is not MaskKind.KEY_PADDING:
        return ()
    return (Step("pack_keys", "key padding", "packed keys", "a copy of keys and values, and a sort for each mask"),)


def packing(mask: Tensor | None, key: Tensor, call: AttentionCall) -> Packing:
    """Of no mask, or of a boolean one that is the same for every head and query.

    Keys that take part, wherever they lie, come first; the others stay behind the last sequence's end, where no kernel
    reads.
    """
    batch, q_len, kv_len = (cast(int, size) for size in (call.batch, call.q_len, call.kv_len))
    starts = torch.arange(batch + 1, dtype=torch.int32, device=key.device)
    cu_seqlens_q = starts * q_len
    if mask is None:
        return Packing(cu_seqlens_q, starts * kv_len, None)
    valid = mask.select(1, 0).select(1, 0).expand(batch, kv_len)
    lengths = valid.sum(-1, dtype=torch.int32)
    # Not F.pad: for one sequence of 8,193 to 16,384 keys Inductor gives [length, length] for it on CUDA (2.11).
    cu_seqlens_k = torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)])
    order = torch.argsort(valid.reshape(-1).to(torch.uint8), stable=True, descending=True)
    return Packing(cu_seqlens_q, cu_seqlens_k, order)


def pack(query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> tuple[Tensor, Tensor, Tensor]:
    """(batch, length, heads, dim) to (tokens, heads, dim)."""
    query, key, value = (tensor.flatten(0, 1) for tensor in (query, key, value))
    if packing.keys is not None:
        key, value = key.index_select(0, packing.keys), value.index_select(0, packing.keys)
    return query, key, value


def unpack(output: Tensor, call: AttentionCall) -> Tensor:
    """(tokens, heads, dim) to (batch, length, heads, dim): every query is there, masked keys or not."""
    unpacked: Tensor = output.unflatten(0, (cast(int, call.batch), cast(int, call.q_len)))
    return unpacked


def leading(mask: Tensor | None, key: Tensor, call: AttentionCall) -> Leading | None:
    """Of a boolean mask that is the same for every head and query; None of no mask."""
    if mask is None:
        return None
    batch, kv_len = (cast(int, size) for size in (call.batch, call.kv_len))
    valid = mask.select(1, 0).select(1, 0).expand(batch, kv_len)
    order = torch.argsort(valid.to(torch.uint8), dim=-1, stable=True, descending=True)
    rows = torch.arange(batch, device=key.device)[:, None] * kv_len
    return Leading(valid.sum(-1, dtype=torch.int32), (order + rows).reshape(-1))


def lead(tensor: Tensor, leading: Leading | None) -> Tensor:
    """Keys or values, (batch, length, heads, dim), those that take part first."""
    if leading is None:
        return tensor
    moved: Tensor = tensor.flatten(0, 1).index_select(0, leading.keys).unflatten(0, tensor.shape[:2])
    return moved
