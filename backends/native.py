"""PyTorch's own kernels, called as the aten operators that `F.scaled_dot_product_attention` chooses among.

Limits are those of `aten/src/ATen/native/transformers/cuda/sdp_utils.cpp` and `sdp_utils_cpp.h`, checked on torch 2.9, 2.11 and
2.13. The operators check less than SDPA does before it calls them, so a record must check the rest:
`_scaled_dot_product_attention_math` and `_scaled_dot_product_cudnn_attention` add a boolean mask as 1 and 0 to the scores; the
CPU kernel reads strided rows as if they were dense, does not broadcast the batch, and divides by zero at length 0.
"""

from contextlib import nullcontext
from dataclasses import replace
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from ..graphs.sizes import always, described, holds, holds_if_guarded, is_one
from ..kernels.calls import AttentionCall, Mask, MaskKind
from ..kernels.decisions import Code, Refused
from ..kernels.derivatives import compilers_misread
from ..kernels.logsumexp import NAME
from ..kernels.machines import Machine, satisfies
from ..kernels.ops import LIBRARY
from ..kernels.records import Backend, HeadDim, Numerics

aten = torch.ops.aten
HALF = frozenset({"float16", "bfloat16"})
GRID = 65_535  # CUDA's limit for the second and third dimension of a grid
DENSE = frozenset({MaskKind.NONE, MaskKind.CAUSAL_UPPER_LEFT, MaskKind.BOOLEAN, MaskKind.ADDITIVE})


