"""Opens functions of einops and einx, which these libraries put into Dynamo's graph as one node each."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from ..graphs.emitting import Emitter
from ..graphs.nodes import Surroundings, calls_of, is_transformed, value_of
from ..graphs.operators import is_opaque

# einops until 0.8.1 and einx call torch.compiler.allow_in_graph for their functions of tensors. These compute the same at each
# call, from their arguments alone, which is not known of a user's function.
LIBRARIES = frozenset({"einops", "einx"})


def open_functions(graph_module: GraphModule, surroundings: Surroundings) -> int:
    """Replaces the node by the calls of PyTorch that it makes.

    rearrange(x, "b n (h d) -> b h n d", h=4)  ->  x.reshape(2, 7, 4, 8).permute(0, 2, 1, 3)

    A node that does not give one tensor stays, and so does one inside a torch.func transform.
    """
    opened = 0
    for node, inside in calls_of(graph_module, surroundings, _is_known):
        if not inside.transform:
            opened += _open(graph_module, node, inside)
    return opened


def _is_known(target: Any) -> bool:
    return is_opaque(target) and str(getattr(target, "__module__", "")).partition(".")[0] in LIBRARIES


def _open(graph_module: GraphModule, node: Node, inside: Surroundings) -> bool:
    value: Any = value_of(node)
    if not isinstance(value, torch.Tensor) or value.is_nested or is_transformed(value):
        return False
    emitter = Emitter(graph_module, ours=False)

    def given(argument: Any) -> Any:
        if not isinstance(argument, Node):
            return argument
        return emitter.tensor(argument) if isinstance(value_of(argument), torch.Tensor) else value_of(argument)

    args, kwargs = map_aggregate(node.args, given), map_aggregate(node.kwargs, given)
    with emitter.before(node, value.requires_grad, value, inside.autocast_around(node)):
        result = node.target(*args, **kwargs)  # type: ignore[operator]
    node.replace_all_uses_with(emitter.node(result))
    graph_module.graph.erase_node(node)
    return True
