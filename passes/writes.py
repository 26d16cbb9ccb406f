"""What the nodes of a graph write into, and whether a tensor still holds what was read from it."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from ..graphs import value_of
from ..spellings import written_by


class Writes:
    """Where the nodes of a graph stand, and what they write into."""

    def __init__(self, graph_module: GraphModule) -> None:
        self.position: dict[Node, int] = {}
        self._writers: dict[int, list[Node]] = {}
        self._edits: dict[Node, list[Node]] = {}
        for position, node in enumerate(graph_module.graph.nodes):
            self.position[node] = position
            for target in written_by(node):
                self._edits.setdefault(target, []).append(node)
                if isinstance(value := value_of(target), torch.Tensor):
                    self._writers.setdefault(storage(value), []).append(node)

    def current(self, node: Node, reader: Node) -> Node:
        """The node whose result `node` holds when `reader` reads it: after `x.mul_(2)`, that of mul_."""
        before = [edit for edit in self._edits.get(node, ()) if self.position[edit] < self.position[reader]]
        return before[-1] if before else node

    def writers(self, node: Node) -> list[Node]:
        """All that write into the memory of a node's value."""
        value = value_of(node)
        return self._writers.get(storage(value), []) if isinstance(value, torch.Tensor) else []

    def unchanged(self, node: Node, reader: Node, later: Node) -> bool:
        """Whether `later` finds the same in a node as `reader` did."""
        start, end = self.position[reader], self.position[later]
        return not any(start < self.position[writer] < end for writer in self.writers(node))

    def written(self, node: Node) -> bool:
        return bool(self.writers(node))


def storage(tensor: torch.Tensor) -> int:
    """A number for the memory of a tensor: views of one memory have the same."""
    try:
        found: int = tensor.untyped_storage()._cdata
    except NotImplementedError:  # inside a transform of torch.func
        return id(tensor)
    return found
