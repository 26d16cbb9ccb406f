"""TPUs: `torch_xla.experimental.custom_kernel.flash_attention`, JAX's Pallas kernel. Tried with torch_xla 2.9.0 and jax 0.7.1.

No TPU was at hand: the kernel ran in Pallas' interpret mode, and this record with a stand-in that computes what the kernel did
there (docs/xla-and-npu.md). Tensors are (batch, heads, length, dim). Differences from SDPA, and the remedies here:

* The kernel scales its bias with the scores, softmax(sm_scale * (q k^T + ab)): with a bias, the query is scaled instead. (A
  bias divided by the scale overflows, and a negative scale turns its sign.)
* -inf in the bias gives NaN: the bias is clamped to a finite value.
* A row whose keys are all masked gives the mean of the values: the row is set to zero, as in SDPA.
* With more than 512 keys and no multiple of 512, the kernel silently counts the missing keys as zeros that take part; with
  segment ids it needs multiples of 128: keys are padded, and segment ids hide the padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..graphs.sizes import described, holds
from ..kernels import ops
from ..kernels.calls import AttentionCall, MaskKind
from ..kernels.decisions import Code, Refused, Step
from ..kernels.machines import Machine
from ..kernels.records import Backend
from ..kernels.sources import Package
from .native import additive

BLOCK, SMALL = 512, 128  # the kernel reads blocks of 512 keys; fewer keys with segment ids in multiples of 128
FAR = -1e30  # exp(FAR) is 0


def forward(
    library: Any, query: Tensor, key: Tensor, value: Tensor, q_ids: Tensor | None, kv_ids: Tensor | None,
    bias: Tensor | None, causal: bool, scale: float,
) -> Tensor:  # fmt: skip
    output: Tensor = library.flash_attention(query, key, value, causal, q_ids, kv_ids, scale, ab=bias)
    return output


def fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return ops.dense_output(query, value)


def products(query: ops.Shape, key: ops.Shape, value: ops.Shape, *_: Any) -> int:
    return 2 * query[0] * query[1] * query[2] * key[2] * (query[3] + value[3])


XLA_OP = ops.register(
    "xla_flash",
    "(Tensor query, Tensor key, Tensor value, Tensor? q_segment_ids, Tensor? kv_segment_ids, Tensor? bias, bool causal, "
    "float scale) -> Tensor",
    forward,
    fake,
    flops=products,
)


@dataclass(frozen=True)
class Prepared:
    """The kernel's arguments for a mask. A query reads the keys with its own segment id."""

    missing: Any = 0  # how many keys the padding adds
    q_ids: Tensor | None = None  # segment ids: int32 (batch, q_len), all 0
    kv_ids: Tensor | None = None  # segment ids: int32 (batch, kv_len + missing), 0 for keys that take part, else 1
    bias: Tensor | None = None  # float32, finite; (batch, heads, q_len, kv_len + missing)
    alive: Tensor | None = None  # bool, True: the row has a key; (batch or 1, heads or 1, q_len or 1, 1)


def prepare(mask: Tensor | None, key: Tensor, call: AttentionCall) -> Prepared:
    batch, heads, q_len, kv_len = (cast(int, size) for size in (call.batch, call.heads, call.q_len, call.kv_len))
    padding = call.mask.kind is MaskKind.KEY_PADDING
    missing = missing_keys(call)
    bias = alive = kv_ids = None
    if mask is not None and padding:
        keep = mask.select(1, 0).select(1, 0).expand(batch, kv_len)
        kv_ids = pad(torch.logical_not(keep).to(torch.int32), (0, missing), value=1)
        alive = keep.any(-1)[:, None, None, None]
    elif mask is not None:
        wide = cast(Tensor, additive(mask, key, call)).float()
        alive = (wide > float("-inf")).any(-1, keepdim=True)
        bias = wide.clamp(min=FAR).expand(batch, heads, q_len, kv_len)
        bias = pad(bias, (0, missing))
    if kv_ids is None and missing != 0:
        kv_ids = pad(torch.zeros(batch, kv_len, dtype=torch.int32, device=key.device), (0, missing), value=1)
    q_ids = None if kv_ids is None else torch.zeros(batch, q_len, dtype=torch.int32, device=key.device)
    return Prepared(missing, q_ids, kv_ids, bias, alive)


def missing_keys(call: AttentionCall) -> int:
    """How many keys are missing to fill whole blocks. Without a mask tensor, a short sequence is one block of any size."""
    short = not holds(call.kv_len > BLOCK)
    block = SMALL if short else BLOCK
    if (short and not call.mask.is_tensor) or holds(call.kv_len % block == 0):
        return 0
    return cast(int, block - call.kv_len % block)


def steps(call: AttentionCall) -> tuple[Step, ...]:
    missing = missing_keys(call)
    padded = not isinstance(missing, int) or missing > 0
    return (Step("pad_keys", call.kv_len, call.kv_len + missing),) if padded else ()


def flash(
    query: Tensor, key: Tensor, value: Tensor, prepared: Prepared, *, call: AttentionCall, origin: ops.Origin
) -> Tensor:
    if prepared.kv_ids is not None:
        key, value = (pad(tensor, (0, 0, 0, prepared.missing)) for tensor in (key, value))
    scale = float(cast(int, call.head_dim)) ** -0.5 if call.scale is None else call.scale
    if prepared.bias is not None:
        query, scale = query * scale, 1.0
    output: Tensor = XLA_OP(
        query, key, value, prepared.q_ids, prepared.kv_ids, prepared.bias, call.mask.is_causal, scale,
        needs_grad=False, origin=origin,
    )  # fmt: skip
    if prepared.alive is None:
        return output
    return ops.zero_unless(prepared.alive, output)


def head_dim_of_long_sequences(call: AttentionCall, machine: Machine) -> Refused | None:
    if holds(call.head_dim <= 128) or holds(call.head_dim % 128 == 0) or holds(call.kv_len <= BLOCK):
        return None
    return Refused(
        Code.HEAD_DIM,
        f"_native_xla takes head_dim up to 128 or multiples of it from {BLOCK + 1} keys on, this is "
        f"{described(call.head_dim)} with {described(call.kv_len)} keys",
        "Choose another kernel",
    )


XLA = Backend(
    name="_native_xla",
    family="XLA",
    op=flash,
    summary="torch_xla's flash_attention (Pallas), for TPUs",
    devices=frozenset({"tpu"}),
    dtypes=frozenset({"float16", "bfloat16", "float32"}),
    masks=frozenset(
        {MaskKind.NONE, MaskKind.CAUSAL_UPPER_LEFT, MaskKind.KEY_PADDING, MaskKind.BOOLEAN, MaskKind.ADDITIVE}
    ),
    mask_dtypes=frozenset({"float16", "bfloat16", "float32"}),
    checks=(head_dim_of_long_sequences,),
    prepare=prepare,
    steps=steps,
    tested="interpreter",
    source=Package("torch-xla", "torch_xla.experimental.custom_kernel"),
    requires={"torch-xla": ">=2.9", "jax": ">=0.7"},
)

RECORDS = (XLA,)
