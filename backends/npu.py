"""Ascend NPUs: `torch_npu.npu_fusion_attention`, the operator `npu::npu_fusion_attention` that torch-npu registers.

https://github.com/Ascend/op-plugin, docs/context/torch_npu-npu_fusion_attention.md. No NPU was at hand: tested with a stand-in
of the same schema that computes the formula of this document:

    softmax(masked(scale * (pse + query key^T), atten_mask)) value

Differences from SDPA: the bias is scaled with the scores, the mask is True where a key does *not* take part, and the scale is 1
by default. Rows without any key are right with `inner_precise=2` and a mask. The document says nothing about a bias of -inf:
such a bias is clamped to a finite value, and rows of nothing but -inf are set to zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..graphs.sizes import described, holds, is_one
from ..kernels import ops
from ..kernels.calls import AttentionCall, MaskKind
from ..kernels.decisions import Code, Refused
from ..kernels.machines import Machine
from ..kernels.records import Backend, HeadDim
from ..kernels.sources import Package

UPPER_LEFT = 2  # sparse_mode: causal by a compressed mask of 2048 x 2048
COMPRESSED = 2048


@dataclass(frozen=True)
class Prepared:
    mask: Tensor | None = None  # bool, True: masked out; (batch or 1, heads or 1, q_len, kv_len), or compressed
    bias: Tensor | None = None  # finite; (batch or 1, heads, q_len, kv_len)
    alive: Tensor | None = None  # with a bias: bool, True: the row has a key; (batch or 1, q_len or 1, heads or 1, 1)


def prepare(mask: Tensor | None, key: Tensor, call: AttentionCall) -> Prepared:
    if call.mask.is_causal:
        return Prepared(mask=torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool, device=key.device).triu(1))
    if mask is None:
        return Prepared()
    if call.mask.is_boolean:
        # The operator documents no mask with a batch of 1 and several heads.
        batch = mask.shape[0] if is_one(mask.shape[1]) else call.batch
        return Prepared(mask=torch.logical_not(mask).expand(batch, -1, call.q_len, call.kv_len).contiguous())
    alive = (mask > float("-inf")).any(-1, keepdim=True).transpose(1, 2)
    bias = mask.clamp(min=torch.finfo(mask.dtype).min)
    return Prepared(bias=bias.expand(-1, call.heads, call.q_len, call.kv_len).contiguous(), alive=alive)


def fusion_attention(
    query: Tensor, key: Tensor, value: Tensor, prepared: Prepared, *, call: AttentionCall, origin: ops.Origin
) -> Tensor:
    scale = float(call.head_dim) ** -0.5 if call.scale is None else call.scale
    if prepared.bias is not None:
        # The operator would scale the bias too. (A bias divided by the scale overflows in float16: -10000 / 0.09.)
        query, scale = query * scale, 1.0
    output: Tensor = torch.ops.npu.npu_fusion_attention.default(
        query, key, value, call.heads, "BSND",
        pse=prepared.bias,
        atten_mask=prepared.mask,
        scale=scale,
        sparse_mode=UPPER_LEFT if call.mask.is_causal else 0,
        inner_precise=2 if call.mask.is_boolean else 0,  # 2: rows without any key are right
    )[0]  # fmt: skip
    if prepared.alive is None:
        return output
    return ops.zero_unless(prepared.alive, output)


def at_most_256_heads(call: AttentionCall, machine: Machine) -> Refused | None:
    if holds(call.heads <= 256):
        return None
    return Refused(
        Code.HEADS, f"_native_npu takes up to 256 heads, this is {described(call.heads)}", "Choose another kernel"
    )


NPU = Backend(
    name="_native_npu",
    family="Ascend",
    op=fusion_attention,
    summary="torch_npu's npu_fusion_attention, for Ascend NPUs",
    devices=frozenset({"npu"}),
    dtypes=frozenset({"float16", "bfloat16"}),
    head_dim=HeadDim(max=768),
    masks=frozenset({MaskKind.NONE, MaskKind.CAUSAL_UPPER_LEFT, MaskKind.BOOLEAN, MaskKind.ADDITIVE}),
    gqa=True,
    layout="bshd",
    checks=(at_most_256_heads,),
    prepare=prepare,
    tested="stand-in",
    source=Package("torch-npu", "torch_npu"),
    requires={"torch-npu": ">=2.9"},
)

RECORDS = (NPU,)
