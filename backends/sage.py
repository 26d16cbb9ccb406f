"""SageAttention: int8 scores. https://github.com/thu-ml/SageAttention, tried with 2.2.0 (built from source) and 1.0.6 (PyPI).

Tensors are (batch, length, heads, dim), "NHD". Inference only. Unexpected behaviour of its kernels, and the remedies here:

* The CUDA kernels of 2.x launch on the default stream, also where another stream is current (relative error 19 on a side stream
  and on the replay of a CUDA graph, no error raised; torch 2.11, H200): `ordered` makes the two streams wait for each other,
  and raises under capture. The ops of these kernels carry `cudagraph_unsafe`: Inductor keeps them out of its CUDA graphs.
* 1.x subtracts the mean from the caller's key in place: the op passes a copy. 1.x counts the missing keys of its last block of
  64 as zeros that take part (relative error 0.28 at kv_len 77): such lengths are refused.
* `sageattn_varlen` cannot be captured in a CUDA graph, and an attempt leaves the process's random state unusable: the op raises
  under capture.

Where the inner compiler is known to record a CUDA graph, `capturable=False` refuses these kernels already in the decision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..graphs.sizes import described, holds
from ..kernels import ops
from ..kernels.calls import AttentionCall, MaskKind
from ..kernels.decisions import Code, Refused
from ..kernels.library_kernels import Kernel, dense_kernel, packed_kernel
from ..kernels.machines import Machine
from ..kernels.packing import packing, packing_steps
from ..kernels.records import Backend, HeadDim, LibraryCheck, Numerics, Tolerance
from ..kernels.sources import Hub, Package

# -- the library's functions

DEFAULT_STREAM = 0  # CUDA's handle of the default stream


def ordered(query: Tensor, run: Callable[[], Tensor]) -> Tensor:
    """Calls `run`, whose kernels launch on the default stream, in order with the current stream. Raises `RuntimeError` under
    capture."""
    current = torch.cuda.current_stream(query.device) if query.is_cuda else None  # None: a stand-in
    if current is None or current.cuda_stream == DEFAULT_STREAM:
        return run()
    not_while_capturing()  # a capture is never on the default stream
    default = torch.cuda.default_stream(query.device)
    default.wait_stream(current)
    with torch.cuda.stream(default):
        output = run()
    current.wait_stream(default)
    output.record_stream(current)  # the output was allocated on the default stream
    return output


def not_while_capturing() -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("this kernel of SageAttention cannot be captured in a CUDA graph")


def dense(function: str, launches_on_the_default_stream: bool) -> Callable[..., Tensor]:
    def forward(library: Any, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> Tensor:
        def run() -> Tensor:
            result: Tensor = getattr(library, function)(
                query, key, value, tensor_layout="NHD", is_causal=causal, sm_scale=scale
            )
            return result

        return ordered(query, run) if launches_on_the_default_stream else run()

    return forward


def dense_1(library: Any, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> Tensor:
    output: Tensor = library.sageattn(query, key.clone(), value, tensor_layout="NHD", is_causal=causal, sm_scale=scale)
    return output


def varlen(
    library: Any, query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
    causal: bool, scale: float | None,
) -> Tensor:  # fmt: skip
    not_while_capturing()
    output: Tensor = library.sageattn_varlen(
        query, key, value, cu_q, cu_k, max_q, max_k, is_causal=causal, sm_scale=scale
    )
    return output


def varlen_1(library: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return varlen(library, query, key.clone(), value, *rest)


def blackwell(library: Any, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Tensors are (batch, heads, length, dim). The library writes into its key, so it gets a copy."""
    dense_copy = key.clone(memory_format=torch.contiguous_format)
    output: Tensor = library.sageattn3_blackwell(query.contiguous(), dense_copy, value.contiguous(), is_causal=causal)
    return output.contiguous()


UNSAFE = (torch.Tag.cudagraph_unsafe,)


def _kernel(name: str, function: str, launches_on_the_default_stream: bool) -> Kernel:
    tags = UNSAFE if launches_on_the_default_stream else ()
    return dense_kernel(name, dense(function, launches_on_the_default_stream), tags=tags)


BLACKWELL_OP = ops.register(
    "sage_blackwell",
    "(Tensor query, Tensor key, Tensor value, bool causal) -> Tensor",
    blackwell,
    lambda query, key, value, causal: ops.dense_output(query, value),
    flops=lambda query, key, value, *_: 4 * query[0] * query[1] * query[2] * key[2] * query[3],
    tags=UNSAFE,
)

# -- the code that is emitted into the graph


