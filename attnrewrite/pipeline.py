"""`rewrite_graph`: find, understand, plan, swap, tidy. Every traced graph gets its kernels here. `rewrite_shared`: the same for
a graph that several devices share."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch.fx import GraphModule

from .graphs.modules import ModulePaths, compiled_paths
from .graphs.nodes import OPAQUE_TARGETS, SDPA_TARGETS, module_of, site_name, value_of
from .graphs.notes import is_ours
from .graphs.tracing import as_itself
from .kernels.logsumexp import WITH_LOGSUMEXP
from .kernels.machines import Machine
from .parallel.agreement import RanksDisagreeError, agree, choosing_with, give_up
from .parallel.plans import Sharing
from .parallel.settings import ContextParallel, DescribedRanks
from .parallel.sharing import compared, share
from .passes import OPENERS, READERS, TIDIERS, find_calls, run_on_all, swap_kernels, understand_masks
from .passes.check_values import check_inputs, check_outputs
from .passes.found import Planned, Swapped, Understood
from .passes.fused_kernels import FUSED_TARGETS
from .planning.planner import AttentionRefusedError, Libraries, make_plan
from .planning.plans import Plan
from .planning.policies import Policy
from .planning.sites import NearMiss
from .planning.this_machine import machine_of

KERNELS = OPAQUE_TARGETS | FUSED_TARGETS | {WITH_LOGSUMEXP}  # calls that are attention, besides SDPA


@dataclass(frozen=True)
class Target:
    """The machine and the surroundings that a graph is rewritten for."""

    machine: Machine | None = None  # None: the machine of the graph's own tensors
    prefix: str = ""  # the path of the compiled module in the whole model; site names begin with it
    in_cuda_graph: bool = False  # the compiler records a CUDA graph of the graph
    as_it_stands: bool = False  # nothing compiles the graph: it runs as it is, under plain autograd
    exported: bool = False  # the graph belongs to an `ExportedProgram` that will be saved


class Watch(Protocol):
    """An observer that is called before and after the swap in each graph (measuring/capturing.py)."""

    def before(self, module: GraphModule, attentions: Sequence[Planned]) -> Sequence[Planned]:
        """Returns the attentions to swap instead, in the same order."""
        ...

    def after(self, module: GraphModule, attentions: Sequence[Planned]) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """The result of `rewrite_graph`."""

    plan: Plan
    machine: Machine | None  # the machine of the first attention; None: there is no attention
    unchanged: int  # number of attention calls that are left in the graph
    seconds: float  # duration of all passes
    swapped: tuple[Swapped, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()


def rewrite_graph(
    root: GraphModule,
    policy: Policy,
    target: Target = Target(),
    libraries: Libraries = Libraries.LOAD,
    watch: Watch | None = None,
) -> Outcome:
    """Plans for `root` and every graph that it calls, and puts the chosen kernels in place; with `Libraries.PLAN_ONLY` it stops
    after the plan. `watch` is called before and after the swap in each graph.

    Raises `AttentionRefusedError` under a strict policy, and `RuntimeError` if the graph does not end up as planned.
    """
    started = time.perf_counter()
    modules = compiled_paths()
    names: dict[str, int] = {}
    near_misses: list[NearMiss] = []
    understood: list[tuple[GraphModule, tuple[Understood, ...]]] = []
    for module, surroundings in run_on_all((*OPENERS, *READERS), root):
        finds = find_calls(module, surroundings, names, modules)
        near_misses += [
            NearMiss(_below(target.prefix, site_name(softmax, modules), module_of(softmax, modules)), each.reason)
            for softmax, each in finds.missed
        ]
        understood.append((module, understand_masks(module, finds.attentions)))

    flat = [each for _, attentions in understood for each in attentions]
    machines = [target.machine or _machine(each) for each in flat]
    calls = [_placed(each, machine, target, modules) for each, machine in zip(flat, machines, strict=True)]
    plan = make_plan([each.call for each in calls], policy, machines, libraries)

    sites = iter(zip(calls, plan.sites, strict=True))
    left, swapped = 0, []
    for module, attentions in understood:
        planned: Sequence[Planned] = [each.then(Planned, site=site) for each, site in (next(sites) for _ in attentions)]
        if attentions and libraries is not Libraries.PLAN_ONLY:
            planned = _swap(module, planned, target, policy.checks, watch)
        swapped += [each for each in planned if isinstance(each, Swapped)]
        left += _stands(module, planned)
    if left != len(flat) - len(swapped):
        raise RuntimeError(
            f"attnrewrite left {left} attention calls where its plan leaves {len(flat) - len(swapped)}; please report this"
        )
    used = machines[0] if machines else None
    seconds = time.perf_counter() - started
    return Outcome(plan.described(), used, left, seconds, tuple(swapped), tuple(near_misses))


def rewrite_shared(
    root: GraphModule, parallel: ContextParallel | DescribedRanks | None, rewrite: Callable[[], Outcome]
) -> tuple[Sharing | None, Outcome]:
    """Shares a graph in place, calls `rewrite` on what this rank has of it, and sees to it that all ranks have the same plan.

    parallel: the ranks. None: this process runs the graph alone.

    Raises `RanksDisagreeError`, on every rank, if one of them fails or has another plan; and what `rewrite` raises, after it
    has told the others.
    """
    shared = None
    ranks = parallel if isinstance(parallel, ContextParallel) else None
    try:
        if parallel is not None:
            shared = share(root, parallel.ranks, parallel.kind)
        with choosing_with(ranks):
            outcome = rewrite()
        if ranks is not None:
            agree(ranks, compared(root, shared, outcome.plan))
    except RanksDisagreeError as error:
        raise as_itself(error) from None
    except Exception as error:
        if ranks is not None:
            give_up(ranks, error)
        if isinstance(error, AttentionRefusedError):
            raise as_itself(error) from None
        raise
    return shared, outcome


def _swap(
    module: GraphModule, planned: Sequence[Planned], target: Target, checks: bool, watch: Watch | None
) -> Sequence[Planned]:
    if checks:
        planned = check_inputs(module, planned)
    if watch is not None:
        planned = watch.before(module, planned)
    done = swap_kernels(module, planned, target.as_it_stands)
    if checks:
        check_outputs(module, done)
    if watch is not None:
        watch.after(module, done)
    for tidier in TIDIERS:
        tidier(module)
    module.graph.lint()
    module.recompile()
    return done


def _placed(found: Understood, machine: Machine, target: Target, modules: ModulePaths) -> Understood:
    """`found`, with the fields of its call that the graph alone does not give."""
    call = replace(
        found.call,
        device=machine.device,
        site=_below(target.prefix, found.call.site, module_of(found.node, modules)),
        in_cuda_graph=target.in_cuda_graph and machine.device == "cuda",
        exported=target.exported,
    )
    return replace(found, call=call)


def _below(prefix: str, site: str, path: str) -> str:
    """The name of a site in the whole model. path: the module that makes the call; "" for the compiled module itself."""
    if not prefix:
        return site
    if not path and (module := re.fullmatch(r"[^#]*(#\d+)?", site)):
        return prefix + (module[1] or "")
    return f"{prefix}.{site}"


def _machine(found: Understood) -> Machine:
    if found.operands is not None:
        first: Any = found.operands.query.node
    else:
        tensors = [node for node in found.node.all_input_nodes if isinstance(value_of(node), torch.Tensor)]
        first = tensors[0]
    device: torch.device = value_of(first).device
    return machine_of(device)


def _stands(module: GraphModule, attentions: Sequence[Planned]) -> int:
    """Number of attentions left in the graph: SDPA calls, PyTorch's own kernels, and attention that is written otherwise."""
    calls = sum(
        node.target in SDPA_TARGETS or node.target in KERNELS
        for node in module.graph.nodes
        if node.op == "call_function" and not is_ours(node)
    )
    others = [each.node for each in attentions if not each.call.is_sdpa]
    return calls + sum(not is_ours(node) for node in others)
