"""The ops that check the inputs of a rewritten program at every call. program_checks.h has them for C++.

They return nothing and have a side effect, so that torch.export, its decompositions, torch.compile and AOTInductor keep them;
AOTInductor drops `aten._assert_tensor_metadata`, the text of `aten._assert_scalar`, and what `ExportedProgram.module()` checks
of sizes (2.13). Registered when attnrewrite is imported: `torch.export.load` then finds them.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..kernels.ops import LIBRARY, NAMESPACE

HOLDS = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip


class AttentionAssertionError(RuntimeError):
    """A program was called with what its kernels were not chosen for. The message has the site, what was found and what is
    needed."""


def is_assertion(node: Node) -> bool:
    return node.op == "call_function" and node.target in CHECKS


REMEDY = "Call it as it was exported, or rewrite the program for such a call (attnrewrite.retarget)"


def _inputs_are(
    inputs: Sequence[Tensor],
    *,
    names: Sequence[str],
    dtypes: Sequence[str],
    kinds: Sequence[str],
    rows: Sequence[int],
    ranks: Sequence[int],
    least: Sequence[int],
    most: Sequence[int],
    sites: str,
) -> None:
    """For each input: its dtype and device type ("": any), whether its rows are dense, its rank; and for each dimension of each
    the least and the most that it may be (-1: no limit)."""
    lows, highs = iter(least), iter(most)
    for tensor, name, dtype, kind, row, rank in zip(inputs, names, dtypes, kinds, rows, ranks, strict=True):
        if dtype and tensor.dtype is not getattr(torch, dtype):
            found = str(tensor.dtype).removeprefix("torch.")
            raise AttentionAssertionError(f"{sites}: input {name!r} is {found}, needed is {dtype}. {REMEDY}")
        if kind and tensor.device.type != kind:
            raise AttentionAssertionError(
                f"{sites}: input {name!r} is on {tensor.device.type}, needed is {kind}. Move it, and the program "
                "(attnrewrite.load(path, device=...)), or rewrite the program for this device"
            )
        if tensor.dim() != rank:
            raise AttentionAssertionError(
                f"{sites}: input {name!r} has {tensor.dim()} dimensions, needed are {rank}. {REMEDY}"
            )
        if row and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise AttentionAssertionError(
                f"{sites}: input {name!r} has a stride of {tensor.stride(-1)} in its last dimension, needed is 1. Pass "
                f"{name}.contiguous()"
            )
        limits = zip(tensor.shape, lows, highs, strict=False)  # takes those of this tensor, and leaves the next ones'
        for dim, (size, low, high) in enumerate(limits):
            if size < low or (size > high >= 0):
                needed = f"{low}" if low == high else f"at least {low}" if size < low else f"at most {high}"
                raise AttentionAssertionError(
                    f"{sites}: input {name!r} has size {size} in dimension {dim}, needed is {needed}. {REMEDY}"
                )


def _size_is(anchor: Tensor, found: int, needed: int, *, relation: str, says: str, sites: str) -> None:
    if not HOLDS[relation](found, needed):
        raise AttentionAssertionError(
            f"{sites}: needed is {says}, found {found}, where {relation} {needed} must hold. {REMEDY}"
        )


def _no_gradient(tensors: Sequence[Tensor], *, sites: str) -> None:
    """The graph of an exported program does not say whether a gradient is needed: kernels are chosen for an inference."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise AttentionAssertionError(
            f"{sites}: a gradient is asked for, the kernel was chosen for an inference. Call the program under torch.no_grad()"
        )


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _define(name: str, schema: str, real: Any) -> Any:
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", _nothing, lib=LIBRARY)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    torch.fx.node.has_side_effect(op)
    return op


CHECK_INPUTS = _define(
    "check_program_inputs",
    "(Tensor[] inputs, *, str[] names, str[] dtypes, str[] kinds, int[] rows, int[] ranks, int[] least, int[] most, "
    "str sites) -> ()",
    _inputs_are,
)
CHECK_SIZE = _define(
    "check_program_size",
    "(Tensor anchor, SymInt found, SymInt needed, *, str relation, str says, str sites) -> ()",
    _size_is,
)
CHECK_GRADIENT = _define("check_program_gradient", "(Tensor[] tensors, *, str sites) -> ()", _no_gradient)
CHECKS = (CHECK_INPUTS, CHECK_SIZE, CHECK_GRADIENT)