def calls_blackwell(
    query: Tensor, key: Tensor, value: Tensor, _: None, *, call: AttentionCall, origin: ops.Origin
) -> Tensor:
    output: Tensor = BLACKWELL_OP(query, key, value, call.mask.is_causal, needs_grad=False, origin=origin)
    return output


# -- limits that no field of a record expresses


def as_many_queries_as_keys(call: AttentionCall, machine: Machine) -> Refused | None:
    """Causal is defined only for q_len == kv_len (docstring of `sageattn`)."""
    if not call.mask.is_causal or holds(call.q_len == call.kv_len):
        return None
    return Refused(
        Code.CAUSAL,
        "SageAttention is causal only where q_len == kv_len: "
        f"q_len is {described(call.q_len)}, kv_len {described(call.kv_len)}",
        "Choose another kernel",
    )


def whole_blocks_of_keys(call: AttentionCall, machine: Machine) -> Refused | None:
    """SageAttention 1.x counts the missing keys of its last block of 64 as zeros."""
    if holds(call.kv_len % 64 == 0):
        return None
    return Refused(
        Code.LENGTH,
        f"SageAttention 1.x is wrong where kv_len is no multiple of 64, this is {described(call.kv_len)}",
        "Install SageAttention 2.x",
    )


def a_block_of_keys(call: AttentionCall, machine: Machine) -> Refused | None:
    """The kernel loads values in blocks of 64 and does not write shared memory behind the last key (csrc/qattn/attn_utils.cuh
    of 2.2.0 loads with kNoFill). This memory holds values of an earlier block; in the first block it may hold NaN, and 0 * NaN
    is NaN (seen on an H100 with 2 keys, now and then)."""
    if holds(call.kv_len >= 64):
        return None
    return Refused(
        Code.LENGTH,
        f"SageAttention's CUDA kernel with float16 values is wrong below 64 keys, here are {described(call.kv_len)}",
        "Choose another kernel",
    )


def a_block_of_keys_on_sm_80(call: AttentionCall, machine: Machine) -> Refused | None:
    """On sm_80 `sageattn` chooses the CUDA kernel with float16 values."""
    return a_block_of_keys(call, machine) if machine.capability == (8, 0) else None


def its_own_scale(call: AttentionCall, machine: Machine) -> Refused | None:
    if call.scale is None or (isinstance(call.head_dim, int) and call.scale == call.head_dim**-0.5):
        return None
    return Refused(
        Code.SCALE,
        f"sage_blackwell_hub takes no scale but 1/sqrt(head_dim), this is {call.scale:g}",
        "Choose another kernel",
    )


# The package imports only the extensions that load. These flags of its module `core` show which: one per compute capability.
FLAGS = {
    (8, 0): "SM80_ENABLED",
    (8, 9): "SM89_ENABLED",
    (9, 0): "SM90_ENABLED",
    (12, 0): "SM89_ENABLED",
    (12, 1): "SM89_ENABLED",
}


def built_with(flag: str | None = None) -> LibraryCheck:
    """Makes a check that the installed build has the kernel.

    flag: the flag that the kernel needs; None: the flag of the variant that `sageattn` chooses for the GPU.
    """

    def check(library: ModuleType, call: AttentionCall, machine: Machine) -> Refused | None:
        needed = flag or (FLAGS.get(machine.capability) if machine.capability else None)
        if needed is None or getattr(getattr(library, "core", None), needed, True):
            return None
        return Refused(
            Code.BROKEN,
            f"this build of SageAttention lacks the kernel: its core.{needed} is False",
            "Build it for this GPU (TORCH_CUDA_ARCH_LIST), or choose another kernel",
        )

    return check


