"""AITER's FlashAttention 2 for AMD GPUs, from the kernels hub. https://github.com/ROCm/aiter. No AMD GPU was at hand: tested
with a stand-in of the same signature."""

from typing import Any

from torch import Tensor

from ..kernels.calls import MaskKind
from ..kernels.library_kernels import dense_kernel
from ..kernels.records import Backend, HeadDim
from ..kernels.sources import Hub


def forward(library: Any, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> Any:
    return library.flash_attn_func(query, key, value, dropout_p=0.0, softmax_scale=scale, causal=causal)


AITER_FA2_HUB = Backend(
    name="aiter_fa2_hub",
    family="AITER",
    op=dense_kernel("aiter", forward),
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
