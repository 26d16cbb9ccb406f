"""`overlap`: what an exchange does not need is computed while it is under way."""

from __future__ import annotations

from torch.fx import Graph, Node

from ..graphs.mutations import written_by
from ..graphs.operators import draws_random_numbers, is_operator
from ..graphs.spellings import name_of
from .collectives import functional


def overlap(graph: Graph) -> None:
    """Moves nodes of a graph, in place, from before an exchange to behind its beginning.

    In front of an exchange stands what it sends, and what else the model happens to compute there: the MLP beside the attention
    of FLUX's single blocks; query and key, where the value is sent first. That goes behind the beginning, in its own order,
    and so stands in front of the wait. No node passes another exchange, a write in place, a random number or the edge of a
    region of autocast or autograd.
    """
    before: list[Node] = []  # what may be moved, in the order of the graph
    for node in list(graph.nodes):
        if _begins(node):
            needed = _needed(node, before)
            before = [each for each in before if each not in needed]
            last = node
            for each in before:
                last.append(each)
                last = each
        elif _may_move(node):
            before.append(node)
        elif node.op not in ("placeholder", "get_attr"):
            before = []


def _begins(node: Node) -> bool:
    """Whether an exchange begins here; another node waits for it."""
    target = node.target
    if not is_operator(target) or target.namespace != functional.name:
        return False
    return target is not functional.wait_tensor.default


def _may_move(node: Node) -> bool:
    """Whether a node is an operation of PyTorch's own that has a result and no other effect."""
    name = name_of(node)
    return bool(name) and not draws_random_numbers(name) and not written_by(node)


def _needed(node: Node, among: list[Node]) -> set[Node]:
    """What of `among` a node is computed from."""
    found = {node}
    for each in reversed(among):
        if any(user in found for user in each.users):
            found.add(each)
    return found
