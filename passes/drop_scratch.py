"""Removes what the readers of calls (flex_calls.py, library_calls.py) have written for a kernel that did not come."""

from __future__ import annotations

from torch.fx import GraphModule

from ..graphs.notes import is_scratch, note_reading, reading_of


def drop_scratch(graph_module: GraphModule) -> int:
    """Removes the nodes that were written for a kernel that did not come."""
    dropped = 0
    for node in reversed(graph_module.graph.nodes):
        if is_scratch(node) and not node.users:
            graph_module.graph.erase_node(node)
            dropped += 1
        elif reading_of(node) is not None:
            note_reading(node, None)  # it names nodes
    return dropped
