"""`with_backend`: the torch.compile backend that swaps attention and hands the graph to another compiler."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch.fx import GraphModule

from ..graphs.eager_calls import EagerCall, ends_in_a_break, watch_rest_of_call
from ..graphs.inner_compilers import (
    NAME,
    Inner,
    compile_with,
    known_inner,
    known_options,
    records_cuda_graphs,
    register_objects,
    reset_compiler,
    runs_as_it_stands,
)
from ..graphs.kernel_contexts import trace_kernel_contexts
from ..graphs.tracing import compilation
from ..kernels.machines import Machine, known_machine
from ..parallel.products import products
from ..parallel.settings import ContextParallel, DescribedRanks, read_context_parallel
from ..pipeline import Outcome, Target, rewrite_graph, rewrite_shared
from ..planning.planner import Libraries
from ..planning.plans import Plan
from ..planning.policies import Policy
from ..planning.tables import folded
from ..reports.report import GraphReport, Report
from . import contexts
from .choices import SETTINGS, Choice, Choices, CompileSettings, Rules, checks_of_environment, make_policy, several
from .strictness import nearest, without_sites
from .treatments import comes_later, guard_treatment
from .treatments import share as shared_policy

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Unpack

logger = logging.getLogger("attnrewrite")


class AttentionCompiler:
    """A torch.compile backend that swaps attention. `with_backend` makes it; `report` shows each attention and its kernel.

    Two of these objects are equal if they are configured equally: Dynamo then reuses compiled code between them.
    """

    __name__ = NAME  # before 2.15, Dynamo knows a registered backend by this name; see `register_objects`

    def __init__(
        self,
        policy: Policy,
        inner: Inner = "inductor",
        machine: Machine | None = None,
        *,
        prefix: str = "",
        report: Report | None = None,
        lenient: bool = False,
        sharing: tuple[str, ...] = (),
        context_parallel: ContextParallel | DescribedRanks | None = None,
        watch: bool = True,
    ) -> None:
        """policy: choices, rules and settings.
        inner: the compiler that gets the rewritten graph.
        machine: the machine to plan for. None: the one that the tensors are on.
        prefix: the path of the compiled module in its model; names of sites begin with it.
        report: a report that several compilers of one model share. None: a new one.
        lenient: strict and checks, of `policy` or of a context, raise nothing.
        sharing: the paths of the repeated blocks that share what this object compiles; () for a module by itself.
        context_parallel: the ranks that share each graph. None: this process runs it alone.
        watch: after a graph break, look at the rest of the call for attention in no graph, and warn once.
        """
        self.policy = policy
        self.inner = inner
        self.machine = known_machine(machine)
        self.prefix = prefix
        self.lenient = lenient
        self.sharing = sharing
        self.context_parallel = context_parallel
        self.report = Report(str(policy)) if report is None else report
        self.watch = watch and not lenient
        self._warned: set[str] = set()
        trace_kernel_contexts()

    def __call__(self, graph_module: GraphModule, example_inputs: list[Any], **kwargs: Any) -> Callable[..., Any]:
        """Rewrites the graph in place and compiles it. kwargs: torch.compile's mode and options, for the inner compiler."""
        register_objects(AttentionCompiler)
        if self.rewrite(graph_module, in_cuda_graph=records_cuda_graphs(self.inner, **kwargs)):
            contexts.guard_choice()
        self.check_rules()
        if self.watch and ends_in_a_break(graph_module) and not self.report.eager_calls:
            watch_rest_of_call(self._warn_of_eager)
        in_order = self.context_parallel is not None
        return compile_with(self.inner, graph_module, example_inputs, in_order, **kwargs)

    def rewrite(
        self, graph_module: GraphModule, libraries: Libraries = Libraries.LOAD, in_cuda_graph: bool = False
    ) -> int:
        """Plans each attention, adds the graph to `report`, and swaps in the chosen kernels. Returns the number of attention
        sites. Inside an `attention_backend` the policy is that of the context, outside of any it is this object's own.

        libraries: `Libraries.PLAN_ONLY` swaps nothing; the passes that come before the plan run.
        in_cuda_graph: the inner compiler records a CUDA graph of this graph.
        """
        override = contexts.active()
        target = Target(self.machine, self.prefix, in_cuda_graph, runs_as_it_stands(self.inner))
        parallel = self.context_parallel
        counted = None

        def rewrite() -> Outcome:
            nonlocal counted
            counted = products(graph_module.graph) if isinstance(parallel, DescribedRanks) else None
            return rewrite_graph(graph_module, self.policy_now(), target, libraries)

        shared, outcome = rewrite_shared(graph_module, parallel, rewrite)
        if shared is not None and isinstance(parallel, DescribedRanks):
            shared = shared.estimated(counted, outcome.machine, parallel.rates)
        if outcome.plan.sites:
            contexts.mark_used()
            guard_treatment(self.policy_now(), self.prefix)
        name, attempt = compilation() or (f"graph {len(self.report.graphs)}", None)
        graph = GraphReport.of(name, outcome, str(override) if override else "", self.sharing, shared)
        self.report.add(graph, attempt)
        _log(graph)
        self._warn_of_stale(outcome.plan)
        return len(outcome.plan.sites)

    def policy_now(self) -> Policy:
        """The policy that applies here: inside an `attention_backend` with its choices, outside of any this object's own."""
        override = contexts.active()
        policy = self.policy if override is None else override.over(self.policy)
        if self.lenient:
            policy = replace(policy, strict=False, checks=False)
        return shared_policy(policy, self.sharing).compiled_by(self.inner)

    def check_rules(self) -> None:
        """Warns once of each of this object's rules that no site seen so far has matched."""
        sites = [site for graph in self.report.graphs if not graph.context for site in graph.plan.sites]
        if not sites or self.prefix:  # of a part: in_place.py has checked the rules against the whole model
            return
        unmatched = without_sites(self.policy, sites)
        self.report.unmatched_rules[:] = unmatched
        for pattern in set(unmatched) - self._warned:
            if comes_later(pattern):
                continue
            self._warned.add(pattern)
            near = nearest(pattern, [site.name for site in sites])
            warnings.warn(
                f"rules: {pattern!r} matches none of the {len(sites)} attention sites seen so far (one of them: {near!r}). "
                "Under regional compile a path begins at the compiled block.",
                stacklevel=2,
            )

    def _warn_of_eager(self, calls: list[EagerCall]) -> None:
        """Warns once that a compiled model calls attention outside of its graphs."""
        if calls and not self.report.eager_calls:
            self.report.eager_calls += calls
            places = "; ".join(map(str, calls[:5])) + (f"; and {len(calls) - 5} places more" if calls[5:] else "")
            warnings.warn(
                f"the compiled model called attention in no graph, where nothing is swapped: {places}", stacklevel=3
            )

    def _warn_of_stale(self, plan: Plan) -> None:
        """Warns once, for each reason, of the sites at which a plan's measurements do not apply."""
        reasons: dict[str, list[str]] = {}
        for site in plan.sites:
            if site.stale is not None:
                reasons.setdefault(site.stale, []).append(site.name)
        for reason, names in reasons.items():
            text = f'{reason}. The plan is not used at {folded(names)}, "auto" chooses there: tune again'
            if text not in self._warned:
                self._warned.add(text)
                warnings.warn(text, stacklevel=3)

    def reset(self) -> None:
        """Makes Inductor drop its CUDA graphs. `torch._dynamo.reset()` calls it."""
        reset_compiler(self.inner)

    def __eq__(self, other: object) -> bool:
        if self is other:  # Dynamo compares backends at every call of a compiled region
            return True
        return isinstance(other, AttentionCompiler) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[Any, ...]:
        return (type(self), self.policy, self.inner, self.machine, self.prefix, self.lenient, self.context_parallel)

    def __repr__(self) -> str:
        return f"attnrewrite.with_backend({self.policy}, inner={self.inner!r})"


