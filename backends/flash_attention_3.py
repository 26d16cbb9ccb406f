"""FlashAttention 3, for Hopper. https://github.com/Dao-AILab/flash-attention (hopper/), tried with fa3-fwd 0.0.3 from PyPI.

Forward only: the wheel has no backward, and no other build was tried. Causal is aligned lower-right. Calls with key padding use
`flash_attn_with_kvcache`, which takes batched tensors and the number of keys in use (`cache_seqlens`).
"""

from __future__ import annotations

import functools
import importlib
import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..graphs.sizes import described, holds
from ..kernels import ops
from ..kernels.calls import AttentionCall, MaskKind
from ..kernels.decisions import Code, Refused
from ..kernels.library_kernels import packed_kernel, window_size
from ..kernels.machines import Machine
from ..kernels.packing import Leading, lead, leading, packing, packing_steps
from ..kernels.records import Backend, HeadDim, Numerics, Option, Tolerance
from ..kernels.sources import Hub, Package

FP8 = torch.float8_e4m3fn

# -- the library's functions; some versions return the log-sum-exp too


def forward(
    library: Any, query: Tensor, key: Tensor, value: Tensor, seqused_k: Tensor | None, causal: bool, scale: float | None,
    left: int, right: int, q_descale: Tensor | None, k_descale: Tensor | None, v_descale: Tensor | None,
) -> Tensor:  # fmt: skip
    given = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
    if seqused_k is None:
        window = (left, right)
        return _output(
            library.flash_attn_func(query, key, value, softmax_scale=scale, causal=causal, window_size=window, **given)
        )
    return _output(
        library.flash_attn_with_kvcache(
            query, key, value, cache_seqlens=seqused_k, softmax_scale=scale, causal=causal, num_splits=1, **given
        )
    )


