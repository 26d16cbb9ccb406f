"""`check`: compares each swapped attention with float64, and the model's output with the unchanged model's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..graphs.eager_calls import EagerCalls
from ..graphs.inner_compilers import Inner, compile_with
from ..graphs.nodes import dtype_name
from ..graphs.tracing import traced, uncompiled
from ..kernels.flags import are_flags
from ..kernels.records import Backend, Tolerance
from ..kernels.shapes import output_rank4
from ..measuring.accuracy import accuracy
from ..measuring.capturing import Captured, capture
from ..measuring.reference import reference
from ..measuring.site_graphs import site_graph
from ..parallel.agreement import of_all
from ..parallel.settings import DescribedRanks
from ..planning.policies import Candidate
from ..planning.sites import Site
from ..planning.this_machine import machine_of
from ..reports.fidelity import Fidelity
from ..reports.progress_line import ProgressLine
from ..reports.reproducing import layouts
from ..reports.site_fidelity import Outputs, SiteFidelity
from .choices import Choices, make_policy
from .compilers import AttentionCompiler, compiler_of
from .model_parts import can_run, has_values
from .runs import floating, same_state
from .strictness import hold_strictly

# Relative errors that rounding explains, by the dtype of the products. Half precision has the record's limit (`Tolerance`).
ROUNDING = {"float64": 1e-12, "float32": 1e-5}
FAR = 10.0  # the errors of sites may add up to this multiple of the largest of them, and the compiler rounds elsewhere
TF32 = 5e-3  # the same for float32 products whose factors PyTorch may round to TF32


def check(
    model: Callable[..., Any],
    *args: Any,
    backend: AttentionCompiler | Choices,
    progress: bool = True,
    **kwargs: Any,
) -> Fidelity:
    """Runs `model(*args, **kwargs)` with the kernels of `backend`, and measures the error of each attention against float64
    and that of the output against the unchanged model.

        fidelity = attnrewrite.check(model, latents, timestep=t, backend=["flash", "native"])
        print(fidelity)                 # a table, and the first site that goes wrong
        fidelity.plot("check.png")      # a picture

    model: a module or a function. For an inference call `check` under `torch.no_grad()`, as you would call the model.
    args, kwargs: the inputs of the model.
    backend: the object from `with_backend`, or its choices: a name, a record, or several in order of preference. Its settings
        apply, except `checks`: no value raises an error. Under `context_parallel` every rank calls `check` alike: each compares
        what it has of each attention, and its output with that of the unchanged model, which it runs whole.
    progress: tells on stderr which of the three runs goes on. False: no progress.

    Returns a `Fidelity`. The model runs three or four times from the same random state. Afterwards the random state and the
    model's attributes are as before.

    1. The unchanged model, uncompiled.
    2. The model with the kernels, uncompiled. Each site is compared with SDPA in float64 on the tensors that the site gets in
       this run: at most 256 queries of each head, one head at a time in memory. A kernel that only Inductor makes (`flex`) is
       compiled by itself and runs on the site's tensors; the run itself goes on with the output of `native`.
    3. The model compiled with `backend`, whose output is compared with that of run 1. If it is further off than run 2 and the
       limits of the sites explain, the model runs once more, compiled with `native`, to see what the compiler's rounding
       explains; beyond that the output is wrong.

    Raises `TypeError` for a model that cannot be called (a class, a pipeline), `ValueError` for tensors without values
    (device "meta"), the errors of `with_backend`, and those of the model and its kernels; under `strict`, at the end, an
    `AttentionRefusedError` that names every refused site or says that there is no attention, and `ValueError` for a rule that
    matches no site.
    """
    can_run(model)
    compiler = compiler_of(backend)
    has_values(model, args, kwargs, "check")
    are_flags(progress=progress)
    with ProgressLine("attnrewrite.check", progress) as line:
        return _three_runs(model, args, kwargs, compiler, line)


def _three_runs(
    model: Callable[..., Any], args: Any, kwargs: Any, compiler: AttentionCompiler, line: ProgressLine
) -> Fidelity:
    strict = compiler.policy_now().strict
    parallel = compiler.context_parallel
    assert not isinstance(parallel, DescribedRanks)  # only `explain` makes such a compiler
    here: dict[str, Any] = {"machine": compiler.machine, "lenient": True, "context_parallel": parallel}
    lenient = AttentionCompiler(compiler.policy, compiler.inner, prefix=compiler.prefix, **here)
    policy = lenient.policy_now()

    target = uncompiled(model)
    line.say("1/3: the unchanged model")
    with same_state(target), torch.compiler.set_stance("force_eager"):  # parts of the model may be compiled already
        expected = floating(target(*args, **kwargs))

    sites: list[SiteFidelity] = []

    def receive(captured: Captured) -> None:
        line.say(f"2/3: site {len(sites) + 1}, {captured.call.site}", detail=True)
        sites.append(_site(captured, compiler.inner, sites))

    line.say("2/3: each attention beside float64")
    with same_state(target):
        uncompiled_run = floating(
            capture(model, args, kwargs, receive, policy, compiler.machine, _needs_compiler, parallel)
        )

    line.say("3/3: the compiled model")
    with same_state(target), EagerCalls() as eager:
        output = Outputs.of(expected, floating(traced(model, args, kwargs, lenient)))
    lenient.report.eager_calls[:] = eager.found
    sites_are_right = not any(site.wrong for site in sites)
    all_are = all(of_all(parallel, sites_are_right))
    if sites_are_right:
        # Where another rank has a wrong site, the uncompiled run is wrong too.
        output = replace(output, limit=FAR * _explained(expected, uncompiled_run if all_are else expected, sites))
    if any(of_all(parallel, output.wrong)):
        line.say("the compiled model with native")
        unchanged = AttentionCompiler(make_policy(["native"]), compiler.inner, **here)
        with same_state(target):
            by_native = Outputs.of(expected, floating(traced(model, args, kwargs, unchanged)))
        if sites_are_right:
            output = replace(output, limit=max(output.limit, FAR * _number(by_native.relative_error)))
    if strict:
        hold_strictly(lenient.report)
    looked_at = {site.call.site for site in sites}
    missing = tuple(dict.fromkeys(site.name for site in lenient.report.sites if site.name not in looked_at))
    machines = [str(graph.machine) for graph in lenient.report.graphs if graph.machine]
    return Fidelity(
        str(policy),
        tuple(sites),
        output,
        missing,
        machines[0] if machines else "",
        tuple(lenient.report.near_misses),
        tuple(eager.found),
    )


def _explained(expected: list[Tensor], output: list[Tensor], sites: list[SiteFidelity]) -> float:
    """A relative error of the whole output that the kernels explain: that of the uncompiled run with them, the largest limit of
    a site, and rounding to the output's dtypes."""
    dtypes = [dtype_name(each.dtype) for each in expected]
    rounding = [ROUNDING.get(dtype, Tolerance().error) for dtype in dtypes]
    return max(_number(Outputs.of(expected, output).relative_error), *(site.limit for site in sites), *rounding, 0.0)


