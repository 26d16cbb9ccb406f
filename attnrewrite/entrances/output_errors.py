"""`max_output_error` of `tune`: sites are given back to exact kernels until the model's output holds it.

The reference is the unchanged model in its own dtypes: the error is then what the plan's kernels do to the output, without
what rounding to these dtypes does to both. Both run uncompiled, so that no compiler's rounding counts and a plan is tried in
the time of a trace and a run.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..graphs.tracing import Call, traced_calls, uncompiled
from ..measuring.alike import Alike
from ..measuring.search import Search
from ..pipeline import Target, rewrite_graph
from ..planning.measurements import GivenBack, OutputError, worst
from ..planning.plans import Plan
from ..planning.sites import Site
from ..reports.progress_line import ProgressLine
from ..reports.site_fidelity import Outputs
from .choices import make_policy
from .runs import floating, same_state


@dataclass(frozen=True)
class _Change:
    """A site that is to be given back: its place in the plan, and the other kernel."""

    place: int
    back: GivenBack


def hold_output(
    model: Callable[..., Any],
    calls: Iterable[Call],
    plan: Plan,
    alike: Sequence[Alike],
    search: Search,
    line: ProgressLine,
) -> Plan:
    """The plan with as many sites given back as the output needs, with `Tuning.output`.

    calls: the inputs of the model, read once for each plan that is tried.
    alike: for each site of the plan what was measured.
    """
    assert search.max_output_error is not None
    assert plan.tuning is not None
    limit = search.max_output_error
    line.say("output error: the unchanged model")
    expected = _outputs_of_unchanged(model, calls)
    changes = _changes(plan.sites, alike)
    tried: dict[int, float] = {}

    def error(number: int) -> float:
        """The output's error with the first `number` changes."""
        if number not in tried:
            line.say(f"output error: {number} of {len(changes)} changes to closer kernels")
            tried[number] = _error(model, calls, _changed(plan, alike, changes[:number]), search, expected)
        return tried[number]

    fails, holds = 0, len(changes)
    if error(0) <= limit:
        holds = 0
    while holds - fails > 1:
        middle = (fails + holds) // 2
        fails, holds = (fails, middle) if error(middle) <= limit else (middle, holds)
    found = OutputError(limit, error(holds), tried[0], _of_sites(changes[:holds]))
    if holds == len(changes) and (holds or not found.held):
        reached = "nothing could be compared" if math.isnan(found.error) else f"the error is {found.error:.1e}"
        warnings.warn(
            f"attnrewrite.tune: max_output_error={limit:g} is held by no plan with faster kernels (the error of the fastest is "
            f"{found.before:.1e}): native takes every site, and {reached}",
            stacklevel=4,
        )
    held = _changed(plan, alike, changes[:holds])
    return replace(held, tuning=replace(plan.tuning, output=found))


def _changes(sites: Sequence[Site], alike: Sequence[Alike]) -> list[_Change]:
    """Every change to a closer kernel, in the order in which they are made: quantised and sparse kernels first, then what only
    rounds, of each the largest error first."""
    stages: tuple[list[_Change], list[_Change]] = ([], [])
    for place, (site, of) in enumerate(zip(sites, alike, strict=True)):
        now = site
        while (closer := of.closer(now)) is not None:
            measured = {each.name: each for each in now.measured}
            old, new = measured[str(now.chosen)], measured.get(closer)
            took = (new.milliseconds or 0.0) - (old.milliseconds or 0.0) if new is not None else 0.0
            stage = stages[0] if now.chosen in of.compiled else stages[1]
            stage.append(_Change(place, GivenBack(site.name, str(now.chosen), closer, old.error, took)))
            now = of.chosen(now, closer)
    return [change for stage in stages for change in sorted(stage, key=lambda each: -_number(each.back.error))]


def _number(error: float | None) -> float:
    return math.inf if error is None or math.isnan(error) else error


def _changed(plan: Plan, alike: Sequence[Alike], changes: Sequence[_Change]) -> Plan:
    """The plan with changes made. A site's kernels that are less exact than its new one are dropped there, so that no plan
    falls back on them."""
    sites = list(plan.sites)
    for change in changes:
        place, kernel = change.place, change.back.kernel
        of, site = alike[place], sites[place]
        given_back = set(of.compiled) if kernel in of.compiled else {each.name for each in site.measured} - {"native"}
        measured = tuple(
            replace(each, dropped="given back: max_output_error")
            if each.name in given_back and each.dropped is None
            else each
            for each in site.measured
        )
        sites[place] = of.chosen(replace(site, measured=measured), change.back.instead)
    return replace(plan, sites=tuple(sites))


def _of_sites(changes: Sequence[_Change]) -> tuple[GivenBack, ...]:
    """One entry for each site, from its first kernel to its last."""
    found: dict[int, GivenBack] = {}
    for change in changes:
        before, now = found.get(change.place), change.back
        if before is not None:
            now = replace(before, instead=now.instead, milliseconds=before.milliseconds + now.milliseconds)
        found[change.place] = now
    return tuple(found.values())


def _outputs_of_unchanged(model: Callable[..., Any], calls: Iterable[Call]) -> list[list[Tensor]]:
    target = uncompiled(model)
    with same_state(target), torch.compiler.set_stance("force_eager"):  # parts of the model may be compiled already
        return [[each.clone() for each in floating(target(*args, **kwargs))] for args, kwargs in calls]


def _error(
    model: Callable[..., Any], calls: Iterable[Call], plan: Plan, search: Search, expected: Sequence[Sequence[Tensor]]
) -> float:
    """The largest error of the outputs with a plan. A kernel that only Inductor makes is `native` here: it only rounds."""
    sites = [
        replace(site, chosen="native", backend=None, measured=())
        if site.backend is not None and site.backend.compiled
        else site
        for site in plan.sites
    ]
    policy = make_policy([replace(plan, sites=tuple(sites))], numerics=search.numerics)
    errors: list[float] = []

    def backend(graph_module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        rewrite_graph(graph_module, policy, Target(None))
        return graph_module.forward

    def compare(output: Any) -> None:
        errors.append(Outputs.of(expected[len(errors)], floating(output)).relative_error)

    target = uncompiled(model)
    with same_state(target):
        traced_calls(model, calls, backend, compare)
    found = worst(errors)
    return math.nan if found is None else found