def forward_with_logsumexp(
    library: Any, query: Tensor, key: Tensor, value: Tensor, seqused_k: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    given: dict[str, Any] = {"softmax_scale": scale, "causal": causal}
    if seqused_k is None:
        function, asks = library.flash_attn_func, "return_attn_probs"
    else:
        function, asks = library.flash_attn_with_kvcache, "return_softmax_lse"
        given |= {"cache_seqlens": seqused_k, "num_splits": 1}
    if _takes(function, asks):  # some versions return it always
        given[asks] = True
    output, logsumexp, *_ = function(query, key, value, **given)
    return output, logsumexp.contiguous()


@functools.cache
def _takes(function: Any, argument: str) -> bool:
    return argument in inspect.signature(function).parameters


def varlen_forward(
    library: Any, query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
    causal: bool, scale: float | None, left: int, right: int,
) -> Any:  # fmt: skip
    return library.flash_attn_varlen_func(
        query, key, value, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=causal, window_size=(left, right)
    )


def _output(result: Any) -> Tensor:
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output


def fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    output = ops.dense_output(query, value)
    return output.to(torch.bfloat16) if query.dtype is FP8 else output


FLASH_3 = ops.register(
    "flash_3",
    "(Tensor query, Tensor key, Tensor value, Tensor? seqused_k, bool causal, float? scale, int left, int right, "
    "Tensor? q_descale, Tensor? k_descale, Tensor? v_descale) -> Tensor",
    forward,
    fake,
    flops=ops.products,
)
FLASH_3_WITH_LOGSUMEXP = ops.register(
    "flash_3_with_logsumexp",
    "(Tensor query, Tensor key, Tensor value, Tensor? seqused_k, bool causal, float? scale) -> (Tensor, Tensor)",
    forward_with_logsumexp,
    lambda query, key, value, *_: (ops.dense_output(query, value), ops.logsumexp_of(query, True)),
    flops=ops.products,
)
# -- the code that is emitted into the graph


def flash_3(
    query: Tensor, key: Tensor, value: Tensor, used: Leading | None, *, call: AttentionCall, origin: ops.Origin
) -> Tensor:
    output: Tensor = FLASH_3(
        query, lead(key, used), lead(value, used), used and used.seqused_k, call.mask.is_causal, call.scale,
        *window_size(call), None, None, None, needs_grad=False, origin=origin,
    )  # fmt: skip
    return output


def flash_3_with_logsumexp(
    query: Tensor, key: Tensor, value: Tensor, used: Leading | None, *, call: AttentionCall, origin: ops.Origin
) -> tuple[Tensor, Tensor]:
    output, logsumexp = FLASH_3_WITH_LOGSUMEXP(
        query, lead(key, used), lead(value, used), used and used.seqused_k, call.mask.is_causal, call.scale,
        needs_grad=False, origin=origin,
    )  # fmt: skip
    return output, logsumexp


def flash_3_fp8(
    query: Tensor, key: Tensor, value: Tensor, used: Leading | None, *, call: AttentionCall, origin: ops.Origin,
    rotate: int = 0, center: int = 0,
) -> Tensor:  # fmt: skip
    """The casts are part of the graph, so that Inductor fuses them into the operations that made the tensors.

    rotate: 1 multiplies queries and keys by one Hadamard matrix, which spreads a few large channels over all. The matrix is a
        multiple of an orthogonal one, so the scores stay as they are up to a power of 2, which goes into a scale.
    center: 1 takes from every key the mean of its (batch, head) over all keys, padding included. The scores of a row lose one
        and the same number, which softmax does not see, whatever the row's mask hides.
    """
    dtype, squared = query.dtype, 1
    if rotate:
        query, key, squared = _rotated(query, key)
    q8, q_scale = _to_fp8(query, call.kv_heads)
    k8, k_scale = _to_fp8(key, call.kv_heads, center=bool(center))
    v8, v_scale = _to_fp8(value, call.kv_heads)
    q_scale = q_scale / squared if squared > 1 else q_scale
    output: Tensor = FLASH_3(
        q8, lead(k8, used), lead(v8, used), used and used.seqused_k, call.mask.is_causal, call.scale,
        *window_size(call), q_scale, k_scale, v_scale, needs_grad=False, origin=origin,
    )  # fmt: skip
    return output.to(dtype)


def _to_fp8(tensor: Tensor, kv_heads: Any, center: bool = False) -> tuple[Tensor, Tensor]:
    """The tensor (less its mean over the length, if `center`) in e4m3, and its scales in float32 (batch, kv_heads): query heads
    of one key head share a scale."""
    grouped = tensor.unflatten(2, (kv_heads, -1)).float()
    if center:
        grouped = grouped - grouped.mean(dim=1, keepdim=True)
    scale = grouped.abs().amax(dim=(1, 3, 4)).clamp(min=1e-12) / torch.finfo(FP8).max
    return (grouped / scale[:, None, :, None, None]).to(FP8).flatten(2, 3), scale


def _rotated(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, int]:
    """Query and key times a Hadamard matrix, in bfloat16, and the number by which their products have grown.

    The matrix is as large as the largest power of 2 that divides head_dim, which the record pads to a multiple of 16: head_dim
    96 is three blocks of 32. All its entries are a power of 2, plus or minus, so that they are exact. A product of bfloat16
    with a matrix of 128 x 128 costs less than reading and writing the tensor."""
    dim = query.shape[-1]
    size = dim & -dim if isinstance(dim, int) else 16
    bits = size.bit_length() - 1
    entry = 2.0 ** -(bits // 2)
    place = torch.arange(size, device=query.device)[:, None] >> torch.arange(bits, device=query.device) & 1
    odd = (place[:, None, :] * place[None, :, :]).sum(-1) & 1
    matrix = torch.where(odd == 1, -entry, entry).to(
        torch.bfloat16
    )  # symmetric; times itself: size * entry**2 times the unit
    rotated = (
        (tensor.to(torch.bfloat16).unflatten(-1, (-1, size)) @ matrix).flatten(-2)
        if size != dim
        else tensor.to(torch.bfloat16) @ matrix
        for tensor in (query, key)
    )
    return (*rotated, round(size * entry**2))  # type: ignore[return-value]


flash_3_varlen = packed_kernel("flash_3_varlen", varlen_forward, windows=True)

# -- limits that no field of a record expresses


def value_dims(call: AttentionCall, machine: Machine) -> Refused | None:
    """Where value_dim differs from head_dim the library has kernels for Hopper alone: head_dim up to 64 with any value_dim, and
    head_dim from 129 to 192 with value_dim from 97 to 128 (hopper/flash_api.cpp)."""
    if holds(call.value_dim == call.head_dim):
        return None
    if machine.capability == (9, 0) and (holds(call.head_dim <= 64) or _wide_with_128(call)):
        return None
    return _other_value_dim(call, "head_dim up to 64, or head_dim 192 and value_dim 128, on Hopper")


def value_dims_in_fp8(call: AttentionCall, machine: Machine) -> Refused | None:
    """In fp8 head_dim 64 with a wider value is wrong in silence (fa3-fwd 0.0.3: a relative error of 0.76 at value_dim 128)."""
    if holds(call.value_dim == call.head_dim) or _wide_with_128(call):
        return None
    return _other_value_dim(call, "head_dim 192 and value_dim 128")


def _wide_with_128(call: AttentionCall) -> bool:
    wide = holds(call.head_dim > 128) and holds(call.head_dim <= 192)
    return wide and holds(call.value_dim > 96) and holds(call.value_dim <= 128)


def _other_value_dim(call: AttentionCall, taken: str) -> Refused:
    return Refused(
        Code.VALUE_DIM,
        f"FlashAttention 3 takes another value_dim with {taken}: "
        f"value_dim is {described(call.value_dim)} and head_dim {described(call.head_dim)}",
        "Choose a kernel that takes a value_dim other than head_dim",
    )


def built(library: Any, call: AttentionCall, machine: Machine) -> Refused | None:
    """A build may lack kernels: setup.py writes its switches into a module of its own, flash_attn_config (fa3_fwd_config in the
    wheel fa3-fwd). A build without this module is taken to have every kernel."""
    flags = _flags(library)
    for flag, needed, what in (
        ("FLASHATTENTION_DISABLE_FP16", call.dtype == "float16", "float16"),
        ("FLASHATTENTION_DISABLE_LOCAL", call.mask.kind is MaskKind.SLIDING_WINDOW, "sliding windows"),
        ("FLASHATTENTION_DISABLE_VARLEN", call.mask.kind is MaskKind.KEY_PADDING, "sequences of several lengths"),
    ):
        if needed and flags.get(flag):
            return Refused(
                Code.BROKEN,
                f"this build of FlashAttention 3 lacks {what}: {flag} was set",
                "Build hopper/ without that switch, or choose another kernel",
            )
    return None


def _flags(library: Any) -> dict[str, bool]:
    """The switches of a build, by the module that defines its functions: a kernel of the hub may only import them."""
    for module in (library.flash_attn_func.__module__, library.__name__):
        try:
            config: dict[str, Any] = importlib.import_module(module.removesuffix("_interface") + "_config").CONFIG
        except (ImportError, AttributeError):
            continue
        return dict(config.get("build_flags", {}))
    return {}


FROM_SOURCE = Backend(
    name="_flash_3",
    family="FlashAttention",
    op=flash_3,
    logsumexp=flash_3_with_logsumexp,
    summary="FlashAttention 3",
    devices=frozenset({"cuda"}),
    capability=((8, 0), (9, 0)),
    dtypes=frozenset({"float16", "bfloat16"}),
    head_dim=HeadDim(max=256, multiple=8, pad=True),
    masks=frozenset({MaskKind.NONE, MaskKind.CAUSAL_LOWER_RIGHT, MaskKind.KEY_PADDING, MaskKind.SLIDING_WINDOW}),
    gqa=True,
    value_dim=True,
    layout="bshd",
    prepare=leading,
    steps=packing_steps,
    checks=(value_dims,),
    library_check=built,
    tested="stand-in",
    source=Package("flash-attn-3", "flash_attn_interface"),
    requires={"flash-attn-3": ">=3.0.0b1"},
    install={
        "flash-attn-3": "Build hopper/ of https://github.com/Dao-AILab/flash-attention; "
        'or, for Hopper and bfloat16, pip install "fa3-fwd>=0.0.3"'
    },
)
# The wheel on PyPI has kernels for Hopper and bfloat16 only, and none for windows.
FROM_PYPI = replace(
    FROM_SOURCE,
    capability=((9, 0), (9, 0)),
    dtypes=frozenset({"bfloat16"}),
    masks=FROM_SOURCE.masks - {MaskKind.SLIDING_WINDOW},
    tested="sm_90",
    source=Package("fa3-fwd", "fa3_fwd_interface"),
    requires={"fa3-fwd": ">=0.0.3"},
)
FROM_HUB = replace(
    FROM_SOURCE,
    name="_flash_3_hub",
    tested="sm_90, as a package",
    source=Hub("kernels-community/flash-attn3", version=1),
    requires={"kernels": ">=0.17"},
)


def _varlen(record: Backend, name: str) -> Backend:
    return replace(
        record,
        name=name,
        op=flash_3_varlen,
        logsumexp=None,
        summary="FlashAttention 3 on packed keys, for key padding",
        prepare=packing,
    )


def _fp8(record: Backend) -> Backend:
    return replace(
        record,
        name="_flash_3_fp8",
        op=flash_3_fp8,
        logsumexp=None,
        summary="FlashAttention 3 with query, key and value in fp8 e4m3",
        capability=((9, 0), (9, 0)),
        head_dim=HeadDim(max=256, multiple=16, pad=True),
        masks=record.masks - {MaskKind.SLIDING_WINDOW},  # not tried
        checks=(value_dims_in_fp8,),
        numerics=Numerics.QUANTISED,
        tolerance=Tolerance(8e-2, "three mantissa bits: 5.4e-2 measured on Gaussian data"),
        options={
            "rotate": Option(0, 0, 1, "1: queries and keys times a Hadamard matrix, against a few large channels"),
            "center": Option(0, 0, 1, "1: keys less their mean, against a large vector that all keys share"),
        },
        variants=("center=1", "center=1,rotate=1"),
    )


RECORDS = (
    FROM_SOURCE,
    FROM_PYPI,
    FROM_HUB,
    _varlen(FROM_SOURCE, "_flash_varlen_3"),
    _varlen(FROM_PYPI, "_flash_varlen_3"),
    _varlen(FROM_HUB, "_flash_3_varlen_hub"),
    _fp8(FROM_SOURCE),
    _fp8(FROM_PYPI),
)
