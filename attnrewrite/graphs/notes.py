"""Notes that attnrewrite writes into the metadata of nodes."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

_OURS = "attnrewrite"
_LITERAL = "attnrewrite_literal"


def mark_ours(node: Node) -> Node:
    """Marks a node that attnrewrite has put into the graph."""
    node.meta[_OURS] = True
    return node


def is_ours(node: Node) -> bool:
    return _OURS in node.meta


def note_literal(node: Node, number: Any) -> None:
    """Notes the value of an input: a number that torch.export has lifted out of the graph as a constant."""
    node.meta[_LITERAL] = number


def literal_of(node: Node) -> Any:
    """The number noted at an input; None where nothing was noted."""
    return node.meta.get(_LITERAL)


def erase_notes(graph: Graph) -> None:
    for node in graph.nodes:
        node.meta.pop(_OURS, None)
        node.meta.pop(_LITERAL, None)
