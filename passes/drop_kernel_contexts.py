"""Removes the calls that `with sdpa_kernel(...)` inside a model leaves in the graph: they set PyTorch's kernel choice and reset
it."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from ..graphs.nodes import OPAQUE_TARGETS, SDPA_TARGETS, SETS_KERNELS, kernels_now
from ..graphs.notes import is_ours
from ..graphs.operators import is_higher_order, is_pytorchs


def drop_kernel_contexts(graph_module: GraphModule) -> int:
    """Removes each pair of such calls if no node between them reads the choice any more.

    _sdpa_kernel([MATH]); kernel(q, k, v); _sdpa_kernel([all])  ->  kernel(q, k, v)

    Both calls of a pair go, or both stay: one alone would leave the choice changed. Such calls also keep a graph out of
    AOTAutograd's cache (pytorch#194007).
    """
    nodes = list(graph_module.graph.nodes)
    if not any(node.target is SETS_KERNELS for node in nodes):
        return 0
    dropped = 0
    position = {node: index for index, node in enumerate(nodes)}
    for enter, leave in _pairs(nodes):
        between = nodes[position[enter] + 1 : position[leave]]
        if not any(_reads_choice(node) for node in between):
            for node in (leave, enter):
                names = node.all_input_nodes
                graph_module.graph.erase_node(node)
                for name in names:
                    if not name.users:
                        graph_module.graph.erase_node(name)
            dropped += 1
    return dropped


def _pairs(nodes: list[Node]) -> list[tuple[Node, Node]]:
    """(entering call, leaving call), innermost first. A call leaves a context if it restores the choice from before it."""
    state: list[Any] = [kernels_now()]
    open_: list[Node] = []
    pairs = []
    for node in nodes:
        if node.target is not SETS_KERNELS:
            continue
        names: Any = node.args[0]  # calls of _backend_from_string
        wanted = sorted(str(name.args[0]) if isinstance(name, Node) else name.name for name in names)
        if open_ and wanted == state[-2]:
            pairs.append((open_.pop(), node))
            state.pop()
        else:
            open_.append(node)
            state.append(wanted)
    return pairs


def _reads_choice(node: Node) -> bool:
    if is_ours(node):  # our kernels are chosen
        return False
    if node.op in ("call_module", "get_attr"):  # a called graph may hold an attention; a tensor attribute does not
        return node.op == "call_module" or any(is_higher_order(user.target) for user in node.users)
    if node.target in SDPA_TARGETS or node.target in OPAQUE_TARGETS:
        return True
    return node.op == "call_function" and not is_pytorchs(node.target)  # it may ask for the choice
