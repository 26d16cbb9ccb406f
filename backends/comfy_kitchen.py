"""comfy-kitchen: Sol-Attn, which is sparse, and int8 attention. https://github.com/Comfy-Org/comfy-kitchen, tried with 0.2.40.

Sol-Attn (arXiv 2607.24027) takes blocks of 64 tokens. Each block of queries attends some key blocks exactly: its own and its
neighbours, the sinks, and those that its mean query scores highest. Each of the other key blocks is one term of the softmax, of
its mean key and the sum of its values. That is right where neighbours in the sequence are alike, as in a trained model of
videos, and wrong where they are not: on an H200 the error is 1.1e-2 on data with the structure of a video, 0.8 on Gaussian
data. Only a measurement on the model's own tensors can tell (`attnrewrite.tune`).

The int8 attention rotates queries and keys, and runs both products in int8. On Hopper FlashAttention 3 is faster, and cuDNN
where there is no mask; it is for GPUs without fp8, and for masks.

Both are forward only. The library's own torch ops are not in the graph: that of the int8 attention states dense strides for an
output that is a slice, where the head_dim is none of 64, 128 and 256.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..graphs.sizes import described, holds
from ..kernels import ops
from ..kernels.calls import AttentionCall, MaskKind
from ..kernels.decisions import Code, Refused
from ..kernels.machines import Machine
from ..kernels.records import Backend, HeadDim, Numerics, Option, Tolerance
from ..kernels.sources import Package

BLOCK = 64  # tokens

# -- the library's functions


def sol_forward(
    library: Any, query: Tensor, key: Tensor, value: Tensor, scale: float | None, tau: float, ratio: float, sinks: int
) -> Tensor:
    exact = sink_blocks(query.shape[1], sinks)
    output: Tensor = library.sol_attn(
        *(aligned(tensor) for tensor in (query, key, value)),
        tau=tau, scale=scale, topk_ratio=ratio, sink_blocks=exact, sink_q=exact,
    )  # fmt: skip
    return output


def sink_blocks(length: int, sinks: int) -> list[int]:
    """The first block that holds one of the first `sinks` tokens, or of the last `-sinks`, and the first behind them."""
    blocks = -(-length // BLOCK)
    if sinks < 0:
        return [max(0, length + sinks) // BLOCK, blocks]
    return [0, min(blocks, -(-sinks // BLOCK))]


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where the kernel's loads of 16 bytes cannot read it: the library raises for those."""
    element = 16 // tensor.element_size()
    strides = (stride for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True) if size > 1)
    if tensor.data_ptr() % 16 or any(stride % element for stride in strides):
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


SOL = ops.register(
    "sol",
    "(Tensor query, Tensor key, Tensor value, float? scale, float tau, float ratio, int sinks) -> Tensor",
    sol_forward,
    lambda query, key, value, *_: ops.dense_output(query, value),
    flops=ops.products,  # of dense attention: how many of them run depends on the data
)


def int8_forward(
    library: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    output: Tensor = library.int8_attention(query, key, value, scale=scale, attn_mask=mask)
    return output.contiguous()


INT8 = ops.register(
    "ck_int8",
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, float? scale) -> Tensor",
    int8_forward,
    lambda query, key, value, *_: ops.dense_output(query, value),
    flops=lambda query, key, value, *_: 4 * query[0] * query[1] * query[2] * key[2] * query[3],
)

# -- the code that is emitted into the graph


def sol(
    query: Tensor, key: Tensor, value: Tensor, _: None, *, call: AttentionCall, origin: ops.Origin, tau: float = 1.0,
    sinks: int = 0,
) -> Tensor:  # fmt: skip
    output: Tensor = SOL(query, key, value, call.scale, tau, 0.0, sinks, needs_grad=False, origin=origin)
    return output


