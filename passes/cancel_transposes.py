"""Removes transpositions that undo each other: many models leave the layout (batch, length, heads, dim) just before a kernel
that needs it."""

import torch
from torch.fx import GraphModule, Node

from ..graphs.nodes import value_of
from ..graphs.notes import is_ours
from ..graphs.spellings import TURNS, permutation, spelled


def cancel_transposes(graph_module: GraphModule) -> int:
    """Removes pairs of the same transposition around a swapped kernel.

    kernel(x.transpose(1, 2).transpose(1, 2), ...)  ->  kernel(x, ...)
    """
    cancelled = 0
    for node in list(graph_module.graph.nodes):
        first = node.args[0] if node.args and isinstance(node.args[0], Node) else None
        if first is None or not (is_ours(node) or is_ours(first)):  # both are the model's own
            continue
        if not _swaps_heads_and_length(node) or not _swaps_heads_and_length(first):
            continue
        source = first.args[0]
        if isinstance(source, Node):
            node.replace_all_uses_with(source)
            graph_module.graph.erase_node(node)
            if not first.users:
                graph_module.graph.erase_node(first)
            cancelled += 1
    return cancelled


def _swaps_heads_and_length(node: Node) -> bool:
    """Whether a node is x.transpose(1, 2) of a tensor of rank 4, in any spelling."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or value.dim() != 4 or spelled(node) not in TURNS:
        return False
    return permutation(node) == (0, 2, 1, 3)
