"""AITER's FlashAttention 2 for AMD GPUs, from the kernels hub. https://github.com/ROCm/aiter. No AMD GPU was at hand: run with
a stand-in of the same signature."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..kernels import ops
from ..kernels.calls import AttentionCall, MaskKind
from ..kernels.records import Backend, HeadDim
from ..kernels.sources import Hub


def forward(library: Any, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> Tensor:
    result = library.flash_attn_func(query, key, value, dropout_p=0.0, softmax_scale=scale, causal=causal)
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output.contiguous()  # its strides are not known


def fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return ops.dense_output(query, value)


AITER = ops.register(
    "aiter",
    "(Tensor query, Tensor key, Tensor value, bool causal, float? scale) -> Tensor",
    forward,
    fake,
    flops=ops.products,
)


def aiter(query: Tensor, key: Tensor, value: Tensor, _: None, *, call: AttentionCall, origin: ops.Origin) -> Tensor:
    output: Tensor = AITER(query, key, value, call.mask.is_causal, call.scale, needs_grad=False, origin=origin)
    return output


AITER_FA2_HUB = Backend(
    name="aiter_fa2_hub",
    family="AITER",
    op=aiter,
    summary="AITER's FlashAttention 2 for AMD GPUs",
    devices=frozenset({"rocm"}),
    dtypes=frozenset({"bfloat16"}),
    head_dim=HeadDim(max=256, multiple=8, pad=True),
    masks=frozenset({MaskKind.NONE, MaskKind.CAUSAL_LOWER_RIGHT}),
    gqa=True,
    layout="bshd",
    tested="stand-in",
    source=Hub("kernels-community/aiter-flash-attn-ck", version=1),
    requires={"kernels": ">=0.17"},
)

RECORDS = (AITER_FA2_HUB,)
