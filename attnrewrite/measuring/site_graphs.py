"""One site as a graph of its own, with one kernel: the nodes that the swap writes into the model, and nothing else.

query, key, value, mask  ->  [casts, padding, packing, the kernel]  ->  heads side by side, as in most models
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ..graphs.nodes import SDPA, new_fake_mode, values_only
from ..kernels.calls import AttentionCall, Mask, MaskKind
from ..kernels.machines import Machine
from ..kernels.ops import zero_unless
from ..kernels.records import Numerics
from ..passes import TIDIERS, swap_kernels
from ..passes.found import MaskTerm, Operand, Operands, Planned
from ..planning.planner import Libraries, make_plan
from ..planning.policies import Candidate, Policy
from ..planning.sites import Site
from .capturing import Captured

VALUE = "example_value"


@dataclass(frozen=True)
class SiteGraph:
    """A graph and its inputs. `module(*inputs)` returns a tuple of one tensor: (batch, q_len, heads * value_dim) for a query
    of rank 4, SDPA's own form for other ranks."""

    module: GraphModule
    inputs: tuple[Tensor, ...]  # query, key, value, and mask and rows if the graph has them
    site: Site  # the plan of the graph's call


def plan_site(call: AttentionCall, candidate: Candidate, machine: Machine, numerics: Numerics) -> Site:
    """Plans a call with one candidate as the only choice, and loads the candidate's library."""
    (site,) = make_plan([call], Policy((candidate,), numerics=numerics), [machine], Libraries.LOAD).sites
    return site


def site_graph(captured: Captured, site: Site, candidate: Candidate, machine: Machine) -> SiteGraph:
    """Builds the graph of a captured attention with the candidate's kernel. site: the plan that accepted the candidate."""
    call, mask, rows = _asked(captured, site)
    dtype = getattr(torch, call.dtype)
    tensors = [each.detach() for each in (captured.query, captured.key, captured.value)]
    tensors = [each if each.dtype == dtype else each.to(dtype) for each in tensors]  # as autocast, which is off here
    if call.needs_grad:
        tensors = [each.requires_grad_() for each in tensors]
    if mask is not None and mask.is_floating_point():
        mask = mask.to(getattr(torch, str(call.mask.dtype)))

    build = _Build(call.needs_grad)
    names = ("query", "key", "value", "mask", "rows")
    given = {name: each for name, each in zip(names, (*tensors, mask, rows), strict=True) if each is not None}
    nodes = {name: build.placeholder(name, tensor) for name, tensor in given.items()}
    options: dict[str, Any] = {"dropout_p": call.dropout, "scale": call.scale, "enable_gqa": captured.grouped}
    options["is_causal"] = mask is None and call.mask.is_causal
    attention = build.call(SDPA, nodes["query"], nodes["key"], nodes["value"], nodes.get("mask"), **options)
    output = build.call(zero_unless, nodes["rows"], attention) if "rows" in nodes else attention
    if captured.query.dim() == 4:
        output = build.call(torch.flatten, build.call(torch.transpose, output, 1, 2), 2)
    build.graph.output((output,))
    module = GraphModule(torch.nn.Module(), build.graph)

    asked = plan_site(call, candidate, machine, Numerics.QUANTISED)
    if asked.chosen is None:  # where a tensor stands for a proof, the mask's kind differs from the model's
        raise RuntimeError(f"{candidate.name} accepts the site, but refuses its copy: {asked.refusals[0][1]}")
    term = (
        (MaskTerm(Operand(nodes["mask"]), *(("keep", -torch.inf) if mask.dtype == torch.bool else ("add", 1.0))),)
        if mask is not None
        else ()
    )
    query, key, value = (Operand(nodes[name]) for name in names[:3])
    operands = Operands(query, key, value, term, grouped=captured.grouped)
    swap_kernels(module, [Planned(attention, call, operands, site=replace(asked, call=call))])
    for tidier in TIDIERS:
        tidier(module)
    module.graph.lint()
    module.recompile()
    return SiteGraph(module, tuple(given.values()), asked)


def _asked(captured: Captured, site: Site) -> tuple[AttentionCall, Tensor | None, Tensor | None]:
    """Returns the call of a model that passes exactly the mask that the kernel gets, this mask, and a boolean tensor that is
    False for the rows that become zero after the kernel."""
    call = replace(captured.call, written_as="sdpa")
    mask, given = call.mask, captured.mask
    own = replace(call, mask=mask.given or mask)
    if site.backend is None or site.backend.op is None or site.mask_as == "given":
        if mask.kind is MaskKind.CAUSAL_LOWER_RIGHT and given is None and call.q_len != call.kv_len:
            q_len, kv_len = int(call.q_len), int(call.kv_len)
            ones = torch.ones(q_len, kv_len, dtype=torch.bool, device=captured.query.device)
            given = ones.tril(kv_len - q_len)
            own = replace(call, mask=Mask(MaskKind.BOOLEAN, "bool", (q_len, kv_len)))
        return own, given, None
    if given is None or not mask.is_tensor:
        return replace(call, mask=mask if mask.kind is MaskKind.ADDITIVE else mask.bare), None, None
    if captured.keep is None:
        return call, given, None
    if site.mask_as == "keys":
        kind, rows = MaskKind.KEY_PADDING, captured.rows
    else:
        kind, rows = mask.kind, None
    return replace(call, mask=replace(mask.bare, kind=kind, shape=tuple(captured.keep.shape))), captured.keep, rows


class _Build:
    """Builds a graph as Dynamo would trace it: each node has its fake value."""

    def __init__(self, needs_grad: bool) -> None:
        self.graph = Graph()
        self._mode = new_fake_mode()
        self._needs_grad = needs_grad

    def placeholder(self, name: str, tensor: Tensor) -> Node:
        node = self.graph.placeholder(name)
        node.meta[VALUE] = self._mode.from_tensor(tensor, static_shapes=True)
        return node

    def call(self, function: Any, *args: Any, **kwargs: Any) -> Node:
        values = [each.meta[VALUE] if isinstance(each, Node) else each for each in args]
        with values_only(values[0]), torch.set_grad_enabled(self._needs_grad):
            value = function(*values, **kwargs)
        node = self.graph.call_function(function, args, kwargs)
        node.meta[VALUE] = value
        return node