def additive(mask: Tensor | None, key: Tensor, call: AttentionCall) -> Tensor | None:
    """The mask as a bias: a boolean mask becomes 0 where a key takes part and -inf elsewhere."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    zero = torch.zeros((), dtype=getattr(torch, call.dtype), device=mask.device)
    return torch.where(mask, zero, float("-inf"))


def aligned_bias(mask: Tensor | None, key: Tensor, call: AttentionCall) -> Tensor | None:
    """A bias for the memory-efficient kernel: expanded to (batch, heads, q_len, kv_len), with rows that start at multiples of
    16 elements."""
    bias = additive(mask, key, call)
    if bias is None:
        return None
    if is_one(bias.shape[-1]):
        bias = bias.expand(*bias.shape[:-1], call.kv_len)
    if not holds_if_guarded(call.kv_len % 16 == 0):  # pad makes a copy, so that the last stride is 1 too
        missing: Any = (0, 16 - call.kv_len % 16)
        bias = torch.nn.functional.pad(bias, missing)[..., : call.kv_len]
    elif not always(bias.stride(-1) == 1) or not all(
        size == 1 or always(stride % 16 == 0) for size, stride in zip(bias.shape, bias.stride()[:-1], strict=False)
    ):
        bias = bias.clone(memory_format=torch.contiguous_format)
    return bias.expand(call.batch, call.heads, call.q_len, call.kv_len)


def full_bias(mask: Tensor | None, key: Tensor, call: AttentionCall) -> Tensor | None:
    """A bias expanded to q_len and kv_len in its last two sizes: kernels broadcast batch and heads."""
    bias = additive(mask, key, call)
    return None if bias is None else bias.expand(bias.shape[0], bias.shape[1], call.q_len, call.kv_len)


def math(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, call: AttentionCall) -> Tensor:
    scale = call.scale
    if scale is None and isinstance(call.head_dim, int):
        # Without one the operator computes with the size, where a compiler that traces anew (OpenVINO 2026.4) finds a symbol.
        scale = 1.0 / sqrt(call.head_dim)
    output: Tensor = aten._scaled_dot_product_attention_math.default(
        query,
        key,
        value,
        bias,
        call.dropout,
        call.mask.is_causal,
        None,
        scale=scale,
        enable_gqa=not always(call.heads == call.kv_heads),
    )[0]
    return output


def flash_cpu(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, call: AttentionCall) -> Tensor:
    if compilers_misread(call):
        return math(query, key, value, bias, call=call)
    return flash_cpu_with_logsumexp(query, key, value, bias, call=call)[0]


def flash_cpu_with_logsumexp(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    if compilers_misread(call):
        return math_with_logsumexp(query, key, value, bias, call=call)
    output, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu.default(
        query, key, value, 0.0, call.mask.is_causal, attn_mask=bias, scale=call.scale
    )
    return output, logsumexp


def flash_cuda(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, call: AttentionCall) -> Tensor:
    return flash_cuda_with_logsumexp(query, key, value, bias, call=call)[0]


def flash_cuda_with_logsumexp(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    output, logsumexp, *_ = aten._scaled_dot_product_flash_attention.default(
        query, key, value, call.dropout, call.mask.is_causal, False, scale=call.scale
    )
    return output, logsumexp


def _efficient(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, call: AttentionCall) -> Any:
    return aten._scaled_dot_product_efficient_attention.default(
        query, key, value, bias, call.needs_grad or call.logsumexp, call.dropout, call.mask.is_causal, scale=call.scale
    )


def efficient(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, call: AttentionCall) -> Tensor:
    output: Tensor = _efficient(query, key, value, bias, call)[0]
    return output


def efficient_with_logsumexp(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    output, logsumexp, *_ = _efficient(query, key, value, bias, call)
    return output, logsumexp.narrow(2, 0, call.q_len)  # rows are filled up to a multiple of 32


def _cudnn(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, call: AttentionCall) -> Any:
    with_logsumexp = call.needs_grad or call.logsumexp
    return aten._scaled_dot_product_cudnn_attention.default(
        query, key, value, bias, with_logsumexp, call.dropout, call.mask.is_causal, False, scale=call.scale
    )


def cudnn(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, call: AttentionCall) -> Tensor:
    output: Tensor = _cudnn(query, key, value, bias, call)[0]
    return output


def cudnn_with_logsumexp(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    output, logsumexp, *_ = _cudnn(query, key, value, bias, call)
    return output, logsumexp.squeeze(-1)  # (batch, heads, q_len, 1)


def math_with_logsumexp(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    key, value = (_for_each_head(each, call) for each in (key, value))
    device = query.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        scores = (query.to(dtype) * (call.scale or query.shape[-1] ** -0.5)) @ key.to(dtype).mT
        if bias is not None:
            scores = scores + bias
        if call.mask.is_causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(hidden, float("-inf"))
        output = scores.softmax(-1) @ value.to(dtype)
    # Not exp(scores - logsumexp): beside a mask of -3e38 the log-sum-exp has lost the number of keys.
    return output.to(query.dtype), scores.logsumexp(-1)


def _for_each_head(tensor: Tensor, call: AttentionCall) -> Tensor:
    """Keys or values with a head for each head of the queries."""
    return tensor if always(call.heads == call.kv_heads) else tensor.repeat_interleave(call.heads // call.kv_heads, 1)


def with_logsumexp(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, site: str
) -> tuple[Tensor, Tensor]:
    """The op of kernels/logsumexp.py, as an operator of PyTorch that returns both: the one that SDPA would choose, as far as it
    is known without running it."""
    batch, heads, q_len, head_dim = query.shape
    kind = MaskKind.CAUSAL_UPPER_LEFT if is_causal else MaskKind.NONE
    call = AttentionCall(
        site, batch, heads, key.shape[1], q_len, key.shape[2], head_dim, value.shape[3],
        str(query.dtype).removeprefix("torch."), query.device.type, Mask(kind), scale, logsumexp=True,
    )  # fmt: skip
    same_dim, half = always(call.head_dim == call.value_dim), query.dtype in (torch.float16, torch.bfloat16)
    of_eight = all(always(size % 8 == 0) for size in (call.head_dim, call.value_dim))
    if query.is_cuda and not torch.version.hip:
        if half and of_eight and _prefers_cudnn(query, call):
            return cudnn_with_logsumexp(query, key, value, full_bias(mask, key, call), call=call)
        if (
            half
            and mask is None
            and same_dim
            and always(call.head_dim <= 256)
            and torch.backends.cuda.flash_sdp_enabled()
        ):
            return _flash_padded(query, key, value, call)
        if query.dtype != torch.float64 and of_eight and torch.backends.cuda.mem_efficient_sdp_enabled():
            key, value = (_for_each_head(each, call) for each in (key, value))
            return efficient_with_logsumexp(query, key, value, aligned_bias(mask, key, call), call=call)
    bias = full_bias(mask, key, call)
    if query.device.type == "cpu" and same_dim and torch.backends.cuda.flash_sdp_enabled():
        return flash_cpu_with_logsumexp(query, key, value, bias, call=call)
    return math_with_logsumexp(query, key, value, bias, call=call)


def _prefers_cudnn(query: Tensor, call: AttentionCall) -> bool:
    """Whether SDPA would choose cuDNN (sdp_utils.cpp: on Hopper and data-centre Blackwell)."""
    if not torch.backends.cuda.cudnn_sdp_enabled() or (torch.backends.cudnn.version() or 0) < 90000:
        return False
    major, minor = torch.cuda.get_device_capability(query.device)
    narrow = always(call.head_dim <= 128) and always(call.value_dim <= 128) and always(call.kv_len >= 2)
    return narrow and ((major, minor) == (9, 0) or major == 10)


def _flash_padded(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Heads of a multiple of 8, as SDPA makes them."""
    head_dim = query.shape[-1]
    if always(head_dim % 8 == 0):
        return flash_cuda_with_logsumexp(query, key, value, None, call=call)
    missing: Any = (0, 8 - head_dim % 8)
    call = replace(call, scale=float(head_dim) ** -0.5 if call.scale is None else call.scale)
    query, key, value = (torch.nn.functional.pad(each, missing) for each in (query, key, value))
    output, logsumexp = flash_cuda_with_logsumexp(query, key, value, None, call=call)
    return output[..., :head_dim], logsumexp


