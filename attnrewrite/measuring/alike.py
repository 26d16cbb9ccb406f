"""`Alike`: attentions for which a kernel takes the same time. Times are those of the first; the error of a quantised or sparse
kernel depends on the values that it gets, and is measured at each attention, by the code that was compiled for the first."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..graphs.inner_compilers import Inner, compile_with
from ..kernels.calls import AttentionCall
from ..kernels.decisions import Decision
from ..kernels.machines import Machine
from ..planning.measurements import Inexact, Measurement, worst
from ..planning.policies import Candidate
from ..planning.sites import Site
from .capturing import Captured
from .choosing import choose
from .comparing import Comparison, limit_of, too_inexact
from .search import Search
from .site_graphs import Memory, SiteGraph, inputs_for, site_graph
from .workers import Worker


@dataclass(frozen=True)
class Compiled:
    """A kernel in the compiled graph of a site, without the site's tensors.

    scale: of the site, which the code holds as a number.
    """

    candidate: Candidate
    site: Site  # the plan that accepted the candidate
    memory: Memory
    scale: float | None
    run: Callable[..., Any]


@dataclass
class Errors:
    """The errors of quantised and sparse kernels by name, on the tensors of one site.

    dropped: why a kernel cannot take the site: it raised there.
    nothing: why nothing was compared; "" if something was.
    """

    errors: dict[str, float | None] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    nothing: str = ""

    def add(self, other: Errors) -> None:
        """Takes in another run of the site: the worst error counts."""
        for name, error in other.errors.items():
            self.errors[name] = worst((self.errors[name], error)) if name in self.errors else error
        self.dropped = {**other.dropped, **self.dropped}
        self.nothing = self.nothing or other.nothing


def _of_input(name: str, found: Errors | None) -> float | None:
    if found is None:
        return None
    return math.nan if name in found.dropped else found.errors.get(name)


def compiled_graph(
    captured: Captured, site: Site, candidate: Candidate, machine: Machine, inner: Inner
) -> tuple[Compiled, SiteGraph]:
    """Compiles the graph of a site with a kernel. site: the plan that accepted the candidate."""
    graph = site_graph(captured, site, candidate, machine)
    with torch.set_grad_enabled(captured.call.needs_grad):
        run = compile_with(inner, graph.module, list(graph.inputs))
    return Compiled(candidate, site, graph.memory, captured.call.scale, run), graph


@dataclass
class Alike:
    """Attentions whose calls differ in name, role and scale alone, and whose tensors lie alike in memory.

    measured: the kernels that accepted, as measured at the first attention. A kernel of `compiled` is dropped here only for
        what does not depend on its error.
    decisions: on all candidates.
    plans: by the name of a kernel that accepted, the plan that did.
    samples: seconds by the name of a kernel, from the same rounds for all.
    compiled: the quantised and sparse kernels that ran, by name.
    of_native: native's error at the first attention.
    first: the errors at the first attention.
    """

    machine: Machine
    search: Search
    measured: tuple[Measurement, ...]
    decisions: tuple[tuple[str, Decision], ...]
    plans: Mapping[str, Site]
    samples: Mapping[str, Sequence[float]]
    compiled: dict[str, Compiled]
    of_native: float | None
    first: Errors

    def site(self, call: AttentionCall, found: Sequence[Errors | None]) -> Site:
        """The plan of one of the attentions, by its own errors.

        found: its errors at each of the model's inputs; None: it did not run there.
        """
        measured = tuple(self._at(each, call, found) for each in self.measured)
        chosen = choose(measured, self.samples, self.search.min_gain)
        if chosen is None and "native" in self.plans:
            chosen = "native"  # the unchanged call is never wrong: only the limit may be too low for it
        return self.chosen(Site(call, self.decisions, None, measured=measured), chosen)

    def chosen(self, site: Site, name: str | None) -> Site:
        """The site with another choice among the kernels that accepted."""
        plan = self.plans.get(name or "")
        last = sorted(self.decisions, key=lambda each: each[0] == name)  # as in every plan, the choice comes last
        source, record = (plan.source, plan.backend) if plan else (None, None)
        error = next((each.error for each in site.measured if each.name == name), None)
        return replace(
            site, decisions=tuple(last), chosen=name, source=source, backend=record,
            inexact=Inexact.of(record, error) if record else None,
        )  # fmt: skip

    def closer(self, site: Site) -> str | None:
        """The kernel that takes the site if its choice is given back: for a quantised or sparse choice the fastest of the
        others, for another choice `native`; None for `native`."""
        if site.chosen in (None, "native"):
            return None
        rest = [each for each in site.measured if each.name not in self.compiled]
        return (
            choose(rest, self.samples, self.search.min_gain) or "native" if site.chosen in self.compiled else "native"
        )

    def _at(self, each: Measurement, call: AttentionCall, found: Sequence[Errors | None]) -> Measurement:
        if each.name not in self.compiled:
            return each
        ran = [errors for errors in found if errors is not None]
        dropped = next((errors.dropped[each.name] for errors in ran if each.name in errors.dropped), None)
        error = worst([errors.errors[each.name] for errors in ran if each.name in errors.errors])
        errors = tuple(_of_input(each.name, one) for one in found)
        record = self.compiled[each.name].candidate.on(self.machine)
        nothing = next((errors.nothing for errors in ran if errors.nothing), "")
        reason = too_inexact(error, record, call, self.search.max_error, self.of_native, nothing)
        limit = limit_of(record, self.search.max_error)
        return replace(each, error=error, errors=errors, limit=limit, dropped=dropped or reason or each.dropped)

    def errors_at(self, captured: Captured) -> Errors:
        """Runs the quantised and sparse kernels on the tensors of another of the attentions."""
        if not self.compiled:
            return Errors()
        comparison, found = Comparison(captured), Errors()
        worker = Worker(captured.query.device)
        devices = [captured.query.device] if captured.query.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):
                for name, compiled in self.compiled.items():
                    run = functools.partial(self._error, compiled, captured, comparison)
                    error, dropped = worker.attempt(run, self.search.time_limit)
                    if dropped is None:
                        found.errors[name] = error
                    else:
                        found.dropped[name] = dropped
        except KeyboardInterrupt:
            worker.interrupt()
            raise
        finally:
            worker.leave()
        found.nothing = comparison.nothing
        if found.nothing:
            warnings.warn(
                f"attnrewrite.tune compared nothing at {captured.call.site or 'a call'}: {found.nothing}. No quantised or "
                "sparse kernel is used there",
                stacklevel=2,
            )
        return found

    def _error(self, compiled: Compiled, captured: Captured, comparison: Comparison) -> float | None:
        inputs = None
        if compiled.scale == captured.call.scale:
            inputs = inputs_for(compiled.memory, captured, compiled.site)
        run = compiled.run
        if inputs is None:  # the code for the first attention does not compute this one
            site = replace(compiled.site, call=captured.call)
            other, graph = compiled_graph(captured, site, compiled.candidate, self.machine, self.search.inner)
            inputs, run = graph.inputs, other.run
        with torch.set_grad_enabled(captured.call.needs_grad):
            output: Tensor = run(*inputs)[0].detach()
        return comparison.error(output)
