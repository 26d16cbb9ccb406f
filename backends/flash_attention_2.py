"""FlashAttention 2. https://github.com/Dao-AILab/flash-attention, the package flash-attn, tried with 2.8.3.post2.

Tensors are (batch, length, heads, dim), or packed (tokens, heads, dim); causal is aligned lower-right. Limits as in
`csrc/flash_attn/flash_api.cpp` of that version.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..kernels import ops
from ..kernels.calls import AttentionCall, MaskKind
from ..kernels.records import Backend, HeadDim
from ..kernels.sources import Hub, Package
from .packing import Packing, pack, packing, packing_steps, unpack

# -- the library's functions


def forward(library: Any, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> Any:
    return library.flash_attn_func(query, key, value, 0.0, scale, causal, return_attn_probs=True)[:2]


def backward(
    library: Any, grad: Tensor, output: Tensor, logsumexp: Tensor, query: Tensor, key: Tensor, value: Tensor,
    causal: bool, scale: float | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    grads = tuple(torch.empty_like(tensor) for tensor in (query, key, value))
    library.flash_attn_interface._flash_attn_backward(
        grad, query, key, value, output, logsumexp, *grads, 0.0, _scale(query, scale), causal, -1, -1, 0.0, None,
        torch.are_deterministic_algorithms_enabled(), None,
    )  # fmt: skip
    return grads


def varlen_forward(
    library: Any, query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
    causal: bool, scale: float | None,
) -> Any:  # fmt: skip
    return library.flash_attn_varlen_func(
        query, key, value, cu_q, cu_k, max_q, max_k, 0.0, scale, causal, return_attn_probs=True
    )[:2]


def varlen_backward(
    library: Any, grad: Tensor, output: Tensor, logsumexp: Tensor, query: Tensor, key: Tensor, value: Tensor,
    cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    # Keys behind the last sequence's end get no gradient from the kernel: theirs is zero.
    grads = (torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value))
    library.flash_attn_interface._flash_attn_varlen_backward(
        grad, query, key, value, output, logsumexp, *grads, cu_q, cu_k, max_q, max_k, 0.0, _scale(query, scale),
        causal, -1, -1, 0.0, None, torch.are_deterministic_algorithms_enabled(), None,
    )  # fmt: skip
    return grads


def _scale(query: Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


def fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), ops.logsumexp_of(query, True)  # the library allocates it like the query


FLASH_2 = ops.register(
    "flash_2",
    "(Tensor query, Tensor key, Tensor value, bool causal, float? scale) -> (Tensor, Tensor)",
    forward,
    fake,
    flops=ops.products,
    backward=backward,
    backward_flops=ops.backward_products,
)
FLASH_2_VARLEN = ops.register(
    "flash_2_varlen",
    "(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, bool causal, float? scale) -> (Tensor, Tensor)",
    varlen_forward,
    fake,
    flops=ops.packed_products,
    backward=varlen_backward,
    backward_flops=ops.packed_backward_products,
)

# -- what lands in the graph


def flash(query: Tensor, key: Tensor, value: Tensor, _: None, *, call: AttentionCall, origin: ops.Origin) -> Tensor:
    output: Tensor = FLASH_2(
        query, key, value, call.mask.is_causal, call.scale, needs_grad=call.needs_grad, origin=origin
    )[0]
    return output


def flash_varlen(
    query: Tensor, key: Tensor, value: Tensor, packed: Packing, *, call: AttentionCall, origin: ops.Origin
) -> Tensor:
    output: Tensor = FLASH_2_VARLEN(
        *pack(query, key, value, packed), packed.cu_seqlens_q, packed.cu_seqlens_k, call.q_len, call.kv_len,
        call.mask.is_causal, call.scale, needs_grad=call.needs_grad, origin=origin,
    )[0]  # fmt: skip
    return unpack(output, call)


FLASH = Backend(
    name="flash",
    family="FlashAttention",
    op=flash,
    summary="FlashAttention 2",
    devices=frozenset({"cuda"}),
    capability=((8, 0), (12, 1)),
    dtypes=frozenset({"float16", "bfloat16"}),
    head_dim=HeadDim(max=256, multiple=8, pad=True),
    masks=frozenset({MaskKind.NONE, MaskKind.CAUSAL_LOWER_RIGHT}),
    gqa=True,
    backward=True,
    layout="bshd",
    tested="sm_90",
    source=Package("flash-attn", "flash_attn"),
    requires={"flash-attn": ">=2.7"},
)
FLASH_VARLEN = replace(
    FLASH,
    name="flash_varlen",
    op=flash_varlen,
    summary="FlashAttention 2 on packed keys, for key padding",
    masks=FLASH.masks | {MaskKind.KEY_PADDING},
    prepare=packing,
    steps=packing_steps,
)
HUB = Hub("kernels-community/flash-attn2", version=3)
FLASH_HUB, FLASH_VARLEN_HUB = (
    replace(record, name=f"{record.name}_hub", tested="sm_90, as a package", source=HUB, requires={"kernels": ">=0.17"})
    for record in (FLASH, FLASH_VARLEN)
)

RECORDS = (FLASH, FLASH_HUB, FLASH_VARLEN, FLASH_VARLEN_HUB)