LIBRARY.impl(NAME, with_logsumexp, "CompositeImplicitAutograd")


def flash_backward_on_consumer_gpus(call: AttentionCall, machine: Machine) -> Refused | None:
    """sm_86, 87, 89, 120 and 121 have too little shared memory for the backward of wide heads."""
    if not call.needs_grad or machine.capability not in {(8, 6), (8, 7), (8, 9), (12, 0), (12, 1)}:
        return None
    if holds(call.head_dim <= 192) or (call.dropout == 0 and holds(call.head_dim > 224)):
        return None
    return Refused(
        Code.HEAD_DIM,
        f"the backward of _native_flash on this GPU takes head_dim up to 192, this is {described(call.head_dim)}",
        "Choose another kernel for training",
    )


def random_state_of_uint64(call: AttentionCall, machine: Machine) -> Refused | None:
    """The operator also returns its random state in uint64, a dtype that `torch.export.save` knows on 2.13, not on 2.11."""
    if not call.exported or satisfies(torch.__version__, ">=2.13"):
        return None
    return Refused(
        Code.VERSION,
        f"torch.export.save writes the kernel's uint64 random state from torch 2.13 on, this is {torch.__version__}",
        "Export with a newer PyTorch, or choose another kernel",
    )


def rows_of_the_bias(call: AttentionCall, machine: Machine) -> Refused | None:
    """Asks the question of `aligned_bias` during the decision, so that a kv_len that depends on data is refused."""
    if call.mask.is_tensor:
        holds_if_guarded(call.kv_len % 16 == 0)
    return None


def float32_mask_of_float64(call: AttentionCall, machine: Machine) -> Refused | None:
    """The CPU kernel misreads a float32 mask of a float64 call: relative error 0.8 from 16 keys on (2.13)."""
    if call.dtype != "float64" or call.mask.dtype != "float32":
        return None
    return Refused(
        Code.MASK,
        "the CPU kernel misreads a float32 mask of a float64 call",
        "Make the mask in float64, or choose another kernel",
    )


def causal_with_a_scale_of_zero_or_less(call: AttentionCall, machine: Machine) -> Refused | None:
    """The CPU kernel multiplies the -inf of scores hidden by causal by the scale, which gives NaN (2.13)."""
    if not call.mask.is_causal or call.scale is None or call.scale > 0:
        return None
    return Refused(
        Code.CAUSAL, f"the CPU kernel gives NaN for causal with a scale of {call.scale:g}", "Choose another kernel"
    )


