"""`context_parallel_plan`: what diffusers' `_cp_plan` would be for a model, and where a given one disagrees with the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import GraphModule
from torch.nn import Module

from ..graphs.boundaries import Boundary, Change, changed_at_boundaries, mark, read_marks
from ..graphs.lowering import lowered
from ..graphs.modules import ModulePaths
from ..graphs.nodes import SDPA_TARGETS, module_of
from ..graphs.tracing import AttributesOf, predicted, told, traced, uncompiled, unlogged
from ..graphs.trees import leaves
from ..parallel.boundary_plans import BoundaryPlan, Cut, given_plan, starred
from ..parallel.carrying import Flow
from ..parallel.choosing_boundaries import Completed
from ..parallel.disagreements import disagreements, plan_of_graph, remarks_on, undivided
from ..parallel.settings import check_devices
from .model_parts import can_run


def context_parallel_plan(
    model: Module, *args: Any, ranks: int = 2, given: Mapping[str, Any] | None = None, **kwargs: Any
) -> BoundaryPlan:
    """Traces `model(*args, **kwargs)` and finds what diffusers' `_cp_plan` would be: which inputs and outputs of modules to
    split among ranks and which to gather, so that the model's own code computes the right thing on the parts.

        print(attnrewrite.context_parallel_plan(transformer, **inputs))

    model: a module; on the "meta" device it needs no memory.
    args, kwargs: the inputs of the model. The plan holds for these: a mask that is None is in no plan.
    ranks: the number of devices, which are elsewhere.
    given: a plan in the form of diffusers, to compare with the graph. None: the model's own `_cp_plan`, if it has one.

    Returns a `BoundaryPlan`. No graph runs and nothing is exchanged: the code of the model runs on tensors without values, once
    whole and once for each plan that is tried, with the tensors split.

    Raises `TypeError` for a model that is no module, for `ranks` that is no number, and for a given plan of another form;
    `ValueError` for fewer than 2 ranks; the errors of the model.
    """
    can_run(model)
    owner = getattr(model, "_orig_mod", model)
    if not isinstance(owner, Module):
        raise TypeError(
            f"model is {model!r} ({type(model).__name__}): give a torch.nn.Module, whose modules a plan names"
        )
    check_devices(ranks, "ranks")
    name = "given" if given is not None else "_cp_plan"
    given = getattr(owner, "_cp_plan", None) if given is None else given
    read = None if given is None else given_plan(owner, given)
    flows, shapes = _flows(owner, args, kwargs, ranks)
    kind = type(owner).__name__
    if len(flows) != 1:
        reason = "no attention is in a graph" if not flows else f"its attention is in {len(flows)} graphs, not in one"
        return BoundaryPlan(kind, ranks, unsaid=(f"anything: {reason}",))
    flow = flows[0]

    def runs(splits: Mapping[Boundary, int], gathers: Mapping[Boundary, int]) -> str:
        return _failure(owner, args, kwargs, flow, splits, gathers, shapes)

    chosen = plan_of_graph(flow, runs)
    plan = chosen.plan
    remarks = [*remarks_on(flow, plan), *map(str, undivided(flow, plan.splits))]
    wrong = []
    if read is not None:
        splits, gathers, wrong = read
        found, remarks = disagreements(flow, chosen, splits, gathers, runs)
        wrong += found
    return BoundaryPlan(
        kind,
        ranks,
        *_cuts(flow, plan, owner),
        unsaid=chosen.refused,
        given=name if read is not None else "",
        disagreements=tuple(wrong),
        remarks=tuple(dict.fromkeys(remarks)),
    )


def _cuts(flow: Flow, plan: Completed, model: Module) -> tuple[tuple[Cut, ...], ...]:
    found = []
    for places in (plan.splits, plan.gathers):
        order = sorted(places, key=lambda boundary: flow.order[flow.boundaries[boundary][0]])
        found.append(starred([Cut(each, places[each], len(flow.shape(each))) for each in order], model))
    return tuple(found)


def _flows(model: Module, args: Any, kwargs: Any, ranks: int) -> tuple[list[Flow], list[tuple[int, ...]]]:
    """The graphs that have attention, and the shapes of the model's outputs."""
    flows: list[Flow] = []

    def backend(graph_module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graph = lowered(graph_module)
        if graph is not None:
            read_marks(graph)
            if any(node.target in SDPA_TARGETS for node in graph.graph.nodes):
                paths = {node: module_of(node, ModulePaths()) for node in graph.graph.nodes}
                flows.append(Flow(graph, ranks, paths))
        return predicted(graph_module)

    return flows, _shapes(_run(model, args, kwargs, mark, backend))


def _run(model: Module, args: Any, kwargs: Any, change: Change, backend: Callable[..., Any]) -> Any:
    call = uncompiled(model)

    def whole(*args: Any, **kwargs: Any) -> Any:  # so that the model's own inputs and outputs are in its graph
        return call(*args, **kwargs)

    with torch.no_grad(), AttributesOf(model), changed_at_boundaries(model, change):
        return traced(whole, args, kwargs, backend)


def _failure(
    model: Module,
    args: Any,
    kwargs: Any,
    flow: Flow,
    splits: Mapping[Boundary, int],
    gathers: Mapping[Boundary, int],
    shapes: list[tuple[int, ...]],
) -> str:
    """Why the model's code does not run with its tensors cut as a plan says; "" where it runs."""
    cuts = {(each.module, each.argument, each.position): dim for each, dim in splits.items()}
    joins = {(each.module, each.argument, each.position): (dim, flow.shape(each)[dim]) for each, dim in gathers.items()}
    ranks = flow.ranks

    def change(tensor: torch.Tensor, module: str, argument: str, position: int) -> torch.Tensor:
        place = (module, argument, position)
        if place in cuts:
            tensor = tensor.narrow(cuts[place], 0, -(-tensor.shape[cuts[place]] // ranks))
        if place in joins:
            dim, size = joins[place]
            tensor = torch.cat([tensor] * ranks, dim).narrow(dim, 0, size)
        return tensor

    try:
        with unlogged():
            result = _run(model, args, kwargs, change, lambda graph_module, example_inputs: predicted(graph_module))
    except Exception as error:  # whatever a model raises for a size that it does not expect
        what, place = told(error)
        return f"{what} ({place})" if place else what
    found = _shapes(result)
    return "" if found == shapes else f"its outputs are {found} instead of {shapes}"


def _shapes(result: Any) -> list[tuple[int, ...]]:
    return [tuple(each.shape) for each in leaves(result) if isinstance(each, torch.Tensor)]
