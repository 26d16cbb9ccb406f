"""The ops that check the inputs of a rewritten program at every call. program_checks.h implements the same ops for C++.

The ops return nothing and are marked as having a side effect, so torch.export, its decompositions, torch.compile and
AOTInductor keep them. PyTorch's own checks do not survive: AOTInductor drops `aten._assert_tensor_metadata`, the text of
`aten._assert_scalar`, and the size checks of `ExportedProgram.module()` (2.13). Importing attnrewrite registers the ops;
`torch.export.load` then finds them.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..graphs.exported import fake_of_check
from ..graphs.nodes import dtype_name
from ..kernels.ops import LIBRARY, NAMESPACE

HOLDS = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip


class AttentionAssertionError(RuntimeError):
    """A program was called with inputs that its kernels were not chosen for. The message names the attention site, the value
    that was found and the value that is needed."""


def is_assertion(node: Node) -> bool:
    return node.op == "call_function" and node.target in CHECKS


LEFT_OUT = (
    "an ONNX model has no checks of what the kernels of this program were chosen for, and not every kernel is right there: "
    "attnrewrite.portable(program) gives a program for it"
)
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
    """Checks dtype, device type, rank, the last stride and the sizes of the inputs.

    names, dtypes, kinds, rows, ranks: one value for each input: its name, dtype, device type ("": any, for dtype and device),
        1 if its last dimension must have stride 1, and its rank.
    least, most: one value for each dimension of each input: the smallest and the largest size (most -1: no limit).
    """
    lows, highs = iter(least), iter(most)
    for tensor, name, dtype, kind, row, rank in zip(inputs, names, dtypes, kinds, rows, ranks, strict=True):
        if dtype and tensor.dtype is not getattr(torch, dtype):
            found = dtype_name(tensor.dtype)
            raise AttentionAssertionError(f"{sites}: input {name!r} is {found}, the program needs {dtype}. {REMEDY}")
        if kind and tensor.device.type != kind:
            raise AttentionAssertionError(
                f"{sites}: input {name!r} is on {tensor.device.type}, the program needs {kind}. Move the input, and the "
                "program (attnrewrite.load(path, device=...)), or rewrite the program for this device"
            )
        if tensor.dim() != rank:
            raise AttentionAssertionError(
                f"{sites}: input {name!r} has {tensor.dim()} dimensions, the program needs {rank}. {REMEDY}"
            )
        if row and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise AttentionAssertionError(
                f"{sites}: input {name!r} has a stride of {tensor.stride(-1)} in its last dimension, the program needs 1. Pass "
                f"{name}.contiguous()"
            )
        limits = zip(tensor.shape, lows, highs, strict=False)  # consumes the limits of this tensor only
        for dim, (size, low, high) in enumerate(limits):
            if size < low or (size > high >= 0):
                needed = f"{low}" if low == high else f"at least {low}" if size < low else f"at most {high}"
                raise AttentionAssertionError(
                    f"{sites}: input {name!r} has size {size} in dimension {dim}, the program needs {needed}. {REMEDY}"
                )


def _size_is(anchor: Tensor, found: int, needed: int, *, relation: str, says: str, sites: str) -> None:
    if not HOLDS[relation](found, needed):
        raise AttentionAssertionError(
            f"{sites}: {says} must hold, but the left side is {found} and the right side is {needed}. {REMEDY}"
        )


def _no_gradient(tensors: Sequence[Tensor], *, sites: str) -> None:
    """The graph of an exported program does not say whether a gradient is needed, so kernels are chosen for inference."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise AttentionAssertionError(
            f"{sites}: a gradient is asked for, but the kernel was chosen for inference. Call the program under torch.no_grad()"
        )


def _define(name: str, schema: str, real: Any) -> Any:
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, real, "CompositeExplicitAutograd")
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake_of_check(op, LEFT_OUT), lib=LIBRARY)
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
