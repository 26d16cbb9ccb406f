"""FlashAttention 4 (CuTe). https://github.com/Dao-AILab/flash-attention (flash_attn/cute), tried with flash-attn-4 4.0.0b36.

The library compiles a kernel at the first call of each kind, which takes seconds. Causal is aligned lower-right. Calls with key
padding use the variable-length function, which also takes batched tensors and the number of keys in use (`seqused_k`). Under
any other boolean mask, as of documents or a prefix, the kernel gets lists of the blocks that are seen, skips the others, and
reads the mask in those that are seen in part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..graphs.sizes import described, holds
from ..kernels import ops
from ..kernels.block_lists import BLOCK, blocks_of, listed
from ..kernels.calls import AttentionCall, MaskKind
from ..kernels.decisions import Code, Refused, Step
from ..kernels.library_kernels import window_size
from ..kernels.machines import Machine
from ..kernels.packing import Leading, lead, leading, packing_steps
from ..kernels.records import Backend, HeadDim
from ..kernels.sources import Hub, Package


def forward(
    library: Any, query: Tensor, key: Tensor, value: Tensor, seqused_k: Tensor | None, causal: bool,
    scale: float | None, left: int, right: int, logsumexp: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    given: dict[str, Any] = {"return_lse": True} if logsumexp else {}
    if seqused_k is not None:
        given["seqused_k"] = seqused_k
    attention = library.flash_attn_func if seqused_k is None else library.flash_attn_varlen_func
    window = (_end(left), _end(right))
    result = attention(query, key, value, softmax_scale=scale, causal=causal, window_size=window, **given)
    output, found = result[:2] if isinstance(result, tuple) else (result, None)
    return output, found if logsumexp else query.new_empty(0, dtype=torch.float32)


def backward(
    library: Any, grad: Tensor, output: Tensor, logsumexp: Tensor, query: Tensor, key: Tensor, value: Tensor,
    seqused_k: Tensor | None, causal: bool, scale: float | None, left: int, right: int, _: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    # The kernel writes no gradient for keys that are not in use: it is zero.
    new = torch.empty_like if seqused_k is None else torch.zeros_like
    grads = dq, dk, dv = torch.empty_like(query), new(key), new(value)
    library.interface._flash_attn_bwd(
        query, key, value, output, grad, logsumexp, scale, causal,
        window_size_left=_end(left), window_size_right=_end(right), seqused_k=seqused_k,
        deterministic=torch.are_deterministic_algorithms_enabled(), dq=dq, dk=dk, dv=dv,
    )  # fmt: skip
    return grads


def _end(size: int) -> int | None:
    """One end of a window: the library takes None for all keys on that side."""
    return None if size < 0 else size


def fake(
    query: Tensor, key: Tensor, value: Tensor, _: Tensor | None, causal: bool, scale: float | None, left: int, right: int,
    logsumexp: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return ops.dense_output(query, value), ops.logsumexp_of(query, logsumexp)


FLASH_4 = ops.register(
    "flash_4",
    "(Tensor query, Tensor key, Tensor value, Tensor? seqused_k, bool causal, float? scale, int left, int right, "
    "bool wants_logsumexp) -> (Tensor, Tensor)",
    forward,
    fake,
    flops=ops.products,
    backward=backward,
    backward_flops=ops.backward_products,
)


# -- boolean masks


@dataclass(frozen=True)
class Seen:
    """A boolean mask, and the lists of its blocks."""

    mask: Tensor  # bool (batch or 1, heads or 1, q_len or 1, kv_len or 1)
    lists: tuple[Tensor, Tensor, Tensor, Tensor]  # of `listed`


def masked_forward(
    library: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, partly: Tensor, partly_at: Tensor,
    whole: Tensor, whole_at: Tensor, scale: float | None,
) -> Tensor:  # fmt: skip
    batch, q_len, heads, _ = query.shape
    lists = library.block_sparsity.BlockSparseTensorsTorch(
        partly, partly_at, whole, whole_at, block_size=(BLOCK, BLOCK)
    )
    output: Tensor = library.flash_attn_func(
        query, key, value, softmax_scale=scale, mask_mod=seen_at(library), pack_gqa=False, block_sparse_tensors=lists,
        aux_tensors=[mask.view(torch.uint8).expand(batch, heads, q_len, key.shape[1])], return_lse=True,
    )[0]  # fmt: skip
    return output


@cache
def seen_at(library: ModuleType) -> Any:
    """The library's `mask_mod` for a mask in memory. It gets vectors of one number, int32, and gives one of one bool.

    Rows behind the last query are asked for too, where a length cuts off a block: they read the last row.
    """
    import cutlass
    from cutlass import cute

    utils = library.utils

    @cute.jit
    def seen(batch, head, query, key, lengths, tensors):  # type: ignore[no-untyped-def]
        mask = tensors[0]
        row = cutlass.min(utils.ssa_to_scalar(query), lengths.seqlen_q - 1)
        column = cutlass.min(utils.ssa_to_scalar(key), lengths.seqlen_k - 1)
        read = cutlass.Int32(mask[utils.ssa_to_scalar(batch), utils.ssa_to_scalar(head), row, column])
        return utils.scalar_to_ssa(read, cutlass.Int32) == utils.scalar_to_ssa(cutlass.Int32(1), cutlass.Int32)

    return seen


FLASH_4_MASKED = ops.register(
    "flash_4_masked",
    "(Tensor query, Tensor key, Tensor value, Tensor mask, Tensor partly, Tensor partly_at, Tensor whole, Tensor whole_at, "
    "float? scale) -> Tensor",
    masked_forward,
    lambda query, key, value, *_: ops.dense_output(query, value),
    flops=ops.products,  # of dense attention: how many blocks are seen depends on the mask
)


def skips_blocks(call: AttentionCall) -> bool:
    """Whether the kernel gets lists of blocks: it takes key padding and windows in other ways."""
    return call.mask.is_boolean and call.mask.kind not in (MaskKind.KEY_PADDING, MaskKind.SLIDING_WINDOW)


def prepare(mask: Tensor | None, key: Tensor, call: AttentionCall) -> Leading | Seen | None:
    if mask is None or not skips_blocks(call):
        return leading(mask, key, call)
    return Seen(mask, listed(*blocks_of(mask, call)))


def steps(call: AttentionCall) -> tuple[Step, ...]:
    if not skips_blocks(call):
        return packing_steps(call)
    cost = "lists of blocks for each mask, which is read once for them"
    return (Step("skip_blocks", str(call.mask.kind.value), f"blocks of {BLOCK} x {BLOCK} that are seen", cost),)


# -- the code that is emitted into the graph


def flash_4(
    query: Tensor, key: Tensor, value: Tensor, prepared: Leading | Seen | None, *, call: AttentionCall,
    origin: ops.Origin,
) -> Tensor:  # fmt: skip
    if isinstance(prepared, Seen):
        output: Tensor = FLASH_4_MASKED(
            query, key, value, prepared.mask, *prepared.lists, call.scale, needs_grad=False, origin=origin
        )
        return output
    return flash_4_with_logsumexp(query, key, value, prepared, call=call, origin=origin)[0]


def flash_4_with_logsumexp(
    query: Tensor, key: Tensor, value: Tensor, used: Leading | None, *, call: AttentionCall, origin: ops.Origin
) -> tuple[Tensor, Tensor]:
    output, logsumexp = FLASH_4(
        query, lead(key, used), lead(value, used), used and used.seqused_k, call.mask.is_causal, call.scale,
        *window_size(call), call.needs_grad or call.logsumexp, needs_grad=call.needs_grad, origin=origin,
    )  # fmt: skip
    return output, logsumexp


# -- limits that no field of a record expresses


def masks_of_blocks(call: AttentionCall, machine: Machine) -> Refused | None:
    """Blackwell's kernel takes blocks of 256 queries, which was not tried; wide heads have narrower tiles on Hopper than a
    block; a backward wants the lists of columns too; the log-sum-exp of rows without a key was not tried."""
    if not skips_blocks(call):
        return None
    taken = f"flash_4 takes a mask like {call.mask.kind.value!r}"
    if machine.capability is not None and machine.capability != (9, 0):
        found = f"{machine.capability[0]}.{machine.capability[1]}"
        fix = "Choose flex or _native_efficient, or run on an H100 or H200"
        return Refused(Code.MASK, f"{taken} on a GPU of capability 9.0, this is {found}", fix)
    if call.needs_grad:
        detail = f"{taken} without a gradient, the call needs a gradient"
        return Refused(Code.GRAD, detail, "Choose flex or _native_efficient, or wrap the call in torch.no_grad()")
    if call.logsumexp:
        return Refused(
            Code.MASK,
            f"{taken} where nothing reads the log-sum-exp of its scores, as a ring does",
            "Choose _native_math, or another kind of context parallelism",
        )
    if not holds(call.head_dim <= BLOCK):
        detail = f"{taken} with head_dim up to {BLOCK}, this is {described(call.head_dim)}"
        return Refused(Code.HEAD_DIM, detail, "Choose flex or _native_efficient")
    return None


def head_dim_on_blackwell(call: AttentionCall, machine: Machine) -> Refused | None:
    """On sm_100 and sm_110 the limit is 128 (`_validate_head_dims` of flash_attn/cute/interface.py)."""
    if machine.capability is None or machine.capability[0] not in (10, 11) or holds(call.head_dim <= 128):
        return None
    if holds(call.head_dim == 192) and holds(call.value_dim == 128):
        return None
    detail = f"flash_4 takes head_dim up to 128 on this GPU, this is {described(call.head_dim)}"
    return Refused(Code.HEAD_DIM, detail, "Choose a kernel for wide heads")


def value_dims(call: AttentionCall, machine: Machine) -> Refused | None:
    """Where value_dim differs from head_dim, the library says that it takes both up to 256 on Hopper. With head_dim 64 and
    value_dim 256 ptxas runs out of registers; the backward was right for 192 and 128 only, for 64 and 128 it asks for too much
    shared memory. On Blackwell the library takes both up to 128, or 192 and 128."""
    if holds(call.value_dim == call.head_dim):
        return None
    deepseek = holds(call.head_dim == 192) and holds(call.value_dim == 128)
    on_hopper = machine.capability is not None and machine.capability[0] == 9
    if deepseek or (
        not call.needs_grad and holds(call.value_dim <= 128) and (on_hopper or holds(call.head_dim <= 128))
    ):
        return None
    taken = "head_dim 192 and value_dim 128" if call.needs_grad else "value_dim up to 128"
    return Refused(
        Code.VALUE_DIM,
        f"FlashAttention 4 takes another value_dim with {taken} here: "
        f"value_dim is {described(call.value_dim)} and head_dim {described(call.head_dim)}",
        "Choose a kernel that takes a value_dim other than head_dim",
    )


PACKAGE = Backend(
    name="flash_4",
    family="FlashAttention",
    op=flash_4,
    logsumexp=flash_4_with_logsumexp,
    summary="FlashAttention 4 (CuTe), compiled at the first call",
    devices=frozenset({"cuda"}),
    capability=((9, 0), (11, 0)),
    dtypes=frozenset({"float16", "bfloat16"}),
    head_dim=HeadDim(max=256, multiple=8, pad=True),
    masks=frozenset(MaskKind) - {MaskKind.CAUSAL_UPPER_LEFT, MaskKind.ADDITIVE},
    gqa=True,
    value_dim=True,
    max_batch=65_535,
    backward=True,
    layout="bshd",
    prepare=prepare,
    steps=steps,
    checks=(masks_of_blocks, value_dims, head_dim_on_blackwell),
    tested="sm_90",
    source=Package("flash-attn-4", "flash_attn.cute"),
    requires={"flash-attn-4": ">=4.0.0b1"},
)
FROM_HUB = replace(
    PACKAGE,
    name="flash_4_hub",
    # The internal functions of the hub's build are not known.
    backward=False,
    masks=frozenset({MaskKind.NONE, MaskKind.CAUSAL_LOWER_RIGHT, MaskKind.KEY_PADDING, MaskKind.SLIDING_WINDOW}),
    tested="sm_90, as a package",
    source=Hub("kernels-community/flash-attn4", version=0),
    requires={"kernels": ">=0.17"},
)

RECORDS = (PACKAGE, FROM_HUB)
