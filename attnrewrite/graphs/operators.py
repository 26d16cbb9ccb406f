"""Kinds of node targets, by PyTorch's classes: `torch.ops.aten.mul.Tensor` is an operator, `torch.ops.aten.mul` a packet of
several operators, `torch.ops.higher_order.cond` a higher-order operator, which takes graphs."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch.fx import Node

_KNOWN_MODULES = frozenset({"torch", "_operator", "operator", "math", "builtins"})


def is_operator(target: Any) -> TypeGuard[torch._ops.OpOverload]:
    return isinstance(target, torch._ops.OpOverload)


def is_pytorchs(target: Any) -> bool:
    """Whether a function or an operator is PyTorch's or Python's own: what it reads and writes is known by its name. Dynamo's
    own functions are not: they call a function of the user, as that of `nonstrict_trace`."""
    if is_operator(target) or is_packet(target):
        return _name_of(target)[0] in ("aten", "prims")
    module = (
        getattr(target, "__module__", None) or getattr(getattr(target, "__self__", None), "__name__", "") or "torch"
    )
    return str(module).partition(".")[0] in _KNOWN_MODULES and not str(module).startswith("torch._dynamo")


def is_opaque(target: Any) -> bool:
    """Whether a target is a Python function of a user or a library, put into the graph as one node by
    `torch.compiler.allow_in_graph`."""
    known = is_operator(target) or is_packet(target) or is_higher_order(target) or is_pytorchs(target)
    return callable(target) and not known


def is_packet(target: Any) -> TypeGuard[torch._ops.OpOverloadPacket]:
    return isinstance(target, torch._ops.OpOverloadPacket)


def is_higher_order(target: Any) -> TypeGuard[torch._ops.HigherOrderOperator]:
    return isinstance(target, torch._ops.HigherOrderOperator)


def schema_of(target: Any) -> Any:
    """The schema of an operator, or of a packet's default operator, with `.arguments` and `.returns`."""
    return (target if is_operator(target) else target.default)._schema


def arguments_of(node: Node) -> dict[str, Any]:
    """All arguments of an operator's node by the names of its schema, with the schema's defaults; None where it has none."""
    wanted = schema_of(node.target).arguments
    defaults = {each.name: each.default_value if each.has_default_value() else None for each in wanted}
    return {**defaults, **dict(zip(defaults, node.args, strict=False)), **node.kwargs}


def as_given(node: Node, arguments: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The reverse of `arguments_of`: arguments by position and by name, as the schema takes them. Defaults that the node leaves
    out stay out."""
    schema = schema_of(node.target).arguments
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for each in schema:
        given = arguments.get(each.name, each.default_value)
        if each.kwarg_only:
            if each.name in node.kwargs or given != each.default_value:
                kwargs[each.name] = given
        else:
            args.append(given)
    last = max([number for number, each in enumerate(args) if not _is_default(each, schema[number])], default=-1)
    return tuple(args[: last + 1]), kwargs


def _is_default(value: Any, argument: Any) -> bool:
    if not argument.has_default_value() or isinstance(
        value, torch.Tensor | torch.SymInt | torch.SymFloat | list | tuple
    ):
        return False
    return bool(value == argument.default_value) and type(value) is type(argument.default_value)


def name_in_aten(target: Any) -> str | None:
    """ "mul" for the operators and the packet of aten.mul; None for targets outside of aten."""
    space, name = _name_of(target)
    return name if space == "aten" else None


def qualified_name(target: Any) -> str:
    """ "flash_attn::_flash_attn_forward" for an operator, with any overload, or a packet; "" for another target."""
    space, name = _name_of(target)
    return f"{space}::{name}" if space else ""


def draws_random_numbers(name: str) -> bool:
    """Whether the aten operators of a name draw random numbers, as "dropout" does."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return False
    tags = (getattr(packet, overload).tags for overload in packet.overloads())
    return any(torch.Tag.nondeterministic_seeded in each for each in tags)


def _name_of(target: Any) -> tuple[str, str]:
    """Namespace and name of an operator or a packet; empty texts for another target."""
    if is_operator(target):
        return target.namespace, target._opname
    space, _, name = target._qualified_op_name.partition("::") if is_packet(target) else ("", "", "")
    return space, name


def defined_in_python(target: Any) -> bool:
    """Whether an operator was defined by `torch.library`; C++ libraries use TORCH_LIBRARY."""
    return is_operator(target) and target.name().partition(".")[0] in torch.library._defs