def _number(error: float) -> float:
    return 0.0 if math.isnan(error) else error


def limit_of(site: Site) -> tuple[float, str]:
    """Returns the largest relative error that the numerics of a site's kernel explain, and the explanation."""
    record = site.backend
    tolerance = record.tolerance if record is not None else Tolerance()
    dtype = site.call.dtype
    if record is not None and record.numerics.is_inexact:
        return tolerance.error, tolerance.reason
    if dtype not in ROUNDING or any(step.name == "cast" for step in site.steps):
        return tolerance.error, tolerance.reason
    if dtype == "float32" and site.call.device == "cuda" and torch.get_float32_matmul_precision() != "highest":
        return TF32, "rounding to TF32"
    return ROUNDING[dtype], f"rounding to {dtype}"


def _site(captured: Captured, inner: Inner, before: list[SiteFidelity]) -> SiteFidelity:
    call, site = captured.call, captured.site
    tensors = (captured.query, captured.key, captured.value)
    output = captured.output
    if _needs_compiler(site):
        output = _by_itself(captured, inner)
    assert output is not None  # it ran
    exact = reference(call, *tensors, captured.mask)
    limit, why = limit_of(site)
    bad = {name: int((~each.isfinite()).sum()) for name, each in zip(("query", "key", "value"), tensors, strict=True)}
    runs = sum(each.call.site == call.site for each in before)
    return SiteFidelity(
        site.described(),
        accuracy(exact, output_rank4(output, int(call.heads))),
        limit,
        why,
        {name: count for name, count in bad.items() if count},
        runs + 1,
        layouts(*tensors),
    )


def _needs_compiler(site: Site) -> bool:
    return site.backend is not None and site.backend.compiled


def _by_itself(captured: Captured, inner: Inner) -> Tensor:
    """Compiles the site's kernel by itself, and returns its output for the site's tensors, in SDPA's form."""
    site, call = captured.site, captured.call
    record: Backend | None = site.backend
    assert record is not None
    candidate = Candidate(str(site.chosen), (record,))
    graph = site_graph(captured, site, candidate, machine_of(captured.query.device))
    output: Tensor = compile_with(inner, graph.module, list(graph.inputs))(*graph.inputs)[0].detach()
    if captured.query.dim() == 4:
        output = output.unflatten(2, (int(call.heads), int(call.value_dim))).transpose(1, 2)
    return output
