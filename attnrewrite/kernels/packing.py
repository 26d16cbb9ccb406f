"""Key padding for kernels without a mask argument: the keys and values that take part move to the front.

Variable-length kernels get these keys packed, one sequence after the other (`packing`). Kernels that take the number of keys in
use for each batch element (FlashAttention's `seqused_k`) get these keys in front of the element's other keys (`leading`).

Everything stays on the device: no shape depends on data and no value is read back, so that this works under `fullgraph`, CUDA
graphs and export. The tensors built from a mask are built once and shared by all sites that read the mask.
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
    """How to pack queries and keys."""

    cu_seqlens_q: Tensor  # int32 (batch + 1,): where each sequence begins in the packed queries
    cu_seqlens_k: Tensor  # int32 (batch + 1,): the same for the packed keys
    keys: Tensor | None  # int64 (batch * kv_len,): indices of the keys, those that take part first; None: all in order


@dataclass(frozen=True)
class Leading:
    """How to reorder the keys of each batch element."""

    seqused_k: Tensor  # int32 (batch,): how many keys take part
    keys: Tensor  # int64 (batch * kv_len,): indices of the keys, in each batch element those that take part first


def packing_steps(call: AttentionCall) -> tuple[Step, ...]:
    if call.mask.kind is not MaskKind.KEY_PADDING:
        return ()
    return (Step("pack_keys", "key padding", "packed keys", "a copy of keys and values, and a sort for each mask"),)


def packing(mask: Tensor | None, key: Tensor, call: AttentionCall) -> Packing:
    """The packing for key padding, a boolean mask that is the same for every head and query. Any other call, as with a window
    that the kernel knows by its size, gets all keys in their order.

    Keys that take part come first, wherever they are; the others stay behind the end of the last sequence, where no kernel
    reads.
    """
    batch, q_len, kv_len = (cast(int, size) for size in (call.batch, call.q_len, call.kv_len))
    starts = torch.arange(batch + 1, dtype=torch.int32, device=key.device)
    cu_seqlens_q = starts * q_len
    if mask is None or call.mask.kind is not MaskKind.KEY_PADDING:
        return Packing(cu_seqlens_q, starts * kv_len, None)
    valid = mask.select(1, 0).select(1, 0).expand(batch, kv_len)
    lengths = valid.sum(-1, dtype=torch.int32)
    # Not F.pad: Inductor's code for it on CUDA gives [length, length] for one sequence of 8,193 to 16,384 keys (2.11).
    cu_seqlens_k = torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)])
    order = torch.argsort(valid.reshape(-1).to(torch.uint8), stable=True, descending=True)
    return Packing(cu_seqlens_q, cu_seqlens_k, order)


def pack(query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> tuple[Tensor, Tensor, Tensor]:
    """Packs query, key and value: (batch, length, heads, dim) to (tokens, heads, dim)."""
    query, key, value = (tensor.flatten(0, 1) for tensor in (query, key, value))
    if packing.keys is not None:
        key, value = key.index_select(0, packing.keys), value.index_select(0, packing.keys)
    return query, key, value


def unpack(output: Tensor, call: AttentionCall) -> Tensor:
    """Unpacks the output: (tokens, heads, dim) to (batch, length, heads, dim). Packing drops no query."""
    unpacked: Tensor = output.unflatten(0, (cast(int, call.batch), cast(int, call.q_len)))
    return unpacked


def leading(mask: Tensor | None, key: Tensor, call: AttentionCall) -> Leading | None:
    """The order of keys for key padding, a boolean mask that is the same for every head and query; None for any other call."""
    if mask is None or call.mask.kind is not MaskKind.KEY_PADDING:
        return None
    batch, kv_len = (cast(int, size) for size in (call.batch, call.kv_len))
    valid = mask.select(1, 0).select(1, 0).expand(batch, kv_len)
    order = torch.argsort(valid.to(torch.uint8), dim=-1, stable=True, descending=True)
    rows = torch.arange(batch, device=key.device)[:, None] * kv_len
    return Leading(valid.sum(-1, dtype=torch.int32), (order + rows).reshape(-1))


def lead(tensor: Tensor, leading: Leading | None) -> Tensor:
    """Keys or values, (batch, length, heads, dim), with those that take part first."""
    if leading is None:
        return tensor
    moved: Tensor = tensor.flatten(0, 1).index_select(0, leading.keys).unflatten(0, tensor.shape[:2])
    return moved