def with_backend(
    *choices: Choice,
    rules: Rules | None = None,
    inner: Inner = "inductor",
    context_parallel: ContextParallel | DeviceMesh | None = None,
    **settings: Unpack[CompileSettings],
) -> AttentionCompiler:
    """Makes a torch.compile backend that gives each attention the first of `choices` that accepts its call.

        backend = attnrewrite.with_backend("_native_cudnn", "flex")
        model = torch.compile(model, backend=backend)

    choices: names of kernels (`python -m attnrewrite info` lists them) or `Backend` records, in order of preference. An
        attention that every choice refuses stays unchanged, and `backend.report` says why. "name@revision" pins a kernel of
        the hub. Three choices choose kernels for each call themselves (docs/performance.md): "auto" by measurements on
        machines like this one, a plan from `attnrewrite.tune` by measurements on this model, "tune" by measurements at the
        first compilation.
    rules: other choices for some sites, a mapping {pattern: a name, a record or a sequence of them}. A pattern is a glob over
        module paths ("*.attn2"), "self", "cross", "masked" (by a tensor) or "unmasked". The first pattern that matches a
        site applies.
    inner: the compiler that gets the rewritten graph: a name from `torch._dynamo.list_backends(None)`, or a callable
        `(graph_module, example_inputs, **kwargs)`, which receives torch.compile's `mode` and `options`.
    context_parallel: a `torch.distributed.DeviceMesh`, or a `ContextParallel` of it: its ranks share each graph, by the tokens
        or the batch (docs/context-parallel.md). Every rank calls the model with the same inputs. None: no sharing.
    strict: True raises `AttentionRefusedError` for an attention that every choice refuses, at the compiled model's first
        call. `explain` and `check` raise it too, at their end, where they know the whole model; there also for a model without
        attention, and `ValueError` for a rule that matches no attention.
    numerics: how far results may lie from SDPA's: "exact" (the same kernel), "reordered" (rounding, the default) or
        "quantised" (some products in int8 or fp8), or "sparse" (some products are left out, which is right only where the data
        has structure). Each accepts the ones before it.
    cast: "bfloat16" or "float16": casts query, key, value and bias to this dtype for a kernel that does not take theirs, and
        casts the output back. None, the default: such a kernel is refused.
    trust_remote_code: True loads kernels whose publisher the kernels hub does not vouch for; they run the publisher's code in
        this process. ATTNREWRITE_TRUST_REMOTE_CODE=1 in the environment does the same for the whole process.
    checks: True checks values, which no guard sees, around every swapped attention at run time: query, key, value and output
        must be finite, and every row must have a valid key. A failed check raises `AttentionCheckError` with the site, the
        kernel and the place. Only for debugging, since every check reads results back. None, the default: True if
        ATTNREWRITE_CHECKS is 1, yes or true in the environment now.

    Returns an `AttentionCompiler`. Its `report` shows each attention, the kernel, and every refusal.

    Raises `ValueError` for an unknown or repeated name, for no choice at all, for an unknown `inner`, `numerics` or `cast`, and
    for a mesh that cannot be used; `TypeError` for a choice that is neither name, record nor plan, an unknown setting, and a
    flag that is not a bool.
    """
    if settings.get("checks") is None:
        settings["checks"] = checks_of_environment()
    policy = make_policy(choices, rules, **settings)
    return AttentionCompiler(policy, known_inner(inner), context_parallel=read_context_parallel(context_parallel))


