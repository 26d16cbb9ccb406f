"""SpargeAttn (arXiv 2502.18137): blocks of keys chosen by their means, scores in int8, values in fp8 on Hopper and Ada.
https://github.com/thu-ml/SpargeAttn, tried at bfd980b, built from source.

`sparge` attends, for each block of queries, the key blocks that hold the share `cdf` of the weight by their mean keys, and all
of those whose keys are less alike than `similarity`. `sparge_topk` attends the same part of the blocks for every block of
queries. What is left out is lost, and stands in no term of the softmax. That is right where a few blocks hold the weight; only
a measurement on the model's own tensors can tell (`attnrewrite.tune`).

The library makes the values float16: those above 65,504 become infinite. It chooses blocks by scores with 1 / sqrt(head_dim)
whatever the scale of the call. Its argument is_causal leaves out blocks behind the diagonal and hides nothing in the blocks
on it, so that causal calls are refused. Forward only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ..graphs.sizes import described, holds
from ..kernels import ops
from ..kernels.calls import AttentionCall
from ..kernels.decisions import Code, Refused
from ..kernels.machines import Machine
from ..kernels.records import Backend, HeadDim, Numerics, Option, Tolerance
from ..kernels.sources import Package

SHORTEST = 128  # queries and keys: the library raises below it


def forward(
    library: Any, query: Tensor, key: Tensor, value: Tensor, scale: float | None, ratio: float, cdf: float, similarity: float
) -> Tensor:  # fmt: skip
    if ratio:
        output: Tensor = library.spas_sage2_attn_meansim_topk_cuda(query, key, value, scale=scale, topk=ratio)
    else:
        output = library.spas_sage2_attn_meansim_cuda(
            query, key, value, scale=scale, cdfthreshd=cdf, simthreshd1=similarity
        )
    return output


SPARGE_OP = ops.register(
    "sparge",
    "(Tensor query, Tensor key, Tensor value, float? scale, float ratio, float cdf, float similarity) -> Tensor",
    forward,
    lambda query, key, value, *_: ops.dense_output(query, value),
    flops=ops.products,  # of dense attention: how many of them run depends on the data
)


def sparge(
    query: Tensor, key: Tensor, value: Tensor, mask: None, *, call: AttentionCall, origin: ops.Origin, cdf: float = 0.98,
    similarity: float = 0.6,
) -> Tensor:  # fmt: skip
    output: Tensor = SPARGE_OP(query, key, value, call.scale, 0.0, cdf, similarity, needs_grad=False, origin=origin)
    return output


def sparge_topk(
    query: Tensor, key: Tensor, value: Tensor, mask: None, *, call: AttentionCall, origin: ops.Origin, ratio: float = 0.5
) -> Tensor:  # fmt: skip
    output: Tensor = SPARGE_OP(query, key, value, call.scale, ratio, 0.0, 0.0, needs_grad=False, origin=origin)
    return output


def long_self_attention(call: AttentionCall, machine: Machine) -> Refused | None:
    if holds(call.q_len == call.kv_len) and holds(call.q_len >= SHORTEST):
        return None
    return Refused(
        Code.LENGTH,
        f"SpargeAttn is for self attention of {SHORTEST} tokens and more: "
        f"q_len is {described(call.q_len)}, kv_len {described(call.kv_len)}",
        "Choose another kernel for this site by a rule",
    )


SPARGE = Backend(
    name="sparge",
    family="SpargeAttn",
    op=sparge,
    summary="SpargeAttn: blocks of keys by a share of the weight, int8 scores, fp8 values",
    devices=frozenset({"cuda"}),
    capability=((8, 0), (9, 0)),
    dtypes=frozenset({"float16", "bfloat16"}),
    head_dim=HeadDim(max=128, multiple=64, pad=True),
    max_batch=65_535,
    numerics=Numerics.SPARSE,
    tolerance=Tolerance(5e-2, "blocks left out, int8 scores, fp8 values: 2.3e-2 measured on data with a video's structure"),
    capturable=False,
    checks=(long_self_attention,),
    tested="sm_90",
    source=Package("spas-sage-attn", "spas_sage_attn"),
    requires={"spas-sage-attn": ">=0.1.0"},
    install={
        "spas-sage-attn": "build SpargeAttn from source: pip install --no-build-isolation git+https://github.com/thu-ml/SpargeAttn"
    },
    options={
        "cdf": Option(0.98, 0.01, 1.0, "the share of the weight, by mean keys, of the blocks that are attended"),
        "similarity": Option(0.6, -1.0, 1.0, "blocks whose tokens have a lower cosine similarity are attended always"),
    },
    variants=("cdf=0.9,similarity=0.3",),
)  # fmt: skip
SPARGE_TOPK = replace(
    SPARGE,
    name="sparge_topk",
    op=sparge_topk,
    summary="SpargeAttn: the same part of the blocks of keys for every block of queries",
    options={"ratio": Option(0.5, 0.01, 1.0, "the part of the blocks that is attended")},
    variants=("ratio=0.2",),
)

RECORDS = (SPARGE, SPARGE_TOPK)
