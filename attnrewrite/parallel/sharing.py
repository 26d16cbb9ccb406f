"""`share`: the graph of one rank in the place of the whole one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch.fx import Graph, GraphModule

from ..graphs.lowering import lowered, moved_into
from ..graphs.modules import compiled_paths
from ..graphs.nodes import SDPA_TARGETS, Surroundings, graphs_below, value_of, with_surroundings
from ..graphs.sizes import described, holds
from ..kernels.calls import AttentionCall
from ..passes import OPENERS, find_calls, run_on_all
from ..planning.plans import Plan
from ..version import __version__
from . import gradients
from .analysis import Analysis, NotSharedError, analyse
from .exchanges import needs_gradient
from .layouts import Ranks
from .plans import Sharing
from .rewriting import part_of_graph


@dataclass(frozen=True)
class Shared:
    """A graph of operators, and how ranks share it."""

    plan: Sharing
    graph: GraphModule | None = None  # of operators, the whole; None: nothing is shared
    analysis: Analysis = field(default_factory=Analysis)

    def part(self, ranks: Ranks) -> Graph:
        """The graph that one rank runs."""
        assert self.graph is not None
        return part_of_graph(self.graph, self.analysis, ranks)


def share(module: GraphModule, ranks: Ranks, kind: str = "auto") -> Sharing:
    """Shares a graph among ranks: `module` becomes the graph that this rank runs, with the same inputs and outputs. Where the
    graph can only run whole on every rank it stays unchanged, and the result says why."""
    shared = planned(module, ranks.size, kind)
    if shared.graph is None:
        return shared.plan
    try:
        part = shared.part(ranks)
    except NotSharedError as error:
        return Sharing(ranks.size, refused=str(error))
    except (RuntimeError, TypeError, ValueError) as error:  # of an operator that does not take what a rank has
        reason = f"what a rank has of it cannot be computed ({type(error).__name__}: {_first(error)})"
        return Sharing(ranks.size, refused=reason)
    moved_into(module, part, shared.graph)
    return shared.plan


def planned(module: GraphModule, ranks: int, kind: str = "auto") -> Shared:
    """How ranks share a graph. What hides an attention in it is opened; otherwise the graph stays unchanged."""
    if reason := _obstacle(module):
        return Shared(Sharing(ranks, refused=reason))
    run_on_all(OPENERS, module)
    try:
        below = lowered(module)
    except Exception as error:  # whatever PyTorch raises for an operation that it cannot trace
        reason = f"it cannot be traced to operators ({type(error).__name__}: {_first(error)})"
        return Shared(Sharing(ranks, refused=reason))
    if below is None:
        return Shared(Sharing(ranks))
    if len(list(graphs_below(below))) > 1:
        return Shared(Sharing(ranks, refused="it calls graphs of its own, as torch.cond does"))
    modules = compiled_paths()
    found = {each.node: each.call for each in find_calls(below, Surroundings(), {}, modules).attentions}
    names = {node: call.site for node, call in found.items() if node.target in SDPA_TARGETS}
    try:
        analysis = analyse(below, names, ranks, kind, modules=modules)
    except NotSharedError as error:
        return Shared(Sharing(ranks, refused=str(error)))
    if not analysis.begins:
        others = [call for node, call in found.items() if node not in names]
        return Shared(Sharing(ranks, refused=_nothing_begins(ranks, [found[node] for node in names], others)))
    added = len(gradients.used_for_parts(below, analysis))
    return Shared(replace(analysis.plan, added=added), below, analysis)


def _nothing_begins(ranks: int, calls: list[AttentionCall], others: list[AttentionCall]) -> str:
    """Why no tensor is shared. calls: of SDPA. others: attention in other words."""
    if calls:
        site, tokens = calls[0].site, calls[0].q_len
        if not holds(tokens >= ranks):
            return f"{site} has {described(tokens)} tokens, fewer than the {ranks} ranks"
        return f"no tensor of tokens that the queries and the keys of {site} both come from can be shared"
    if others:
        return f"only scaled_dot_product_attention is shared, and {others[0].site} is attention by other operations"
    return ""


def _obstacle(module: GraphModule) -> str:
    """Why a graph of Dynamo cannot be shared; "" where it may be."""
    for _, inside in with_surroundings(module, Surroundings()):
        if inside.transform is not None:  # its tensors are wrapped, and have no value outside
            return f"a part of it stands inside torch.func.{inside.transform.rpartition('.')[2]}"
    if gradients.begins_inside(module):
        return (
            "it turns autograd on, which is off around it: compile what stands inside of torch.enable_grad(), or call the "
            "compiled model with autograd on"
        )
    return gradients.obstacle(module) if gradients.is_needed(module) else ""


def compared(module: GraphModule, sharing: Sharing | None, kernels: Plan) -> list[str]:
    """What must be the same on every rank, line by line. module: the graph, whose inputs are those of the whole graph."""
    inputs = [
        f"input {node.target}: {tuple(described(size) for size in value.shape)} of {value.dtype}"
        + (", with a gradient" if needs_gradient(value) else "")
        for node in module.graph.find_nodes(op="placeholder")
        if isinstance(value := value_of(node), torch.Tensor)
    ]
    # How many steps of a ring a rank computes depends on the rank.
    sites = [f"{site.name}: kernel {site.chosen}" for site in kernels.sites if not site.call.logsumexp]
    lines = [] if sharing is None else sharing.lines()
    return [f"PyTorch {torch.__version__}, attnrewrite {__version__}", *inputs, *map(str.strip, lines), *sites]


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
