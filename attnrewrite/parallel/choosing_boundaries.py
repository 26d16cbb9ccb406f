"""`completed`: at which borders of modules a plan cuts and gathers, so that a model's own code computes the right thing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from ..graphs.boundaries import Boundary, boundary_of
from ..graphs.sizes import always
from .carrying import MISSING, UNSHARED, WHOLE, Fault, Flow
from .following import is_main, is_member, member_of
from .layouts import Shard
from .rows import CUTS, JOINS

FIRST, INSIDE, LAST = "first", "inside", "last"


@dataclass(frozen=True)
class Preference:
    """Which of several right boundaries is taken."""

    tokens: str  # of the sequences that attention shares: FIRST, or LAST, just before they are used in several places
    tables: str  # of what is combined with them (positions, masks): FIRST, LAST, or the first INSIDE the model


# A size that the model's code reads from a tensor is right at some of these boundaries only, so they are tried in this order.
PREFERENCES = (Preference(FIRST, FIRST), Preference(LAST, FIRST), Preference(LAST, INSIDE), Preference(LAST, LAST))


@dataclass
class Completed:
    """Where a plan cuts and gathers."""

    splits: dict[Boundary, int]
    gathers: dict[Boundary, int]
    added: list[tuple[Fault, Boundary, int]] = field(
        default_factory=list
    )  # what was not given, and the fault without it
    faults: list[Fault] = field(default_factory=list)  # for which no boundary helps
    needs: dict[Boundary, set[int]] = field(
        default_factory=dict
    )  # the dimension to share, at each boundary that was seen


def completed(
    flow: Flow,
    preference: Preference,
    splits: Mapping[Boundary, int] | None = None,
    gathers: Mapping[Boundary, int] | None = None,
) -> Completed:
    """Adds to what is given what the graph needs besides."""
    found = Completed(dict(splits or {}), dict(gathers or {}))
    last = max((flow.order[node] for node in flow.main), default=-1)
    while True:
        carried = flow.carried(found.splits, found.gathers)
        found.faults = list(carried.faults)
        before = len(found.added)
        unshared = [fault for fault in carried.faults if fault.kind == UNSHARED]
        missing = [fault for fault in carried.faults if fault.kind == MISSING]
        whole = [fault for fault in carried.faults if fault.kind == WHOLE and flow.order[fault.at] > last]
        for fault in unshared[:1] or missing:
            _add_splits(flow, preference, found, fault)
        if len(found.added) == before:
            for fault in whole:
                _add_gather(flow, found, fault, carried.held)
        if len(found.added) == before:
            return found


def _add_splits(flow: Flow, preference: Preference, found: Completed, fault: Fault) -> None:
    how = preference.tables if fault.kind == MISSING else preference.tokens
    chosen = []
    trail = _trail(flow, fault)
    for node, (dim, lengths) in trail.items():
        if (boundary := boundary_of(node)) is not None and (lengths is None or len(lengths) == 1):
            found.needs.setdefault(boundary, set()).add(dim)
    for marks in _marks(flow, trail, dominating=fault.kind == UNSHARED):
        inside = [mark for mark in marks if mark[0].module]
        marks = (inside or marks) if how == INSIDE else marks
        if marks:  # what begins elsewhere is the next fault
            chosen.append(marks[-1 if how == LAST else 0])
    for boundary, dim in chosen:
        if boundary not in found.splits:
            found.splits[boundary] = dim
            found.added.append((fault, boundary, dim))


Trail = dict[Node, tuple[int, Any]]  # the dimension of each tensor, and the segments along it if known


def _trail(flow: Flow, fault: Fault) -> Trail:
    """The tensors of which a tensor is computed, each with the dimension that the dimension to share is there."""
    trail: Trail = {}
    if fault.kind == UNSHARED:
        call = flow.calls[fault.at]
        waiting: list[Any] = [(node, call.rank() - 2, None) for node in call.tensors[:3]]
    else:
        assert fault.shard is not None
        waiting = [(fault.tensor, fault.shard.dim, fault.shard.lengths)]
    while waiting:
        node, dim, lengths = waiting.pop()
        if node not in trail:
            trail[node] = dim, lengths
            waiting += _before(flow, node, dim, lengths, tables=fault.kind == MISSING)
    return trail


def _before(flow: Flow, node: Node, dim: int, lengths: Any, tables: bool = True) -> Iterator[tuple[Node, int, Any]]:
    """tables: with tensors that broadcast, as the cosines of a rotary embedding."""
    if node.op != "call_function":
        return
    if is_member(node):
        yield member_of(node)[0], dim, lengths
        return
    call = flow.calls[node]
    if call.name in JOINS and dim == call.dim():
        sizes = [call.shape(position)[dim] for position in range(len(call.tensors))]
        parts = [None] * len(sizes) if lengths is None else _segments(lengths, sizes)
        yield from ((each, dim, part) for each, part in zip(call.tensors, parts or (), strict=False))
        return
    if call.name in CUTS and dim == call.dim():
        return
    for row in call.rows:
        if row.output == dim:
            for each, of_input in zip(call.tensors, row.inputs, strict=True):
                if of_input is not None and of_input >= 0 and (tables or is_main(call, each)):
                    yield each, of_input, lengths


def _segments(lengths: tuple[Any, ...], sizes: list[Any]) -> list[tuple[Any, ...]] | None:
    """The segments of each tensor that is joined, of the segments of the whole; None where they do not fit."""
    found, rest = [], list(lengths)
    for size in sizes:
        mine: list[Any] = []
        while rest and not always(sum(mine) == size):
            mine.append(rest.pop(0))
        if not always(sum(mine) == size):
            return None
        found.append(tuple(mine))
    return found if not rest else None


def _marks(flow: Flow, trail: Trail, dominating: bool) -> Iterator[list[tuple[Boundary, int]]]:
    """For each tensor at which the trail ends: the boundaries behind it, in order. dominating: those through which it
    reaches all its uses."""
    nodes = sorted(trail, key=flow.order.__getitem__)
    for origin in nodes:
        computed = any(node in trail for node, _, _ in _before(flow, origin, *trail[origin]))
        if computed or (not dominating and flow.is_filled(origin)):
            continue
        reached = {origin}
        furthest = -1
        marks = []
        for node in nodes[nodes.index(origin) :]:
            if node is not origin and not any(each in reached for each in node.all_input_nodes):
                continue
            reached.add(node)
            place, boundary = flow.order[node], boundary_of(node)
            dim, lengths = trail[node]
            single = lengths is None or len(lengths) == 1
            if boundary is not None and single and (not dominating or furthest <= place):
                marks.append((boundary, dim))
            furthest = max([furthest, *(flow.order[user] for user in node.users)])
        yield marks


def _add_gather(flow: Flow, found: Completed, fault: Fault, held: Mapping[Node, Any]) -> None:
    """Gathers at the output of the module that comes last before the tensor is needed whole, if the tensor is computed of this
    output alone."""
    node = fault.tensor
    while True:
        boundary = boundary_of(node)
        if boundary is not None and boundary.is_output and boundary.module and len(held[node].lengths) == 1:
            break
        shared = [each for each in node.all_input_nodes if isinstance(held.get(each), Shard | tuple)]
        if len(shared) != 1:
            return
        node = shared[0]
        if not isinstance(held[node], Shard):
            return
    if boundary not in found.gathers:
        found.gathers[boundary] = held[node].dim
        found.added.append((fault, boundary, held[node].dim))
