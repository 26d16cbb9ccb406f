"""find, plan, swap, tidy: the one way from a traced graph to a graph with the chosen kernels."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch.fx import GraphModule

from .graphs.nodes import OPAQUE_TARGETS, SDPA_TARGETS, graphs_below, module_of, value_of
from .graphs.notes import is_ours
from .kernels.machines import Machine
from .passes import ANALYSES, REWRITES, Context
from .passes.check_values import check_calls, check_outputs
from .passes.context import Found
from .passes.fused_kernels import FUSED_TARGETS
from .planning.planner import make_plan
from .planning.plans import Plan
from .planning.policies import Policy
from .planning.this_machine import machine_of


class Watch(Protocol):
    """What looks at the sites of each graph, before and after the chosen kernels are put in place (capturing.py)."""

    def before(self, module: GraphModule, context: Context) -> None: ...

    def after(self, module: GraphModule, context: Context) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """`unchanged`: SDPA calls that stand in the graph afterwards. `seconds`: what all passes took. `swapped`: the attentions
    that were, with the nodes that give their outputs now."""

    plan: Plan
    machine: Machine | None
    unchanged: int
    seconds: float
    swapped: tuple[Found, ...] = ()


def rewrite_graph(
    root: GraphModule,
    policy: Policy,
    machine: Machine | None = None,
    swap: bool = True,
    prefix: str = "",
    captured: bool = False,
    watch: Watch | None = None,
    exported: bool = False,
    elsewhere: bool = False,
) -> Outcome:
    """Plans for `root` and every graph below it, and, if `swap`, puts the chosen kernels in place.

    `machine` None: the one that the tensors are on. `prefix`: the path of the module that was compiled in the model that it
    is a part of; the paths of its sites begin with it. `captured`: who compiles the graph records a CUDA graph. `watch` is
    called around the swap.

    `exported`: the graph is that of an `ExportedProgram`, to be saved. `elsewhere`: it will run on a `machine` that is not
    this one, and no library is loaded.

    Raises `AttentionRefusedError` under a strict policy, and `RuntimeError` if the graph does not end up as planned.
    """
    started = time.perf_counter()
    names: dict[str, int] = {}
    graphs = [(module, Context(surroundings, names)) for module, surroundings in graphs_below(root)]
    for module, context in graphs:
        for analysis in ANALYSES:
            analysis(module, context)

    found = [each for _, context in graphs for each in context.found]
    machines = [machine or _machine(each) for each in found]
    calls = [
        replace(
            each.call,
            device=on.device,
            site=_below(prefix, each),
            captured=captured and on.device == "cuda",
            exported=exported,
        )
        for each, on in zip(found, machines, strict=True)
    ]
    plan = make_plan(calls, policy, machines, load_sources=swap and not elsewhere, name_sources=swap and elsewhere)
    for each, site in zip(found, plan.sites, strict=True):
        each.site, each.call = site, site.call

    if swap:
        for module, context in graphs:
            if context.found:
                if policy.checks:
                    check_calls(module, context)
                if watch is not None:
                    watch.before(module, context)
                for rewrite in REWRITES:
                    rewrite(module, context)
                if policy.checks:
                    check_outputs(module, context)
                if watch is not None:
                    watch.after(module, context)
                module.graph.lint()
                module.recompile()
    left = sum(_stands(module, context) for module, context in graphs)
    swapped = tuple(each for each in found if each.kernel is not None) if swap else ()
    expected = len(found) - len(swapped)
    if left != expected:
        raise RuntimeError(
            f"attnrewrite left {left} attention calls where its plan leaves {expected}; please report this"
        )
    used = machines[0] if machines else None
    return Outcome(plan.described(), used, left, time.perf_counter() - started, swapped)


def _below(prefix: str, found: Found) -> str:
    site = found.call.site
    if not prefix:
        return site
    path = module_of(found.node)
    if not path and (module := re.fullmatch(r"[^#]*(#\d+)?", site)):  # the compiled module itself makes the call
        return prefix + (module[1] or "")
    return f"{prefix}.{site}"


def _machine(found: Found) -> Machine:
    if found.operands is not None:
        first: Any = found.operands.query.node
    else:
        tensors = [node for node in found.node.all_input_nodes if isinstance(value_of(node), torch.Tensor)]
        first = tensors[0]
    device: torch.device = value_of(first).device
    return machine_of(device)


def _stands(module: GraphModule, context: Context) -> int:
    """Attention that is in the graph: calls, kernels that were there before, and what was found spelled out and still is."""
    calls = sum(
        node.target in SDPA_TARGETS or node.target in OPAQUE_TARGETS or node.target in FUSED_TARGETS
        for node in module.graph.nodes
        if node.op == "call_function" and not is_ours(node)
    )
    spelled_out = [found.node for found in context.found if found.call.form == "operations"]
    return calls + sum(not is_ours(node) for node in spelled_out)
