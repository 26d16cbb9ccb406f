"""FlashAttention 2. https://github.com/Dao-AILab/flash-attention, the package flash-attn, tried with 2.8.3.post2.

Tensors are (batch, length, heads, dim), or packed (tokens, heads, dim); causal is aligned lower-right. Limits as in
`csrc/flash_attn/flash_api.cpp` of that version.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..kernels.calls import MaskKind
from ..kernels.library_kernels import dense_kernel, packed_kernel
from ..kernels.packing import packing, packing_steps
from ..kernels.records import Backend, HeadDim
from ..kernels.sources import Hub, Package

# -- the library's functions


def forward(
    library: Any, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None, left: int, right: int
) -> Any:
    return library.flash_attn_func(query, key, value, 0.0, scale, causal, (left, right), return_attn_probs=True)


def backward(
    library: Any, grad: Tensor, output: Tensor, logsumexp: Tensor, query: Tensor, key: Tensor, value: Tensor,
    causal: bool, scale: float | None, left: int, right: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    grads = tuple(torch.empty_like(tensor) for tensor in (query, key, value))
    library.flash_attn_interface._flash_attn_backward(
        grad, query, key, value, output, logsumexp, *grads, 0.0, _scale(query, scale), causal, left, right, 0.0, None,
        torch.are_deterministic_algorithms_enabled(), None,
    )  # fmt: skip
    return grads


def varlen_forward(
    library: Any, query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
    causal: bool, scale: float | None, left: int, right: int,
) -> Any:  # fmt: skip
    return library.flash_attn_varlen_func(
        query, key, value, cu_q, cu_k, max_q, max_k, 0.0, scale, causal, (left, right), return_attn_probs=True
    )


def varlen_backward(
    library: Any, grad: Tensor, output: Tensor, logsumexp: Tensor, query: Tensor, key: Tensor, value: Tensor,
    cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float | None, left: int, right: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    # The kernel writes no gradient for keys behind the end of the last sequence: it is zero.
    grads = (torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value))
    library.flash_attn_interface._flash_attn_varlen_backward(
        grad, query, key, value, output, logsumexp, *grads, cu_q, cu_k, max_q, max_k, 0.0, _scale(query, scale),
        causal, left, right, 0.0, None, torch.are_deterministic_algorithms_enabled(), None,
    )  # fmt: skip
    return grads


def _scale(query: Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


def as_the_query(query: Tensor, value: Tensor) -> Tensor:
    """The library allocates its output like the query."""
    return torch.empty_like(query)


FLASH = Backend(
    name="flash",
    family="FlashAttention",
    op=dense_kernel("flash_2", forward, backward, windows=True, output=as_the_query),
    summary="FlashAttention 2",
    devices=frozenset({"cuda"}),
    capability=((8, 0), (12, 1)),
    dtypes=frozenset({"float16", "bfloat16"}),
    head_dim=HeadDim(max=256, multiple=8, pad=True),
    masks=frozenset({MaskKind.NONE, MaskKind.CAUSAL_LOWER_RIGHT, MaskKind.SLIDING_WINDOW}),
    max_batch=65_535,
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
    op=packed_kernel("flash_2_varlen", varlen_forward, varlen_backward, windows=True, output=as_the_query),
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
