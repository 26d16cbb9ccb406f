"""Kinds of node targets, by PyTorch's classes: `torch.ops.aten.mul.Tensor` is an operator, `torch.ops.aten.mul` a packet of
several operators, `torch.ops.higher_order.cond` a higher-order operator, which takes graphs."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch


def is_operator(target: Any) -> TypeGuard[torch._ops.OpOverload]:
    return isinstance(target, torch._ops.OpOverload)


def is_packet(target: Any) -> TypeGuard[torch._ops.OpOverloadPacket]:
    return isinstance(target, torch._ops.OpOverloadPacket)


def is_higher_order(target: Any) -> TypeGuard[torch._ops.HigherOrderOperator]:
    return isinstance(target, torch._ops.HigherOrderOperator)


def schema_of(target: Any) -> Any:
    """The schema of an operator, or of a packet's default operator, with `.arguments` and `.returns`."""
    return (target if is_operator(target) else target.default)._schema


def name_in_aten(target: Any) -> str | None:
    """ "mul" for the operators and the packet of aten.mul; None for targets outside of aten."""
    if is_operator(target):
        space, name = target.namespace, target._opname
    elif is_packet(target):
        space, _, name = target._qualified_op_name.partition("::")
    else:
        return None
    return name if space == "aten" else None


def defined_in_python(target: Any) -> bool:
    """Whether an operator was defined by `torch.library`; C++ libraries use TORCH_LIBRARY."""
    return is_operator(target) and target.name().partition(".")[0] in torch.library._defs
