"""Which tensors of a graph are written to: what was read of them once may not be what they hold later."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from .graphs import value_of

_WRITES = frozenset({"setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"})
# Functions of these modules say by their name, `inplace=` or `out=` that they write. Of others nothing is known.
_KNOWN_MODULES = frozenset({"torch", "_operator", "operator", "math", "builtins", "_VariableFunctions"})


def written_storages(graph_module: GraphModule) -> set[int]:
    """The storages (`storage_of`) that some node writes into: `fill_`, `x[i] = y`, `x += y`, `out=`, `inplace=True`,
    `torch._foreach_mul_`, an op whose schema says so. An operator that says nothing counts as one that writes."""
    return {
        storage_of(tensor)
        for node in graph_module.graph.nodes
        for argument in _written_by(node)
        for tensor in tree_leaves(torch.fx.node.map_arg(argument, value_of))
        if isinstance(tensor, torch.Tensor)
    }


def storage_of(tensor: torch.Tensor) -> int:
    storage: int = tensor.untyped_storage()._cdata
    return storage


def _written_by(node: Node) -> Iterator[Any]:
    """The arguments that a node may write into."""
    if node.op == "call_method":
        name = str(node.target)
        if _in_place(name) or (name.startswith("__i") and name[3:-2] in {write[1:] for write in _WRITES}):
            yield node.args[0]
    elif node.op == "call_module":
        yield from (*node.args, *node.kwargs.values())
    elif node.op == "call_function":
        yield from _written_by_function(node.target, node.args, node.kwargs)


def _written_by_function(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    if isinstance(target, torch._ops.OpOverload):
        yield from _written_by_schema(target._schema, args, kwargs)
    elif isinstance(target, torch._ops.OpOverloadPacket):
        for overload in target.overloads():
            yield from _written_by_schema(getattr(target, overload)._schema, args, kwargs)
    elif isinstance(target, torch._ops.HigherOrderOperator) or not _is_known(target):
        yield from (*args, *kwargs.values())
    else:
        name = getattr(target, "__name__", "")
        if _in_place(name) or name in _WRITES or _says_inplace(target, args, kwargs):
            yield args[0] if args else next(iter(kwargs.values()))
        yield kwargs.get("out")


def _written_by_schema(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield kwargs.get(argument.name, args[position] if position < len(args) else None)


def _in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _is_known(target: Any) -> bool:
    module = (
        getattr(target, "__module__", None) or getattr(getattr(target, "__self__", None), "__name__", "") or "torch"
    )
    return str(module).partition(".")[0] in _KNOWN_MODULES


def _says_inplace(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if "inplace" in kwargs:
        return bool(kwargs["inplace"])
    if True not in args:
        return False
    try:
        return bool(inspect.signature(target).bind(*args, **kwargs).arguments.get("inplace", False))
    except (TypeError, ValueError):  # a builtin without a signature, none of which has `inplace`
        return False
