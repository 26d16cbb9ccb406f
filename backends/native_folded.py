"""Short sequences of a large batch, several of them in one sequence, on PyTorch's memory-efficient kernel.

A fused kernel computes tiles of 64 queries and keys, of which a sequence of 16 fills a sixteenth: temporal attention of video
UNets, where the pixels are the batch. Here `fold` neighbours of the batch stand one behind the other as one sequence, and a
bias hides them from each other: (batch, length, heads, dim) becomes (batch / fold, fold * length, heads, dim), which is a view
of what a projection writes. A number that is not finite reaches the neighbours too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from ..graphs.sizes import described, holds_if_guarded
from ..kernels.calls import AttentionCall, MaskKind
from ..kernels.decisions import Code, Refused, Step
from ..kernels.machines import Machine
from .native import EFFICIENT, aligned_bias, efficient

TILE = 64  # queries and keys


def of_an_even_batch(call: AttentionCall, machine: Machine) -> Refused | None:
    if holds_if_guarded(call.batch % 2 == 0):  # an exported program should not be bound to even batches
        return None
    detail = f"_native_folded takes an even batch, this is {described(call.batch)}"
    return Refused(Code.BATCH, detail, "Choose _native_efficient")


def _fold(call: AttentionCall) -> int:
    """How many sequences make one: the largest power of 2 that fits into a tile and divides the batch."""
    for fold in (32, 16, 8, 4):
        lengths = all(holds_if_guarded(length <= TILE // fold) for length in (call.q_len, call.kv_len))
        if lengths and holds_if_guarded(call.batch % fold == 0):
            return fold
    return 2


def folding(mask: Tensor | None, key: Tensor, call: AttentionCall) -> Tensor | None:
    """The bias (batch / fold, heads, fold * q_len, fold * kv_len) that hides from a query the keys of other sequences."""
    fold, q_len, kv_len = _fold(call), cast(int, call.q_len), cast(int, call.kv_len)
    row = torch.arange(fold * q_len, device=key.device)[:, None]
    column = torch.arange(fold * kv_len, device=key.device)[None, :]
    seen = row // q_len == column // kv_len
    if call.mask.is_causal:
        ahead = 0 if call.mask.kind is MaskKind.CAUSAL_UPPER_LEFT else kv_len - q_len
        seen = seen & (column % kv_len <= row % q_len + ahead)
    return aligned_bias(seen[None, None], key, _folded(call, fold))


def _folded(call: AttentionCall, fold: int) -> AttentionCall:
    mask = replace(call.mask, kind=MaskKind.ADDITIVE)
    return replace(call, batch=call.batch // fold, q_len=fold * call.q_len, kv_len=fold * call.kv_len, mask=mask)


def folded(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, *, call: AttentionCall) -> Tensor:
    fold = _fold(call)
    query, key, value = (
        tensor.reshape(call.batch // fold, -1, *tensor.shape[2:]).transpose(1, 2) for tensor in (query, key, value)
    )
    output = efficient(query, key, value, bias, call=_folded(call, fold))
    return output.transpose(1, 2).reshape(call.batch, call.q_len, call.heads, -1)


def steps(call: AttentionCall) -> tuple[Step, ...]:
    fold = _fold(call)
    return (Step("fold_batch", call.kv_len, fold * call.kv_len),)  # `fold` times the products


NATIVE_FOLDED = replace(
    EFFICIENT,
    name="_native_folded",
    op=folded,
    logsumexp=None,
    summary="the memory-efficient kernel on several short sequences at once",
    masks=frozenset({MaskKind.NONE, MaskKind.CAUSAL_UPPER_LEFT, MaskKind.CAUSAL_LOWER_RIGHT}),
    mask_grad=False,
    max_length=TILE // 2,
    dropout=False,
    layout="bshd",
    checks=(of_an_even_batch,),
    prepare=folding,
    steps=steps,
)

RECORDS = (NATIVE_FOLDED,)
