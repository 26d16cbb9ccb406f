"""PyTorch's own variable-length kernel (FlashAttention 2 inside PyTorch), for key padding: no package is needed.

`torch.ops.aten._flash_attention_forward`, which `torch.nn.attention.varlen` calls too (torch 2.10 on); its limits are those of
`_native_flash`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.calls import AttentionCall, MaskKind
from ..kernels.library_kernels import window_size
from ..kernels.packing import Packing, pack, packing, packing_steps, unpack
from .native import FLASH_CUDA


def varlen(query: Tensor, key: Tensor, value: Tensor, packed: Packing, *, call: AttentionCall) -> Tensor:
    query, key, value = pack(query, key, value, packed)
    if call.needs_grad and packed.keys is not None:
        # For keys behind the end of the last sequence, the backward leaves their gradients uninitialised (2.11); the
        # backward of where() sets these gradients to zero.
        read = (torch.arange(key.shape[0], device=key.device) < packed.cu_seqlens_k[-1])[:, None, None]
        zero = torch.zeros((), dtype=key.dtype, device=key.device)
        key, value = torch.where(read, key, zero), torch.where(read, value, zero)
    left, right = window_size(call)
    output: Tensor = torch.ops.aten._flash_attention_forward.default(
        query, key, value, packed.cu_seqlens_q, packed.cu_seqlens_k, call.q_len, call.kv_len,
        0.0, call.mask.is_causal, False, scale=call.scale, window_size_left=left, window_size_right=right,
    )[0]  # fmt: skip
    return unpack(output, call)


NATIVE_VARLEN = replace(
    FLASH_CUDA,
    name="_native_varlen",
    op=varlen,
    summary="FlashAttention 2 inside PyTorch on packed keys, for key padding and windows",
    masks=FLASH_CUDA.masks | {MaskKind.KEY_PADDING, MaskKind.SLIDING_WINDOW},
    always_differentiable=False,  # not tried
    dropout=False,  # the kernel has it; it was not tried
    layout="bshd",
    prepare=packing,
    steps=packing_steps,
)

RECORDS = (NATIVE_VARLEN,)
