"""xformers. https://github.com/facebookresearch/xformers, `memory_efficient_attention`, tried with 0.0.35.

Tensors are (batch, length, heads, dim). xformers chooses among its own kernels by the call: FlashAttention where there is no
bias, CUTLASS for biases, float32 and wide heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..graphs.sizes import holds
from ..kernels import ops
from ..kernels.calls import AttentionCall, MaskKind
from ..kernels.decisions import Code, Refused
from ..kernels.machines import Machine
from ..kernels.records import Backend, HeadDim
from ..kernels.sources import Package
from .native import aligned_bias, rows_of_the_bias


def forward(
    library: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, scale: float | None,
    logsumexp: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    given = _grouped(query, key, value)
    bias = library.LowerTriangularMask() if causal else bias
    if logsumexp:
        output, found = library.memory_efficient_attention_forward_requires_grad(*given, bias, scale=scale)
        return output.contiguous(), found[..., : query.shape[1]].contiguous()  # CUTLASS pads to multiples of 32
    output = library.memory_efficient_attention_forward(*given, bias, scale=scale)
    return output.reshape(*query.shape[:-1], -1).contiguous(), query.new_empty(0, dtype=torch.float32)


def _grouped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value; with grouped heads as (batch, length, kv_heads, query heads per key head, dim)."""
    heads, kv_heads = query.shape[2], key.shape[2]
    if heads == kv_heads:
        return query, key, value
    group = heads // kv_heads
    wide = (tensor.unsqueeze(3).expand(-1, -1, -1, group, -1) for tensor in (key, value))
    return (query.unflatten(2, (kv_heads, group)), *wide)


def backward(
    library: Any, grad: Tensor, output: Tensor, logsumexp: Tensor, query: Tensor, key: Tensor, value: Tensor,
    bias: Tensor | None, causal: bool, scale: float | None, _: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    bias = library.LowerTriangularMask() if causal else bias
    found = library.memory_efficient_attention_backward(
        grad.contiguous(), output, logsumexp, query, key, value, bias, scale=scale
    )
    return tuple(
        torch.empty_like(tensor).copy_(gradient) for tensor, gradient in zip((query, key, value), found, strict=True)
    )


def fake(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, scale: float | None, logsumexp: bool
) -> tuple[Tensor, Tensor]:
    return ops.dense_output(query, value), ops.logsumexp_of(query, logsumexp)


XFORMERS_OP = ops.register(
    "xformers",
    "(Tensor query, Tensor key, Tensor value, Tensor? bias, bool causal, float? scale, bool wants_logsumexp) "
    "-> (Tensor, Tensor)",
    forward,
    fake,
    flops=ops.products,
    backward=backward,
    backward_flops=ops.backward_products,
)


def xformers(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, call: AttentionCall, origin: ops.Origin
) -> Tensor:
    output: Tensor = XFORMERS_OP(
        query, key, value, bias, call.mask.is_causal, call.scale, call.needs_grad,
        needs_grad=call.needs_grad, origin=origin,
    )[0]  # fmt: skip
    return output


def grouped_heads(call: AttentionCall, machine: Machine) -> Refused | None:
    """Grouped heads are forward only (docstring of `memory_efficient_attention`), and were not tried with a bias."""
    if not (call.needs_grad or call.mask.is_tensor) or holds(call.heads == call.kv_heads):
        return None
    what = "a gradient" if call.needs_grad else "a mask"
    return Refused(
        Code.GQA,
        f"xformers takes fewer key heads than query heads only without {what}, the call has one",
        "Choose another kernel",
    )


def not_deterministic_backward(call: AttentionCall, machine: Machine) -> Refused | None:
    """xformers marks its FlashAttention backwards as not deterministic (IS_DETERMINISTIC in fmha/flash.py) and raises."""
    if not (call.deterministic and call.needs_grad):
        return None
    return Refused(
        Code.DETERMINISTIC,
        "the backward of xformers is not deterministic and torch.use_deterministic_algorithms(True) is on",
        "Turn deterministic algorithms off, or choose another kernel",
    )


XFORMERS = Backend(
    name="xformers",
    family="xformers",
    op=xformers,
    summary="xformers' memory_efficient_attention: it chooses among its kernels",
    devices=frozenset({"cuda"}),
    capability=((8, 0), (9, 0)),
    dtypes=frozenset({"float16", "bfloat16", "float32"}),
    head_dim=HeadDim(multiple=8, pad=True),
    masks=frozenset({MaskKind.NONE, MaskKind.CAUSAL_UPPER_LEFT, MaskKind.BOOLEAN, MaskKind.ADDITIVE}),
    gqa=True,
    value_dim=True,
    max_batch=65_535,
    backward=True,
    layout="bshd",
    checks=(not_deterministic_backward, grouped_heads, rows_of_the_bias),
    prepare=aligned_bias,
    tested="sm_90",
    source=Package("xformers", "xformers.ops"),
    requires={"xformers": ">=0.0.29"},
)

RECORDS = (XFORMERS,)
