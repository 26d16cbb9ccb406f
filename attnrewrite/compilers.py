"""`with_backend`: the torch.compile backend that swaps attention and hands the graph to another compiler."""

from __future__ import annotations

import difflib
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.fx import GraphModule

from .machines import Machine
from .pipeline import rewrite_graph
from .policies import Choice, Policy, make_policy, matches
from .reports import GraphReport, Report

logger = logging.getLogger("attnrewrite")

Inner = str | Callable[..., Any]


# The name of the entry point (pyproject.toml), under which torch.compile finds this package.
NAME = "attnrewrite"


class AttentionCompiler:
    """A torch.compile backend. Made by `with_backend`; `report` tells what it did.

    Two of them are equal if they are configured equally: Dynamo then reuses compiled code between them.
    """

    # torch.compile takes an object for a registered backend by its name. Only for those does it release the tracing
    # state, without which `model.to(...)` can fail after compiling (torch/_dynamo/convert_frame.py, 2.13).
    __name__ = NAME

    def __init__(self, policy: Policy, inner: Inner = "inductor", machine: Machine | None = None) -> None:
        self.policy = policy
        self.inner = inner
        self.machine = machine
        self.report = Report(str(policy))
        self._warned: set[str] = set()

    def __call__(self, graph_module: GraphModule, example_inputs: list[Any], **kwargs: Any) -> Callable[..., Any]:
        """Rewrites the graph in place and compiles it. `kwargs` (mode, options) are torch.compile's, for the inner compiler."""
        self.rewrite(graph_module)
        self.check_rules()
        return compile_with(self.inner, graph_module, example_inputs, **kwargs)

    def rewrite(self, graph_module: GraphModule, swap: bool = True) -> None:
        """Plans, reports, and, if `swap`, puts the chosen kernels in place."""
        outcome = rewrite_graph(graph_module, self.policy, self.machine, swap)
        context = torch._guards.CompileContext.try_get()
        # Dynamo's id of the compilation, as "0/1": the frame, and how many times it was compiled before.
        name = str(context.compile_id) if context else f"graph {len(self.report.graphs)}"
        graph = GraphReport(name, outcome.plan, outcome.machine, outcome.seconds, outcome.unchanged)
        self.report.add(graph, (context, context.attempt) if context else None)
        _log(graph)

    def check_rules(self) -> None:
        """Warns, once, of each rule that no site seen so far has matched."""
        sites = self.report.sites
        if not sites:
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

    def reset(self) -> None:
        """Called by `torch._dynamo.reset()`: lets Inductor drop its CUDA graphs."""
        if self.inner == "inductor":
            torch._TorchCompileInductorWrapper(None, None, None).reset()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AttentionCompiler) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[Any, ...]:
        return (type(self), self.policy, self.inner, self.machine)

    def __repr__(self) -> str:
        return f"attnrewrite.with_backend({self.policy}, inner={self.inner!r})"


def with_backend(
    *choices: Choice,
    rules: Mapping[str, Choice | Iterable[Choice]] | None = None,
    inner: Inner = "inductor",
    strict: bool = False,
    numerics: str = "reordered",
    cast: str | None = None,
    trust_remote_code: bool = False,
) -> AttentionCompiler:
    """A torch.compile backend that gives each attention the first of `choices` that may take it.

        model = torch.compile(model, backend=attnrewrite.with_backend("_native_cudnn", "flex"))

    choices: names (`python -m attnrewrite info` lists them) or `Backend` records, in order of preference. An attention
        that none may take stays as it is, and `.report` says why. "name@revision" pins a kernel of the hub.
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

    Raises `ValueError` for an unknown or repeated name, for no choice at all, an unknown `inner`, `numerics` or `cast`;
    `TypeError` for a choice that is neither name nor record.
    """
    policy = make_policy(choices, rules, strict, numerics, cast, trust_remote_code)
    return AttentionCompiler(policy, _known_inner(inner))


OPTIONS = ("rules", "inner", "strict", "numerics", "cast", "trust_remote_code")


def entry(
    graph_module: GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """`torch.compile(model, backend="attnrewrite", options={"attention": "flex"})`: what the entry point registers.

    Options of `with_backend` by their names, its choices as "attention" (a name or a list); others go to the inner compiler.
    """
    rest = dict(options or {})
    choices = rest.pop("attention", "native")
    own = {name: rest.pop(name) for name in OPTIONS if name in rest}
    mode = rest.pop("mode", mode)
    compiler = with_backend(*([choices] if isinstance(choices, str) else choices), **own)
    kwargs: dict[str, Any] = {"mode": mode} if mode else {}
    if rest:
        kwargs["options"] = rest
    return compiler(graph_module, example_inputs, **kwargs)


def compile_with(
    inner: Inner, graph_module: GraphModule, example_inputs: list[Any], **kwargs: Any
) -> Callable[..., Any]:
    """Calls the inner compiler as torch.compile would."""
    if inner == "inductor":
        # The object that torch.compile(backend="inductor") makes: it applies mode and options for this one compilation.
        compiler = torch._TorchCompileInductorWrapper(kwargs.get("mode"), kwargs.get("options"), None)
        compiled: Callable[..., Any] = compiler(graph_module, example_inputs)
        return compiled
    function = torch._dynamo.lookup_backend(inner) if isinstance(inner, str) else inner
    result: Callable[..., Any] = function(graph_module, example_inputs, **kwargs)
    return result


def _known_inner(inner: Inner) -> Inner:
    if callable(inner):
        return inner
    known = torch._dynamo.list_backends(exclude_tags=())
    if inner not in known or inner == NAME:
        near = difflib.get_close_matches(str(inner), known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known)}"
        raise ValueError(f"inner is {inner!r}, which is no backend of torch.compile; {hint} A callable will do as well")
    return inner


def _log(graph: GraphReport) -> None:
    sites = graph.plan.sites
    logger.info(
        "graph %s: %d attention sites, %d taken by a choice, %d left as they were, %.3f s",
        graph.name, len(sites), graph.plan.swapped, len(sites) - graph.plan.swapped, graph.seconds,
    )  # fmt: skip
    for site in sites:
        reasons = "".join(f"; {name} refused: {refused}" for name, refused in site.refusals)
        logger.debug("graph %s: %s: %s%s", graph.name, site.name, site.chosen or "unchanged", reasons)