def sol_topk(
    query: Tensor, key: Tensor, value: Tensor, _: None, *, call: AttentionCall, origin: ops.Origin, ratio: float = 0.25,
    sinks: int = 0,
) -> Tensor:  # fmt: skip
    output: Tensor = SOL(query, key, value, call.scale, 1.0, ratio, sinks, needs_grad=False, origin=origin)
    return output


def int8(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, call: AttentionCall, origin: ops.Origin
) -> Tensor:
    output: Tensor = INT8(query, key, value, mask, call.scale, needs_grad=False, origin=origin)
    # A row that sees no key is zero, as in SDPA. (batch, heads, q_len, 1), with 1 where the mask has it.
    return output if mask is None else ops.zero_unless(mask.any(-1, keepdim=True), output)


# -- limits that no field of a record expresses


def as_many_queries_as_keys(call: AttentionCall, machine: Machine) -> Refused | None:
    if holds(call.q_len == call.kv_len):
        return None
    return Refused(
        Code.LENGTH,
        "Sol-Attn is for self attention, with as many queries as keys: "
        f"q_len is {described(call.q_len)}, kv_len {described(call.kv_len)}",
        "Choose another kernel for this site by a rule",
    )


SINKS = Option(
    0, -65_536, 65_536, "tokens that always attend and are attended exactly: the first ones, or -n: the last n"
)
SOL_ATTN = Backend(
    name="sol",
    family="comfy-kitchen",
    op=sol,
    summary="Sol-Attn: blocks of keys above a threshold exactly, the others by one term each",
    devices=frozenset({"cuda"}),
    capability=((8, 0), (12, 1)),
    dtypes=frozenset({"float16", "bfloat16"}),
    head_dim=HeadDim(max=128, multiple=128, pad=True),
    max_batch=65_535,
    layout="bshd",
    numerics=Numerics.SPARSE,
    tolerance=Tolerance(2e-2, "the far blocks by one term each: 1.1e-2 measured on data with the structure of a video"),
    checks=(as_many_queries_as_keys,),
    tested="sm_90",
    source=Package("comfy-kitchen", "comfy_kitchen"),
    requires={"comfy-kitchen": ">=0.2.40"},
    options={
        "tau": Option(1.0, 0.0, 8.0, "the threshold in standard deviations of a row's scores: higher is sparser"),
        "sinks": SINKS,
    },
    # On an H200 at 32,760 and 75,600 tokens tau=0 was no faster than FlashAttention 3, and from 1 to 2 the error grew up to
    # fourfold (bench/results/sparse_models_h200.json).
    variants=("tau=1.5", "tau=2.0", "tau=3.0"),
)
SOL_TOPK = replace(
    SOL_ATTN,
    name="sol_topk",
    op=sol_topk,
    summary="Sol-Attn: the same part of the blocks of keys exactly for every block of queries",
    options={"ratio": Option(0.25, 0.01, 0.99, "the part of the blocks that is exact"), "sinks": SINKS},
    variants=("ratio=0.1",),
)
CK_INT8 = Backend(
    name="ck_int8",
    family="comfy-kitchen",
    op=int8,
    summary="rotated queries and keys in int8, both products in int8",
    devices=frozenset({"cuda"}),
    capability=((8, 0), (12, 1)),
    dtypes=frozenset({"float16", "bfloat16"}),
    head_dim=HeadDim(max=256, multiple=64, pad=True),
    masks=frozenset({MaskKind.NONE, MaskKind.KEY_PADDING, MaskKind.BOOLEAN}),
    gqa=True,
    max_batch=65_535,
    numerics=Numerics.QUANTISED,
    tolerance=Tolerance(3.5e-2, "int8 scores and values: 1.7e-2 measured on Gaussian data"),
    tested="sm_90",
    source=Package("comfy-kitchen", "comfy_kitchen"),
    requires={"comfy-kitchen": ">=0.2.40"},
)

RECORDS = (SOL_ATTN, SOL_TOPK, CK_INT8)
