"""`with_backend`: the torch.compile backend that swaps attention and hands the graph to another compiler."""

from __future__ import annotations

import difflib
import logging
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.fx import GraphModule

from ..graphs.inner_compilers import (
    NAME,
    Inner,
    compile_with,
    known_inner,
    known_options,
    records_cuda_graphs,
    reset_compiler,
)
from ..graphs.tracing import compilation
from ..kernels.machines import Machine
from ..pipeline import Target, rewrite_graph
from ..planning.planner import Libraries
from ..planning.plans import Plan
from ..planning.policies import Policy, matches
from ..planning.tables import folded
from ..reports.report import GraphReport, Report
from . import contexts
from .choices import SETTINGS, Choice, Choices, CompileSettings, Rules, checks_of_environment, make_policy, several

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger("attnrewrite")


class AttentionCompiler:
    """A torch.compile backend. Made by `with_backend`; `report` tells what it did.

    Two of them are equal if they are configured equally: Dynamo then reuses compiled code between them.
    """

    # torch.compile takes an object for a registered backend by its name. Only for those does it release the tracing
    # state, without which `model.to(...)` can fail after compiling (torch/_dynamo/convert_frame.py, 2.13).
    __name__ = NAME

    def __init__(
        self,
        policy: Policy,
        inner: Inner = "inductor",
        machine: Machine | None = None,
        *,
        prefix: str = "",
        report: Report | None = None,
    ) -> None:
        """`prefix`: where the compiled module stands in its model; sites are named from there. `report`: one that several
        compilers of one model share."""
        self.policy = policy
        self.inner = inner
        self.machine = machine
        self.prefix = prefix
        self.report = Report(str(policy)) if report is None else report
        self._warned: set[str] = set()

    def __call__(self, graph_module: GraphModule, example_inputs: list[Any], **kwargs: Any) -> Callable[..., Any]:
        """Rewrites the graph in place and compiles it. `kwargs` (mode, options) are torch.compile's, for the inner compiler."""
        if self.rewrite(graph_module, in_cuda_graph=records_cuda_graphs(self.inner, **kwargs)):
            contexts.guard_choice()
        self.check_rules()
        return compile_with(self.inner, graph_module, example_inputs, **kwargs)

    def rewrite(
        self, graph_module: GraphModule, libraries: Libraries = Libraries.LOAD, in_cuda_graph: bool = False
    ) -> int:
        """Plans, reports, and puts the chosen kernels in place, unless `Libraries.PLAN_ONLY`. Returns the number of attention
        sites. in_cuda_graph: a CUDA graph is recorded of what is compiled.

        The policy is that of the context that it is called in (`attention_backend`), outside of all its own."""
        override = contexts.active()
        target = Target(self.machine, self.prefix, in_cuda_graph)
        outcome = rewrite_graph(graph_module, self.policy_now(), target, libraries)
        if outcome.plan.sites:
            contexts.mark_used()
        name, attempt = compilation() or (f"graph {len(self.report.graphs)}", None)
        graph = GraphReport.of(name, outcome, str(override) if override else "")
        self.report.add(graph, attempt)
        _log(graph)
        self._warn_of_stale(outcome.plan)
        return len(outcome.plan.sites)

    def policy_now(self) -> Policy:
        """What holds here: in an `attention_backend` its choices, outside of all those of this object."""
        override = contexts.active()
        policy = self.policy if override is None else override.over(self.policy)
        return policy.compiled_by(self.inner)

    def check_rules(self) -> None:
        """Warns, once, of each rule of its own that no site seen so far has matched."""
        sites = [site for graph in self.report.graphs if not graph.context for site in graph.plan.sites]
        if not sites or self.prefix:  # who compiles a part knows the whole model, and has looked there (in_place.py)
            return
        unmatched = [
            pattern for pattern, _ in self.policy.rules if not any(matches(pattern, site.call) for site in sites)
        ]
        self.report.unmatched_rules[:] = unmatched
        for pattern in set(unmatched) - self._warned:
            self._warned.add(pattern)
            near = difflib.get_close_matches(pattern, [site.name for site in sites], n=1, cutoff=0.0)
            warnings.warn(
                f"rules: {pattern!r} matches none of the {len(sites)} attention sites seen so far (one of them: {near[0]!r}). "
                "Under regional compile a path begins at the compiled block.",
                stacklevel=2,
            )

    def _warn_of_stale(self, plan: Plan) -> None:
        """Says once, for each reason, at which sites a plan does not say what is best."""
        reasons: dict[str, list[str]] = {}
        for site in plan.sites:
            if site.stale is not None:
                reasons.setdefault(site.stale, []).append(site.name)
        for reason, names in reasons.items():
            text = f'{reason}. Its choices are not used at {folded(names)}, what "auto" prefers is: tune again'
            if text not in self._warned:
                self._warned.add(text)
                warnings.warn(text, stacklevel=3)

    def reset(self) -> None:
        """Called by `torch._dynamo.reset()`: lets Inductor drop its CUDA graphs."""
        reset_compiler(self.inner)

    def __eq__(self, other: object) -> bool:
        if self is other:  # Dynamo asks at every call of a compiled region
            return True
        return isinstance(other, AttentionCompiler) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[Any, ...]:
        return (type(self), self.policy, self.inner, self.machine, self.prefix)

    def __repr__(self) -> str:
        return f"attnrewrite.with_backend({self.policy}, inner={self.inner!r})"


