"""One name for each operation, however a graph spells it: as function, method, operator, in-place method or aten overload."""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from .nodes import value_of
from .notes import literal_of
from .operators import is_operator, is_packet, name_in_aten
from .sizes import UnbackedSizeError, always

# The owners of PyTorch's functions: a user's own function may be called `where` too.
_SPECIAL = torch._C._special  # type: ignore[attr-defined]  # torch.special.softmax is called special_softmax
_OWNERS = (torch, torch.Tensor, F, torch._C._nn, _SPECIAL, torch.special, operator, builtins)
# Python's operators by their names in torch.
_OPERATORS = {
    "and_": "bitwise_and", "or_": "bitwise_or", "and": "bitwise_and", "or": "bitwise_or",
    "invert": "bitwise_not", "truediv": "div", "floordiv": "floor_divide", "mod": "remainder",
    "iadd": "add_", "isub": "sub_", "imul": "mul_", "itruediv": "div_", "iand": "bitwise_and_", "ior": "bitwise_or_",
}  # fmt: skip
_SAME = {
    "multiply": "mul", "divide": "div", "true_divide": "div", "subtract": "sub", "reshape": "view", "_unsafe_view": "view",
    "view_as": "view", "reshape_as": "view", "unsqueeze": "view", "squeeze": "view", "flatten": "view", "unflatten": "view",
    "contiguous": "clone", "alias": "clone", "swapaxes": "transpose", "swapdims": "transpose", "expand_as": "expand",
    "broadcast_to": "expand", "float": "to", "half": "to", "bfloat16": "to", "double": "to", "type": "to", "type_as": "to",
    "_to_copy": "to", "bitwise_not": "logical_not", "_softmax": "softmax", "_log_softmax": "log_softmax",
    "special_softmax": "softmax", "special_log_softmax": "log_softmax", "special_logsumexp": "logsumexp",
    "special_exp2": "exp2", "_safe_softmax": "softmax", "mm": "matmul", "bmm": "matmul", "tile": "repeat",
}  # fmt: skip
TURNS = frozenset({"transpose", "permute", "movedim", "getattr", "mT", "adjoint", "t", "T", "numpy_T"})


def name_of(node: Node) -> str:
    """PyTorch's name of a node's operation, in a Dynamo or an exported graph: "masked_fill_" for the method and for
    aten.masked_fill_.Scalar, "mul_" for `x *= y`. "" for an operation that is not PyTorch's own."""
    if node.op == "call_method":
        name = str(node.target)
        name = name[2:-2] if name.startswith("__") else name  # until torch 2.11 `x == y` is the method __eq__
        return _OPERATORS.get(name, name)
    if node.op != "call_function":
        return ""
    target: Any = node.target
    if is_operator(target) or is_packet(target):
        return name_in_aten(target) or ""
    name = getattr(target, "__name__", "")
    if getattr(operator, name, None) is target:
        return _OPERATORS.get(name, name)
    return name if any(getattr(owner, name, None) is target for owner in _OWNERS) else ""


def base_name(node: Node) -> str:
    """`name_of` without the in-place mark."""
    name = name_of(node)
    return name[:-1] if writes_in_place(name) else name


def writes_in_place(name: str) -> bool:
    """Whether a name has torch's in-place mark, an underscore at its end."""
    return name.endswith("_") and not name.endswith("__")


def spelled(node: Node) -> str | None:
    """The common name of a node's operation: "mul" for `x * y`, `x *= y`, `torch.mul`, `aten.mul.Scalar`. None for an operation
    that is not PyTorch's own. Operations that mean the same to an attention share a name: "view" is any reshaping that keeps
    the order of elements."""
    name = base_name(node)
    return _SAME.get(name, name) or None


def shown(node: Node) -> str:
    """The name of a node's operation for people: "tanh" for PyTorch's own, otherwise the name of the called function."""
    return name_of(node) or str(getattr(node.target, "__name__", node.target))


def argument(node: Node, position: int, *names: str, default: Any = None) -> Any:
    """An argument by its position or by any of its names: torch says `input` where aten says `self`."""
    if position < len(node.args):
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)


def first(node: Node) -> Any:
    return argument(node, 0, "input", "self", "x")


def integers(node: Node, *names: str) -> Sequence[Any]:
    """The arguments after the first, given one by one or as one sequence: permute(x, 0, 2, 1), permute(x, (0, 2, 1))."""
    rest = node.args[1:] or tuple(node.kwargs[name] for name in names if name in node.kwargs)
    if len(rest) == 1 and isinstance(rest[0], list | tuple):
        return rest[0]
    return rest