def cudnn_dropout(call: AttentionCall, machine: Machine) -> Refused | None:
    if (call.dropout * 16).is_integer():
        return None
    return Refused(
        Code.DROPOUT,
        f"cuDNN takes dropout in steps of 1/16, the call has p={call.dropout:g}",
        "Use a multiple of 0.0625, or choose another kernel",
    )


def cudnn_head_dim(call: AttentionCall, machine: Machine) -> Refused | None:
    """The limit is 128. On Hopper and data-centre Blackwell it is 256, forward only, where PyTorch allows it: torch 2.11 with
    cuDNN 9.19 does (run there); later sources of PyTorch need a cuDNN newer than 9.22."""
    torch_version, cudnn_version = machine.packages.get("torch", "0"), machine.packages.get("cudnn", "0")
    wide = machine.capability is not None and (machine.capability == (9, 0) or machine.capability[0] == 10)
    wide = wide and (not satisfies(torch_version, ">=2.12") or satisfies(cudnn_version, ">9.22.0"))
    limit = 256 if wide and not call.needs_grad else 128
    for name, size in (("head_dim", call.head_dim), ("value_dim", call.value_dim)):
        if not holds(size <= limit):
            return Refused(
                Code.HEAD_DIM,
                f"cuDNN takes {name} up to {limit} here, this is {described(size)}",
                "Choose a kernel for wide heads",
            )
    return None


def cudnn_length(call: AttentionCall, machine: Machine) -> Refused | None:
    if holds(call.kv_len >= 2, at_run_time=True):
        return None
    return Refused(
        Code.LENGTH, f"cuDNN needs kv_len of at least 2, this is {described(call.kv_len)}", "Choose another kernel"
    )


def what_sdpa_computes(call: AttentionCall, machine: Machine) -> Refused | None:
    """What is no SDPA yet becomes one SDPA call. SDPA's `is_causal` is upper-left. With a scale of 0 or less SDPA's
    kernels give NaN: on a CPU for causal, on a GPU always (cuDNN and FlashAttention)."""
    if call.is_sdpa:
        return None
    if call.scale is not None and not call.scale > 0 and (call.mask.is_causal or call.device != "cpu"):
        return Refused(Code.SCALE, f"SDPA may give NaN with a scale of {call.scale:g}", "Choose _native_math")
    if not call.mask.is_causal or call.mask.kind is MaskKind.CAUSAL_UPPER_LEFT or always(call.q_len == call.kv_len):
        return None
    return Refused(Code.CAUSAL, "SDPA has no causal lower-right", "Choose a kernel that takes such a mask")


def dropout_of_large_batches(call: AttentionCall, machine: Machine) -> Refused | None:
    """The operator computes larger batches in parts, and then it has no random state to return."""
    if call.dropout == 0 or holds(call.batch <= GRID):
        return None
    detail = f"the memory-efficient kernel drops out in batches up to {GRID:,}, this is {described(call.batch)}"
    return Refused(Code.BATCH, detail, "Call model.eval(), or train with a smaller batch")


def cudnn_backward_of_large_batches(call: AttentionCall, machine: Machine) -> Refused | None:
    """The backward of a larger batch raises (torch 2.11, cuDNN 9.19, H200); the forward is right."""
    if not call.needs_grad or holds(call.batch <= GRID):
        return None
    detail = f"cuDNN has a backward for batches up to {GRID:,}, this is {described(call.batch)}"
    return Refused(Code.BATCH, detail, "Train with a smaller batch, or choose _native_efficient")


ANY = frozenset({"float16", "bfloat16", "float32", "float64"})