def with_backend(
    *choices: Choice, rules: Rules | None = None, inner: Inner = "inductor", **settings: Unpack[CompileSettings]
) -> AttentionCompiler:
    """A torch.compile backend that gives each attention the first of `choices` that may take it.

        model = torch.compile(model, backend=attnrewrite.with_backend("_native_cudnn", "flex"))

    choices: names (`python -m attnrewrite info` lists them) or `Backend` records, in order of preference. An attention
        that none may take stays as it is, and `.report` says why. "name@revision" pins a kernel of the hub. Three choices
        name kernels for each call themselves: "auto" by what was measured on machines like this one, a plan of
        `attnrewrite.tune` by what was measured on this model, "tune" by measuring at the first compilation
        (docs/performance.md).
    rules: other choices for some sites: a glob over module paths ("*.attn2"), "self", "cross", "masked" (by a tensor) or
        "unmasked", to a name, a record or a sequence of them. The first rule that matches a site holds for it.
    inner: the compiler that gets the graph then: a name of `torch._dynamo.list_backends(None)` or a callable
        `(graph_module, example_inputs, **kwargs)`. It receives torch.compile's `mode` and `options`.
    strict: raise `AttentionRefusedError` instead of leaving a site as it is. It comes out of the compiled model's first call
        as the `inner_exception` of Dynamo's BackendCompilerFailed, whose message has it whole.
    numerics: how far results may lie from SDPA's: "exact" (the same kernel), "reordered" (rounding), "quantised".
    cast: "bfloat16" or "float16": cast query, key, value and bias to it for a kernel that does not take their dtype, and the
        output back. None: such a kernel is refused.
    trust_remote_code: load kernels of the kernels hub whose publisher the hub does not vouch for. They run code of that
        publisher in this process. (For all of a process: the environment's ATTNREWRITE_TRUST_REMOTE_CODE=1.)
    checks: before every swapped attention look for values that no guard sees (query, key and value that are not finite, a
        row without a valid key), and behind it for an output that is not finite; raise `AttentionCheckError` with the site,
        the kernel and the place. It reads results back each time, for debugging only. None: what the environment's
        ATTNREWRITE_CHECKS says now (1, yes or true), which is off without it.

    Raises `ValueError` for an unknown or repeated name, for no choice at all, an unknown `inner`, `numerics` or `cast`;
    `TypeError` for a choice that is neither name nor record, a setting that does not exist, and a flag that is no bool.
    """
    if settings.get("checks") is None:
        settings["checks"] = checks_of_environment()
    return AttentionCompiler(make_policy(choices, rules, **settings), known_inner(inner))


def compiler_of(backend: AttentionCompiler | Choices) -> AttentionCompiler:
    """The object from `with_backend` as it is; a name, a record or several in order of preference through it."""
    return backend if isinstance(backend, AttentionCompiler) else with_backend(*several(backend))


OPTIONS = ("attention", "rules", "inner", *SETTINGS, "mode")


def entry(
    graph_module: GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """`torch.compile(model, backend="attnrewrite", options={"attention": "flex"})`: what the entry point registers.

    Options of `with_backend` by their names, its choices as "attention" (a name, a record or a list of them), and "mode",
    which torch.compile does not take beside options; all others go to the inner compiler. Raises, as the
    `inner_exception` of Dynamo's BackendCompilerFailed, what `with_backend` raises, and `ValueError` for an option that
    nobody knows.
    """
    rest = dict(options or {})
    choices = rest.pop("attention", "native")
    own = {name: rest.pop(name) for name in ("rules", "inner", *SETTINGS) if name in rest}
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
