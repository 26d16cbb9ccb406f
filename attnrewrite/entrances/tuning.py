"""`tune`: times every kernel that accepts a site of a model on the site's own tensors, and chooses the best."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..graphs.inner_compilers import Inner, known_inner
from ..graphs.tracing import Call
from ..kernels.calls import AttentionCall
from ..kernels.flags import are_flags
from ..kernels.machines import Machine
from ..measuring.alike import Alike, Errors
from ..measuring.capturing import Captured, capture_calls
from ..measuring.measure_site import measure_alike
from ..measuring.of_all_ranks import choice, measured_by_all
from ..measuring.search import Search
from ..measuring.site_graphs import lies
from ..parallel.settings import ContextParallel, read_context_parallel
from ..planning.matching import like
from ..planning.measurements import Tuning
from ..planning.plans import Plan
from ..planning.policies import Candidate
from ..planning.selectors import candidate, usual_candidates
from ..planning.sites import Site
from ..planning.this_machine import machine_of
from ..reports.progress_line import ProgressLine
from ..version import __version__
from .choices import Choices, candidates_of, make_policy, numerics_of
from .model_calls import read_calls
from .model_parts import can_run
from .output_errors import hold_output
from .runs import SameContents

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def tune(
    model: Callable[..., Any],
    *args: Any,
    candidates: Choices | None = None,
    numerics: str = "reordered",
    max_error: float | None = None,
    min_gain: float = 0.02,
    inner: Inner = "inductor",
    time_limit: float = 60.0,
    inputs: Iterable[Call] | None = None,
    max_output_error: float | None = None,
    context_parallel: ContextParallel | DeviceMesh | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Plan:
    """Runs `model(*args, **kwargs)` once, and finds the fastest kernel for each attention site.

        with torch.no_grad():
            plan = attnrewrite.tune(model, **inputs)
        plan.save("plan.json")
        compiled = torch.compile(model, backend=attnrewrite.with_backend(plan))

    At each new kind of site the run pauses: every candidate that accepts the site is compiled as it would stand in the model
    (with padding and packing), run on the site's own query, key, value and mask, timed in turn with the others, and compared
    with float64 on up to 256 query rows. Sites that differ only in name, role and scale, and whose tensors lie alike in memory,
    are timed once. The error of a quantised or sparse kernel depends on the values that it gets: it is measured at each site,
    each time that the site runs, and the worst counts. Where it is too large the next kernel takes the site. A call that needs
    a gradient is timed with its backward.

    model: a module or a function; of a pipeline its denoiser. For an inference call `tune` under `torch.no_grad()`.
    args, kwargs: the inputs of the model.
    candidates: names or `Backend` records. None: all kernels of this machine, except those of the kernels hub, which would be
        downloaded: name them to include them. `native` always takes part.
    numerics: "exact", "reordered" (rounding), "quantised" or "sparse". A plan with quantised or sparse choices needs
        `with_backend(plan, numerics=...)` with that word: otherwise they are refused, and the next kernel takes the site.
    max_error: the largest relative error |out - ref| / |ref| that is allowed. None: 10 times the error of `native`, which
        rounding explains, and for a quantised or sparse kernel twice its stated error.
    max_output_error: the largest relative error of the model's whole output, at each of the calls, against the unchanged
        model, which runs uncompiled in its own dtypes. Sites are given back to kernels that are closer to SDPA, the largest
        error first, quantised and sparse kernels before all others, until the model with the plan's kernels, uncompiled too,
        holds it; `plan.tuning.output` says what that cost. If no faster kernel holds it, `native` takes every site, with a
        warning. None: no limit.
    min_gain: the least gain as a fraction (0.02: 2 %). Only a kernel that is faster by more than this, and by more than the
        noise, replaces a simpler one; `native` is the simplest, then comes the order of `candidates`.
    inner: the compiler, as in `with_backend`.
    inputs: several calls of the model in place of `args` and `kwargs`, each a pair (args, kwargs), as
        `[((), first_step), ((), last_step)]`. The error of a quantised or sparse kernel at a site is its worst over all of
        them; times are those of the call at which a site runs first. The calls run one after another; an iterator is read as
        they run, so that the tensors of only one call need be in memory.
    time_limit: seconds for each candidate at each site, compiling included. A candidate that takes longer, raises, or returns
        NaN, infinity or another shape is dropped, with the reason in the plan. One that hangs on the host is left running on
        its thread. A CUDA kernel that hangs cannot be ended: `RuntimeError` says so.
    context_parallel: the ranks that will share the model, as in `with_backend`. Every rank calls `tune` alike, with the same
        inputs, and measures what it has of each attention. All return the same plan, by the time of the slowest rank and the
        worst error (but for the steps of a ring), for `with_backend(plan, context_parallel=...)`. None: no sharing.
    progress: tells on stderr what runs: on a terminal in one line, elsewhere in a line for each kernel at each site. False: no
        progress.

    Returns a `Plan`. Ctrl-C ends the run and returns the plan so far (`plan.tuning.complete` is False); before the first site
    is measured, with `max_output_error`, and under `context_parallel`, it raises `KeyboardInterrupt`.

    Raises `TypeError` and `ValueError` for other arguments (a class, a pipeline, tensors on "meta", `max_output_error` together
    with `context_parallel` among them), `RuntimeError` for a GPU that hangs, `RanksDisagreeError` if a rank fails, and the
    model's own errors.
    """
    parallel = read_parallel(context_parallel, max_output_error)
    search = read_search(model, candidates, numerics, max_error, min_gain, inner, time_limit, max_output_error)
    are_flags(progress=progress)
    calls = read_calls(model, args, kwargs, inputs, again=max_output_error is not None)
    return search_model(model, calls, search, progress=progress, parallel=parallel)


def search_model(
    model: Callable[..., Any],
    calls: Iterable[Call],
    search: Search,
    measure: Callable[..., Alike] = measure_alike,
    progress: bool = True,
    parallel: ContextParallel | None = None,
) -> Plan:
    """`tune` with its arguments read.

    calls: the inputs of the model, at least one. With `max_output_error` they are read several times.
    measure: what measures the first of the attentions that are alike.
    parallel: the ranks that share the model.
    """
    started = time.perf_counter()
    if search.max_output_error is not None:
        calls = SameContents(model, calls)
    line = ProgressLine("attnrewrite.tune", progress)
    line.say("running the model to its first attention")
    known: dict[tuple[Any, ...], Alike] = {}  # by the call and how its tensors lie in memory
    sites: dict[str, _Seen] = {}
    machines: list[Machine] = []
    begun = 0  # calls that have begun

    def counted() -> Iterator[Call]:
        nonlocal begun
        for call in calls:
            begun += 1
            if begun > 1:
                line.say(f"input {begun}")
            yield call
            del call  # an iterator makes the next call after this one is freed

    def receive(captured: Captured) -> None:
        call = captured.call
        name = call.site
        while name in sites and like(sites[name].call) != like(call):
            name += "'"  # the same name in another graph, or with other sizes
        seen = sites.get(name)
        kind = (like(call), *lies(captured))
        alike = known.get(kind) if seen is None else seen.alike
        if alike is None:
            machines.append(machine_of(captured.query.device))
            at = f"site {len(known) + 1}, {call.site} ({call.batch}, {call.heads}, {call.q_len}, {call.head_dim}): "

            def say(text: str, detail: bool = False) -> None:
                line.say(at + text, detail)

            alike = known[kind] = measure(captured, machines[-1], search, say)
            errors = alike.first
        else:
            errors = alike.errors_at(captured)
        if seen is None:
            seen = sites[name] = _Seen(call, alike)
        seen.errors.setdefault(begun - 1, Errors()).add(errors)

    complete = True
    try:
        capture_calls(model, counted(), receive, make_policy(["native"]), parallel=parallel)
    except KeyboardInterrupt:
        if parallel is not None or search.max_output_error is not None or not sites:
            raise
        complete = False
        line.end()
        print("attnrewrite.tune: interrupted, returning the plan so far", file=sys.stderr)
    finally:
        line.end()
    found = [
        (seen.alike, seen.alike.site(seen.call, [seen.errors.get(number) for number in range(begun)]))
        for seen in sites.values()
    ]
    if parallel is not None:
        found = _by_all(found, parallel, search)
    plan = Plan(tuple(site for _, site in found), _tuning(model, machines, search, complete, begun))
    if search.max_output_error is not None:
        plan = hold_output(model, calls, plan, [alike for alike, _ in found], search, line)
    assert plan.tuning is not None
    return replace(plan, tuning=replace(plan.tuning, seconds=time.perf_counter() - started))


def _by_all(found: list[tuple[Alike, Site]], parallel: ContextParallel, search: Search) -> list[tuple[Alike, Site]]:
    """The sites as all ranks measured them. The steps of a ring stay: of those a rank may have fewer than another."""
    of_all = iter(measured_by_all(parallel, [site.measured for _, site in found if not site.call.logsumexp]))
    result = []
    for alike, site in found:
        if not site.call.logsumexp:
            measured = next(of_all)
            site = alike.chosen(replace(site, measured=measured), choice(measured, search.min_gain))
        result.append((alike, site))
    return result


@dataclass
class _Seen:
    """A site that ran."""

    call: AttentionCall
    alike: Alike
    errors: dict[int, Errors] = field(default_factory=dict)  # by the number of the input


def read_search(
    model: Any,
    candidates: Any = None,
    numerics: Any = "reordered",
    max_error: Any = None,
    min_gain: Any = 0.02,
    inner: Any = "inductor",
    time_limit: Any = 60.0,
    max_output_error: Any = None,
) -> Search:
    """The arguments of `tune` as a `Search`. Raises `TypeError` and `ValueError` as `tune`."""
    can_run(model)
    numbers = {
        "max_error": max_error, "max_output_error": max_output_error, "min_gain": min_gain, "time_limit": time_limit
    }  # fmt: skip
    for name, value in numbers.items():
        if name.startswith("max_") and value is None:
            continue
        # inf and NaN are not below it, nor is a whole number that no float can be.
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= sys.float_info.max:
            raise ValueError(f"{name} is {value!r}: give a number from 0 on{_UNITS[name]}")
    found = usual_candidates() if candidates is None else candidates_of(candidates, "candidates")
    native = [each for each in found if each.name == "native"] or [candidate("native")]
    ordered: tuple[Candidate, ...] = (*native, *(each for each in found if each.name != "native"))
    return Search(
        ordered,
        numerics_of(numerics),
        max_error,
        min_gain,
        known_inner(inner),
        time_limit,
        max_output_error=max_output_error,
    )


def read_parallel(context_parallel: Any, max_output_error: Any) -> ContextParallel | None:
    """The argument `context_parallel`. Raises `ValueError` beside `max_output_error`, and as `with_backend`."""
    parallel = read_context_parallel(context_parallel)
    if parallel is not None and max_output_error is not None:
        raise ValueError(
            f"max_output_error is {max_output_error!r} and context_parallel is given: the output of a shared model is not "
            "measured. Give max_error, which bounds each attention, or tune without context_parallel"
        )
    return parallel


_UNITS = {
    "max_error": ", the relative error that is allowed, or None",
    "max_output_error": ", the relative error of the output that is allowed, or None",
    "min_gain": ", as 0.02 for 2 %",
    "time_limit": " of seconds",
}


def _tuning(model: Any, machines: list[Machine], search: Search, complete: bool, inputs: int) -> Tuning:
    plain = getattr(model, "_orig_mod", model)
    name = getattr(plain, "__qualname__", None) or type(plain).__name__
    return Tuning(
        name, tuple({repr(each): each for each in machines}.values()), __version__, search.numerics.word,
        search.max_error, search.min_gain, complete, inputs=inputs,
    )  # fmt: skip
