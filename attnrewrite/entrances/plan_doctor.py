"""`context_parallel_plan`: what diffusers' `_cp_plan` would be for a model, and where a given one disagrees with the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
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
from ..parallel.boundary_plans import BoundaryPlan, Cut, Disagreement, given_plan, starred
from ..parallel.carrying import Flow
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
    whole and once for each plan that is tried, with the tensors split. A model in several graphs is traced whole only.

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
    code = _Code(owner, args, kwargs)
    found = code.read(ranks)
    kind = type(owner).__name__
    if found.flow is None:
        return BoundaryPlan(kind, ranks, unsaid=(f"anything: {found.reason}",))
    flow = found.flow

    def runs(splits: Places, gathers: Places) -> str:
        return code.failure(flow, splits, gathers, found.shapes) if found.graphs == 1 else ""

    chosen = plan_of_graph(flow, runs)
    plan = chosen.plan
    remarks = [] if chosen.refused else [*remarks_on(flow, plan), *map(str, undivided(flow, plan.splits))]
    wrong: list[Disagreement] = []
    if read is not None:
        splits, gathers, unknown = read
        differing, remarks = disagreements(flow, chosen, splits, gathers, runs)
        wrong = unknown + differing
    if found.graphs > 1:
        remarks.append(f"the model breaks into {found.graphs} graphs: its code was not run with the tensors split")
    return BoundaryPlan(
        kind,
        ranks,
        _cuts(flow, plan.splits, owner),
        _cuts(flow, plan.gathers, owner),
        chosen.refused,
        name if read is not None else "",
        tuple(wrong),
        tuple(dict.fromkeys(remarks)),
    )


Places = Mapping[Boundary, int]  # with the dimension


def _cuts(flow: Flow, places: Places, model: Module) -> tuple[Cut, ...]:
    order = sorted(places, key=lambda boundary: flow.order[flow.boundaries[boundary][0]])
    return starred([Cut(each, places[each], len(flow.shape(each))) for each in order], model)


@dataclass(frozen=True)
class _Read:
    """The graph of a model. flow: None where there is none to share, for a reason."""

    flow: Flow | None
    reason: str
    graphs: int
    shapes: list[tuple[int, ...]]  # of the model's outputs


@dataclass(frozen=True)
class _Code:
    """A model and its inputs."""

    model: Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def read(self, ranks: int) -> _Read:
        """Traces the model whole."""
        flows: list[Flow] = []
        reasons: list[str] = []
        graphs = 0

        def backend(graph_module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            nonlocal graphs
            graphs += 1
            try:
                graph = lowered(graph_module)
            except Exception as error:  # whatever PyTorch raises for an operation that it cannot trace
                reasons.append(f"a graph cannot be traced to operators ({type(error).__name__}: {error})")
                graph = None
            if graph is not None:
                read_marks(graph)
                if any(node.target in SDPA_TARGETS for node in graph.graph.nodes):
                    paths = {node: module_of(node, ModulePaths()) for node in graph.graph.nodes}
                    flows.append(Flow(graph, ranks, paths))
            return predicted(graph_module)

        shapes = _shapes(self._traced(mark, backend))
        if len(flows) > 1:
            reasons.append(f"its attention is in {len(flows)} graphs, not in one")
        elif not flows:
            reasons.append("no scaled_dot_product_attention is in a graph")
        return _Read(flows[0] if not reasons else None, "; ".join(reasons), graphs, shapes)

    def failure(self, flow: Flow, splits: Places, gathers: Places, shapes: list[tuple[int, ...]]) -> str:
        """Why the model's code does not run with its tensors split as a plan says; "" where it runs."""
        cuts = {astuple(each): dim for each, dim in splits.items()}
        joins = {astuple(each): (dim, flow.shape(each)[dim]) for each, dim in gathers.items()}
        ranks = flow.ranks

        def change(tensor: torch.Tensor, *place: str | int) -> torch.Tensor:
            if place in cuts:
                tensor = tensor.narrow(cuts[place], 0, -(-tensor.shape[cuts[place]] // ranks))
            if place in joins:
                dim, size = joins[place]
                tensor = torch.cat([tensor] * ranks, dim).narrow(dim, 0, size)
            return tensor

        try:
            with unlogged():
                result = self._traced(change, lambda module, example_inputs: predicted(module), fullgraph=True)
        except Exception as error:  # whatever a model raises for a size that it does not expect
            what, place = told(error)
            return f"{what} ({place})" if place else what
        found = _shapes(result)
        return "" if found == shapes else f"its outputs are {found} instead of {shapes}"

    def _traced(self, change: Change, backend: Callable[..., Any], fullgraph: bool = False) -> Any:
        call = uncompiled(self.model)

        def whole(*args: Any, **kwargs: Any) -> Any:  # so that the model's own inputs and outputs are in its graph
            return call(*args, **kwargs)

        with torch.no_grad(), AttributesOf(self.model), changed_at_boundaries(self.model, change):
            return traced(whole, self.args, self.kwargs, backend, fullgraph)


def _shapes(result: Any) -> list[tuple[int, ...]]:
    return [tuple(each.shape) for each in leaves(result) if isinstance(each, torch.Tensor)]