def permutation(node: Node) -> tuple[int, ...] | None:
    """The source dimension of each output dimension of a transposition or permutation; None for other nodes."""
    value = value_of(node)
    rank = value.dim()
    name = spelled(node)
    given: Sequence[Any] = ()
    if name == "getattr":  # x.mT
        name = str(node.args[1])
    if name in ("mT", "adjoint") or (name in ("T", "t", "numpy_T") and rank == 2):
        given = (-2, -1) if rank > 1 and not value.is_complex() else ()
    elif name == "transpose":
        given = (argument(node, 1, "dim0", "axis0"), argument(node, 2, "dim1", "axis1"))
    elif name == "permute":
        given = integers(node, "dims")
    elif name == "movedim":
        given = (argument(node, 1, "source"), argument(node, 2, "destination"))
    if not given or not all(isinstance(dim, int) for dim in given):
        return None
    dims = [dim % rank for dim in given]
    if name == "permute":
        return tuple(dims)
    order = list(range(rank))
    if name == "movedim":
        order.remove(dims[0])
        order.insert(dims[1], dims[0])
    else:
        order[dims[0]], order[dims[1]] = dims[1], dims[0]
    return tuple(order)


def keeps_order(node: Node) -> bool:
    """Whether a node returns the elements of its first argument in the same order, as views, copies and full slices do."""
    name = spelled(node)
    if name in ("view", "clone"):
        return True
    if name == "getitem":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return all(each is None or each is Ellipsis or _is_full(each) for each in index)
    if name == "slice":
        return same_shape(value_of(node), value_of(first(node)))
    return False


def stays_on(node: Node) -> bool:
    """Whether a cast converts between floating dtypes and keeps the device."""
    source, value = value_of(first(node)), value_of(node)
    both = isinstance(source, torch.Tensor) and isinstance(value, torch.Tensor)
    return both and source.device == value.device and source.is_floating_point() and value.is_floating_point()


def same_shape(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two shapes are known to be equal without a guard."""
    return one.dim() == other.dim() and all(always(a == b) for a, b in zip(one.shape, other.shape, strict=True))


def _is_full(index: Any) -> bool:
    return isinstance(index, slice) and (index.start, index.stop, index.step) == (None, None, None)


def is_number(value: Any) -> bool:
    """Whether a value is a number, or computed from numbers alone: 0.5, torch.tensor(8.0).sqrt(), torch.full([], 2)."""
    if isinstance(value, Node):
        if isinstance(value_of(value), torch.SymInt | torch.SymFloat | int | float):
            return True
        return _constant(value, 8) is not None
    return isinstance(value, int | float) and not isinstance(value, bool)


def number(value: Any) -> float:
    """The number that a value (`is_number`) stands for. Reading a number that Dynamo has made symbolic adds a guard. Raises
    `UnbackedSizeError` where the number depends on data."""
    if not isinstance(value, Node):
        return float(value)
    held = value_of(value)
    if isinstance(held, torch.SymInt | torch.SymFloat | int | float):
        from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

        try:
            return float(held)
        except GuardOnDataDependentSymNode as error:
            raise UnbackedSizeError(str(held)) from error
    constant = _constant(value, 8)
    assert constant is not None
    return float(constant)


def _constant(node: Node, depth: int) -> Any:
    """The number that all elements of a tensor equal, where the graph itself shows it within `depth` nodes; None otherwise."""
    if depth == 0:
        return None
    if (literal := literal_of(node)) is not None:
        return literal
    if node.op == "get_attr":
        tensor = getattr(node.graph.owning_module, str(node.target), None)
        # Only literal tensors of a traced model: buffers and parameters may get other values later.
        literal = str(node.target).startswith(("_tensor_constant", "lifted_tensor", "_lifted_tensor"))
        return tensor.item() if literal and isinstance(tensor, torch.Tensor) and tensor.numel() == 1 else None
    name = spelled(node)
    if name in ("tensor", "scalar_tensor", "asarray", "as_tensor"):
        found = argument(node, 0, "data", "s", "obj")
    elif name in ("full", "full_like", "new_full"):
        found = argument(node, 2 if name == "new_full" else 1, "fill_value")
    elif name == "new_tensor":
        found = argument(node, 1, "data")
    elif name in ("clone", "detach", "lift_fresh_copy", "lift_fresh", "to", "expand", "view", "sqrt"):
        inner = first(node)
        found = _constant(inner, depth - 1) if isinstance(inner, Node) else None
        if name == "sqrt" and found is not None:
            return math.sqrt(found) if found >= 0 else None
    else:
        return None
    if isinstance(found, Node):
        held = value_of(found)
        return held if isinstance(held, int | float) else None
    return found if isinstance(found, int | float) and not isinstance(found, bool) else None
