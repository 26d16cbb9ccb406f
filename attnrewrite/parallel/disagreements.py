"""`plan_of_graph` and `disagreements`: the plan that is right for a graph, and what is wrong with another one, in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from ..graphs.boundaries import Boundary, boundary_of
from ..graphs.sizes import described
from .boundary_plans import Cut, Disagreement
from .carrying import KEYS, MISSING, NOT_SHARED, SEGMENTS, TWICE, UNSHARED, WHOLE, Fault, Flow
from .choosing_boundaries import PREFERENCES, Completed, Preference, completed
from .layouts import Shard, divides
from .rows import JOINS

Splits = Mapping[Boundary, int]
Runs = Callable[
    [Splits, Splits], str
]  # why the model's code does not run with these splits and gathers; "" where it does


@dataclass(frozen=True)
class Chosen:
    """The plan that is right for a graph. refused: why there is none."""

    plan: Completed
    preference: Preference
    refused: tuple[str, ...] = ()


def plan_of_graph(flow: Flow, runs: Runs) -> Chosen:
    """The first plan, in the order of `PREFERENCES`, with which each operation does the right thing and the code runs."""
    tried: list[tuple[Completed, Preference, tuple[str, ...]]] = []
    for preference in PREFERENCES:
        found = completed(flow, preference)
        wrong = _distinct(_unsaid(flow, fault) for fault in found.faults if fault.kind != KEYS)
        if any(found.splits == each.splits and found.gathers == each.gathers for each, _, _ in tried):
            continue
        if not wrong and found.splits:
            failed = runs(found.splits, found.gathers)
            if not failed:
                return Chosen(found, preference)
            wrong = (f"the model's code does not run with the tensors cut so: {failed}",)
        tried.append((found, preference, wrong))
    best = min(tried, key=lambda each: len(each[2]))
    return Chosen(Completed({}, {}, needs=best[0].needs), best[1], best[2] or ("no self attention is in the graph",))


def _unsaid(flow: Flow, fault: Fault) -> str:
    beyond = (
        "; no input or output of a module is that tensor with one sequence to split" if fault.kind == MISSING else ""
    )
    return f"{said(flow, fault)}{beyond}"


def remarks_on(flow: Flow, plan: Completed) -> tuple[str, ...]:
    """What holds for a plan only under a condition that the graph does not show."""
    found = [said(flow, fault) for fault in plan.faults if fault.kind == KEYS]
    for node in sorted(flow.main, key=flow.order.__getitem__):
        call = flow.calls[node]
        if call.number("is_causal") or call.number("enable_gqa"):
            found.append(f"{flow.name(node)} is causal or has grouped heads: diffusers raises ValueError there")
        elif not divides(flow.ranks, call.shape()[-3]):
            found.append(
                f"{flow.name(node)} has {described(call.shape()[-3])} heads, which {flow.ranks} ranks do not divide: Ulysses "
                "attention of diffusers raises there, ring attention does not"
            )
        if len(call.tensors) > 3:  # TemplatedRingAttention of diffusers 0.42
            found.append(
                f"{flow.name(node)} has a mask: Ulysses attention of diffusers gathers it, ring attention takes each rank's "
                "own part of it for the keys of all ranks"
            )
    return _distinct(found)


def undivided(flow: Flow, plan: Splits) -> list[Disagreement]:
    """The lengths at which diffusers raises."""
    found = []
    for boundary, dim in plan.items():
        size = flow.shape(boundary)[dim]
        if not divides(flow.ranks, size):
            text = (
                f"{flow.ranks} ranks do not divide its length {described(size)} along dimension {dim}: diffusers raises "
                "AssertionError, unless ulysses_anything or ring_anything is set"
            )
            found.append(Disagreement(str(boundary), text))
    return found


def disagreements(
    flow: Flow, chosen: Chosen, splits: list[Cut], gathers: list[Cut], runs: Runs
) -> tuple[list[Disagreement], list[str]]:
    """What is wrong with a given plan, and what is to be checked by hand."""
    wrong: list[Disagreement] = []
    remarks: list[str] = []
    cuts: dict[Boundary, int] = {}
    for each in splits:
        at = each.at
        if at not in flow.boundaries:
            if _is_tuple(flow, at):
                text = "it is a tuple, for which the plan needs a list with an entry for each tensor"
                wrong.append(Disagreement(str(at), text))
            continue
        shape = flow.shape(at)
        if each.dims is not None and each.dims != len(shape):
            remarks.append(
                f"{at} has {len(shape)} dimensions here, and the plan expects {each.dims}: diffusers warns, and splits nothing"
            )
            continue
        dim = each.dim % len(shape) if -len(shape) <= each.dim < len(shape) else each.dim
        needed = chosen.plan.needs.get(at, set())
        if dim >= len(shape) or (needed and dim not in needed):
            right = sorted(needed) or [0]
            size = described(shape[right[0]])
            text = f"the plan splits dimension {each.dim}, and the tokens ({size}) are dimension {right[0]}"
            wrong.append(Disagreement(str(at), text))
            dim = right[0]
        cuts[at] = dim
    joins = {each.at: each.dim for each in gathers if each.at in flow.boundaries}
    wrong += [
        Disagreement(str(each.at), "no call of this module is in the graph: nothing is gathered")
        for each in gathers
        if each.at not in joins
    ]
    found = completed(flow, chosen.preference, cuts, joins)
    wrong += _added(flow, found)
    wrong += [
        Disagreement(_where(flow, found, fault), said(flow, fault)) for fault in found.faults if fault.kind != KEYS
    ]
    known = cuts == chosen.plan.splits and joins == chosen.plan.gathers
    if not wrong and not known and (failed := runs(cuts, joins)):
        wrong.append(Disagreement("the model", f"its code does not run with the tensors split so: {failed}"))
    wrong += undivided(flow, cuts)
    return list(dict.fromkeys(wrong)), [*remarks, *remarks_on(flow, found)]


def _is_tuple(flow: Flow, at: Boundary) -> bool:
    return at.position < 0 and Boundary(at.module, at.argument, 0) in flow.boundaries


def _added(flow: Flow, found: Completed) -> list[Disagreement]:
    """What the graph needs, and a given plan does not have."""
    result = []
    for fault, boundary, dim in found.added:
        if fault.kind == WHOLE:
            text = f"the plan gathers nothing here, along dimension {dim}: {said(flow, fault)}"
        elif fault.kind == UNSHARED:
            text = f"the plan leaves it whole, and {flow.name(fault.at)} shares its tokens, dimension {dim}"
        else:
            text = f"the plan leaves it whole (its dimension {dim} is the one to split): {said(flow, fault)}"
        result.append(Disagreement(str(boundary), text))
    return result


def said(flow: Flow, fault: Fault) -> str:
    """A fault in words."""
    at, tensor = flow.name(fault.at), flow.name(fault.tensor)
    if fault.kind == UNSHARED:
        return f"{at}: no border of a module lies where its tokens could be split"
    if fault.kind == MISSING:
        assert fault.shard is not None
        lengths = " + ".join(str(described(length)) for length in fault.shard.lengths)
        if flow.calls[fault.at].name in JOINS:
            return (
                f"{at} joins it with a sequence of which each rank has a part: what is whole on every rank would count "
                f"{flow.ranks} times ({lengths} along dimension {fault.shard.dim} of {tensor})"
            )
        return f"{at} needs each rank's part of {tensor}, along dimension {fault.shard.dim} ({lengths})"
    if fault.kind == WHOLE:
        if fault.at.op == "output":
            return f"an output of the model ({tensor}) would be a part"
        return f"{at} needs all of {tensor}, and a rank has a part, {fault.shard}"
    if fault.kind == TWICE:
        return f"it is split already where the plan splits it ({fault.shard})"
    if fault.kind == NOT_SHARED:
        return f"the plan gathers it, and every rank has all of it: it would be {flow.ranks} times as long"
    if fault.kind == SEGMENTS:
        return f"the plan gathers it along another dimension or in another order than it was split, {fault.shard}"
    return (
        f"{at} gets a part of the keys, {fault.shard}, and its queries need all of them: right only if the model's attention "
        "processor exchanges keys there"
    )


def _where(flow: Flow, found: Completed, fault: Fault) -> str:
    """The splits that a wrong part comes from; the tensor itself otherwise."""
    if fault.kind != WHOLE:
        return str(boundary_of(fault.tensor) or flow.name(fault.tensor))
    held: Mapping[Node, Any] = flow.carried(found.splits, found.gathers).held
    waiting, seen, sources = [fault.tensor], set(), []
    while waiting:
        node = waiting.pop()
        if node in seen or not isinstance(held.get(node), Shard | tuple):
            continue
        seen.add(node)
        if (boundary := boundary_of(node)) in found.splits:
            sources.append((flow.order[node], str(boundary)))
        else:
            waiting += node.all_input_nodes
    return " and ".join(dict.fromkeys(name for _, name in sorted(sources))) or flow.name(fault.tensor)


def _distinct(items: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(items))