NATIVE = Backend(
    name="native",
    family="PyTorch",
    op=None,
    summary="F.scaled_dot_product_attention unchanged: PyTorch chooses the kernel",
    devices=frozenset({"cpu", "cuda", "rocm", "meta", "mps", "xla", "tpu", "npu", "xpu", "hpu", "privateuseone"}),
    dtypes=ANY | {"complex64", "complex128", "float8_e4m3fn", "float8_e5m2"},
    masks=DENSE | {MaskKind.CAUSAL_LOWER_RIGHT},
    mask_dtypes=ANY,
    mask_grad=True,
    gqa=True,
    value_dim=True,
    dropout=True,
    backward=True,
    empty=True,
    any_context=True,
    any_scale=True,  # an SDPA call stays as the model wrote it
    checks=(what_sdpa_computes,),
    numerics=Numerics.EXACT,
    tested="CPU, sm_90",
)

FLASH_CUDA = Backend(
    name="_native_flash",
    family="PyTorch",
    op=flash_cuda,
    logsumexp=flash_cuda_with_logsumexp,
    summary="FlashAttention 2 inside PyTorch; on CPU its tiled kernel",
    devices=frozenset({"cuda"}),
    capability=((8, 0), (12, 1)),
    dtypes=HALF,
    head_dim=HeadDim(max=256, multiple=8, pad=True),
    masks=frozenset({MaskKind.NONE, MaskKind.CAUSAL_LOWER_RIGHT}),
    gqa=True,
    dropout=True,
    max_batch=GRID,
    backward=True,
    always_differentiable=True,
    checks=(random_state_of_uint64, flash_backward_on_consumer_gpus),
    tested="sm_90",
)

FLASH_CPU = Backend(
    name="_native_flash",
    family="PyTorch",
    op=flash_cpu,
    logsumexp=flash_cpu_with_logsumexp,
    summary=FLASH_CUDA.summary,
    devices=frozenset({"cpu"}),
    dtypes=ANY,
    masks=DENSE,
    mask_dtypes=frozenset({"float32"}),
    gqa=True,
    any_scale=True,
    backward=True,
    always_differentiable=True,
    checks=(float32_mask_of_float64, causal_with_a_scale_of_zero_or_less),
    prepare=full_bias,
    tested="CPU",
)

EFFICIENT = Backend(
    name="_native_efficient",
    family="PyTorch",
    op=efficient,
    logsumexp=efficient_with_logsumexp,
    summary="the memory-efficient (CUTLASS) kernel inside PyTorch",
    devices=frozenset({"cuda"}),
    capability=((8, 0), (12, 1)),
    dtypes=HALF | {"float32"},
    head_dim=HeadDim(multiple=8, pad=True),
    masks=DENSE,
    mask_grad=True,
    value_dim=True,
    any_scale=True,
    dropout=True,
    backward=True,
    checks=(rows_of_the_bias, dropout_of_large_batches),
    prepare=aligned_bias,
    tested="sm_90",
)

CUDNN = Backend(
    name="_native_cudnn",
    family="PyTorch",
    op=cudnn,
    logsumexp=cudnn_with_logsumexp,
    summary="cuDNN's fused attention",
    devices=frozenset({"cuda"}),
    capability=((8, 0), (12, 1)),
    dtypes=HALF,
    head_dim=HeadDim(multiple=8, pad=True),
    masks=DENSE,
    gqa=True,
    value_dim=True,
    dropout=True,
    backward=True,
    deterministic=False,
    requires={"cudnn": ">=9.0"},
    install={"cudnn": "Use a build of PyTorch with cuDNN 9 or newer"},
    checks=(cudnn_dropout, cudnn_head_dim, cudnn_length, cudnn_backward_of_large_batches),
    prepare=full_bias,
    tested="sm_90",
)

MATH = Backend(
    name="_native_math",
    family="PyTorch",
    op=math,
    logsumexp=math_with_logsumexp,
    summary="matmul, softmax, matmul: any device, most memory",
    devices=NATIVE.devices,
    dtypes=ANY,
    masks=DENSE,
    mask_grad=True,
    gqa=True,
    value_dim=True,
    any_scale=True,
    dropout=True,
    backward=True,
    always_differentiable=True,
    empty=True,
    all_scores=True,
    prepare=additive,
    tested="CPU, sm_90",
)

RECORDS = (NATIVE, FLASH_CUDA, FLASH_CPU, EFFICIENT, CUDNN, MATH)
