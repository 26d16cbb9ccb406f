"""Notes that attnrewrite writes into the metadata of nodes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.fx import Graph, Node

_OURS = "attnrewrite"
_LITERAL = "attnrewrite_literal"
_SCRATCH = "attnrewrite_scratch"
_READING = "attnrewrite_reading"


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


@contextmanager
def scratch_before(node: Node) -> Iterator[None]:
    """Marks the nodes that are written in front of `node` inside: they are for a kernel that may come, and go if nothing reads
    them."""
    before = node.prev
    yield
    while before.next is not node:
        before = before.next
        before.meta[_SCRATCH] = True


def is_scratch(node: Node) -> bool:
    return _SCRATCH in node.meta


def note_reading(node: Node, reading: Any) -> None:
    """Notes what a pass has read of a call, for the passes behind it; None takes the note away."""
    node.meta[_READING] = reading


def reading_of(node: Node) -> Any:
    """What was noted of a call; None where nothing was."""
    return node.meta.get(_READING)


def erase_notes(graph: Graph) -> None:
    for node in graph.nodes:
        for note in (_OURS, _LITERAL, _SCRATCH, _READING):
            node.meta.pop(note, None)