def compiler_of(backend: AttentionCompiler | Choices) -> AttentionCompiler:
    """Returns an object from `with_backend` unchanged, and makes one from choices."""
    return backend if isinstance(backend, AttentionCompiler) else with_backend(*several(backend))


OPTIONS = ("attention", "rules", "inner", "context_parallel", *SETTINGS, "mode")


def entry(
    graph_module: GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compiles a graph for the backend that is registered as "attnrewrite".

        torch.compile(model, backend="attnrewrite", options={"attention": "flex"})

    options: "attention" is the choices of `with_backend` (a name, a record or a list of them; "native" by default). The other
        arguments of `with_backend` have their own names. "mode" is that of torch.compile, which does not take a mode beside
        options. All other options go to the inner compiler.

    Raises the errors of `with_backend`, and `ValueError` for an unknown option: each is the `inner_exception` of Dynamo's
    BackendCompilerFailed.
    """
    rest = dict(options or {})
    choices = rest.pop("attention", "native")
    own = {name: rest.pop(name) for name in OPTIONS[1:-1] if name in rest}
    mode = rest.pop("mode", mode)
    compiler = with_backend(*several(choices), **own)
    known_options(rest, compiler.inner, OPTIONS)
    kwargs: dict[str, Any] = {"mode": mode} if mode else {}
    if rest:
        kwargs["options"] = rest
    return compiler(graph_module, example_inputs, **kwargs)


def _log(graph: GraphReport) -> None:
    sites = graph.plan.sites
    logger.info("graph %s: %d attention sites: %s; %.3f s", graph.name, len(sites), graph.plan.counts(), graph.seconds)
    for site in sites:
        reasons = "".join(f"; {name} refused: {refused}" for name, refused in site.refusals)
        logger.debug("graph %s: %s: %s%s", graph.name, site.name, site.chosen or "unchanged", reasons)
