"""`overlap`: what an exchange does not need is computed while it is under way."""

from __future__ import annotations

from collections.abc import Set

from torch.fx import Graph, Node

from ..graphs.mutations import RESHAPES, storage_of, written_by
from ..graphs.nodes import value_of
from ..graphs.operators import draws_random_numbers, is_operator
from ..graphs.spellings import name_of
from ..graphs.trees import leaves
from .collectives import functional


def overlap(graph: Graph) -> None:
    """Moves nodes of a graph, in place, from before an exchange to behind its beginning.

    In front of an exchange stands what it sends, and what else the model happens to compute there: the MLP beside the attention
    of FLUX's single blocks; query and key, where the value is sent first. That goes behind the beginning, in its own order,
    and so stands in front of the wait. A write into memory of the graph's own goes too, as Wan's rotation of query and key, and
    keeps its order with all that reads or writes there. No node passes another exchange, a write into an input or a weight, a
    random number or the edge of a region of autocast or autograd.
    """
    before: list[Node] = []  # what may be moved, in the order of the graph
    given = {storage for node in graph.nodes if node.op in ("placeholder", "get_attr") for storage in _memory(node)}
    for node in list(graph.nodes):
        if _begins(node):
            needed = _needed(node, before)
            before = [each for each in before if each not in needed]
            last = node
            for each in before:
                last.append(each)
                last = each
        elif _may_move(node, given):
            before.append(node)
        elif node.op not in ("placeholder", "get_attr"):
            before = []


def _begins(node: Node) -> bool:
    """Whether an exchange begins here; another node waits for it."""
    target = node.target
    if not is_operator(target) or target.namespace != functional.name:
        return False
    return target is not functional.wait_tensor.default


def _may_move(node: Node, given: Set[int | None]) -> bool:
    """Whether a node is an operation of PyTorch's own that has a result and no other effect than writes into memory that the
    graph makes. given: the storages that it does not make, of which two may be the same memory."""
    name = name_of(node)
    if not name or name in RESHAPES or draws_random_numbers(name):
        return False
    return not _written(node) & (given | {None})


def _needed(node: Node, among: list[Node]) -> set[Node]:
    """What of `among` must stay in front of a node: what it is computed from, and what shares memory with that, where either
    writes there."""
    found = {node}
    touched, written = _touched(node), _written(node)
    for each in reversed(among):
        if any(user in found for user in each.users) or _written(each) & touched or _touched(each) & written:
            found.add(each)
            touched |= _touched(each)
            written |= _written(each)
    return found


def _touched(node: Node) -> set[int | None]:
    """The storages that a node reads, writes or makes."""
    return {storage for each in (node, *node.all_input_nodes) for storage in _memory(each)}


def _written(node: Node) -> set[int | None]:
    """The storages that a node writes into; None for one that is not known."""
    return {storage for each in written_by(node) for storage in _memory(each)}


def _memory(node: Node) -> list[int | None]:
    return [storage_of(value) for value in leaves(value_of(node))]