SAGE = Backend(
    name="sage",
    family="SageAttention",
    op=_kernel("sage", "sageattn", True),
    summary="SageAttention: the variant that it chooses for the GPU",
    devices=frozenset({"cuda"}),
    capability=((8, 0), (12, 1)),
    not_on=frozenset({(8, 7), (10, 0), (10, 3), (11, 0)}),  # `sageattn` raises there
    dtypes=frozenset({"float16", "bfloat16"}),
    head_dim=HeadDim(max=128, multiple=64, pad=True),
    masks=frozenset({MaskKind.NONE, MaskKind.CAUSAL_UPPER_LEFT}),
    gqa=True,
    max_batch=65_535,
    layout="bshd",
    numerics=Numerics.QUANTISED,
    capturable=False,
    tolerance=Tolerance(6e-2, "int8 scores and fp8 values: 3.9e-2 measured on Gaussian data"),
    checks=(as_many_queries_as_keys, a_block_of_keys_on_sm_80),
    library_check=built_with(),
    tested="sm_90",
    source=Package("sageattention", "sageattention"),
    requires={"sageattention": ">=2.1.1"},
    install={"sageattention": "Build https://github.com/thu-ml/SageAttention; on PyPI there is 1.x alone"},
)
SAGE_HUB = replace(
    SAGE,
    name="sage_hub",
    tested="sm_90, as a package",
    source=Hub("SageAttention/sage-attention", version=3),
    requires={"kernels": ">=0.17"},
)
FP16 = Tolerance(3e-2, "int8 scores: 1.4e-2 measured on Gaussian data")
FP16_TRITON = replace(
    SAGE, name="_sage_qk_int8_pv_fp16_triton", op=_kernel("sage_fp16_triton", "sageattn_qk_int8_pv_fp16_triton", False),
    summary="int8 scores, float16 values, Triton",
    capability=((8, 0), (9, 0)), capturable=True, tolerance=FP16, checks=(as_many_queries_as_keys,), library_check=None,
)  # fmt: skip
FP16_CUDA = replace(
    FP16_TRITON, name="_sage_qk_int8_pv_fp16_cuda", op=_kernel("sage_fp16_cuda", "sageattn_qk_int8_pv_fp16_cuda", True),
    summary="int8 scores, float16 values, CUDA",
    capturable=False, checks=(as_many_queries_as_keys, a_block_of_keys), library_check=built_with("SM80_ENABLED"),
)  # fmt: skip
FP8_CUDA = replace(
    SAGE, name="_sage_qk_int8_pv_fp8_cuda", op=_kernel("sage_fp8_cuda", "sageattn_qk_int8_pv_fp8_cuda", True),
    summary="int8 scores, fp8 values",
    capability=((8, 9), (12, 1)), checks=(as_many_queries_as_keys,), library_check=built_with("SM89_ENABLED"),
)  # fmt: skip
FP8_SM90 = replace(
    SAGE, name="_sage_qk_int8_pv_fp8_cuda_sm90", op=_kernel("sage_fp8_cuda_sm90", "sageattn_qk_int8_pv_fp8_cuda_sm90", True),
    summary="int8 scores, fp8 values, for Hopper",
    capability=((9, 0), (9, 0)), checks=(as_many_queries_as_keys,), library_check=built_with("SM90_ENABLED"),
)  # fmt: skip
VARLEN = replace(
    FP16_TRITON, name="sage_varlen", op=packed_kernel("sage_varlen", varlen, tags=UNSAFE), prepare=packing, steps=packing_steps,
    summary="int8 scores, float16 values, on packed keys, for key padding",
    capturable=False, masks=SAGE.masks | {MaskKind.KEY_PADDING},
)  # fmt: skip
BLACKWELL = replace(
    SAGE_HUB,
    name="sage_blackwell_hub",
    op=calls_blackwell,
    summary="SageAttention 3: fp4, for Blackwell",
    capability=((10, 0), (12, 1)),
    not_on=frozenset(),
    head_dim=HeadDim(max=128, multiple=64),
    gqa=False,
    layout="bhsd",
    tested="stand-in",
    tolerance=Tolerance(2e-1, "fp4; not measured: no Blackwell GPU was at hand"),
    checks=(as_many_queries_as_keys, its_own_scale),
    library_check=None,
    source=Hub("SageAttention/sage-blackwell", version=1),
)


def _pypi_1(record: Backend, op: Kernel) -> Backend:
    """The same record for SageAttention 1.x, which has one kernel for all of these names."""
    return replace(
        record,
        op=op,
        capability=((8, 0), (9, 0)),
        capturable=record.prepare is None,
        masks=SAGE.masks,
        tolerance=FP16,
        checks=(as_many_queries_as_keys, whole_blocks_of_keys),
        library_check=None,
        requires={"sageattention": ">=1.0.6,<2"},
        install={},
    )


sage_1 = dense_kernel("sage_1", dense_1)
SAGE_1, TRITON_1 = (_pypi_1(record, sage_1) for record in (SAGE, FP16_TRITON))
VARLEN_1 = _pypi_1(VARLEN, packed_kernel("sage_1_varlen", varlen_1, tags=UNSAFE))

RECORDS = (
    SAGE, SAGE_1, SAGE_HUB, BLACKWELL, VARLEN, VARLEN_1, FP8_CUDA, FP8_SM90, FP16_CUDA, FP16_TRITON, TRITON_1,
)  # fmt: skip
