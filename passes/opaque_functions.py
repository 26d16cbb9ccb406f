"""Functions of a user or a library that stand in the graph as one node: an attention that passes through one, or is inside one,
stays, and the report names the function."""

from __future__ import annotations

import torch
from torch.fx import Node

from ..graphs.nodes import value_of
from ..graphs.operators import is_opaque
from ..graphs.spellings import same_shape, shown


def is_function(node: Node) -> bool:
    return node.op == "call_function" and is_opaque(node.target)


def of_one_shape(one: Node, other: Node) -> bool:
    """Whether two nodes give tensors that are known to have equal shapes."""
    values = value_of(one), value_of(other)
    return all(isinstance(value, torch.Tensor) for value in values) and same_shape(*values)


def computed_by(what: str, node: Node) -> str:
    """Why an attention stays whose scores or weights (`what`) the function computes."""
    return f"its {what} are computed by {_described(node)}"


def is_inside(node: Node) -> str:
    """Why an attention stays that is inside the function."""
    return f"it is inside {_described(node)}"


def _described(node: Node) -> str:
    return f"the function {shown(node)}, which the graph shows as one node (torch.compiler.allow_in_graph)"
