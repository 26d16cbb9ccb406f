"""Selectors choose kernels call by call: "auto" by a table, a plan by its measurements. ("tune": measuring/first_use.py.)"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from ..graphs.inner_compilers import Inner
from ..graphs.sizes import UnbackedSizeError
from ..kernels.calls import AttentionCall
from ..kernels.machines import Machine
from ..kernels.records import Backend, Numerics
from ..kernels.sources import Hub
from .matching import find, foreign
from .plans import Plan
from .policies import Candidate
from .preferences import ROWS, Row, wide_on_cpu
from .registry import canonical, names, records_of
from .sites import Site


def candidate(name: str, note: str | None = None, stale: str | None = None) -> Candidate:
    return Candidate(canonical(name), records_of(name), note, stale)


def usual_candidates() -> tuple[Candidate, ...]:
    """Every kernel, also with the options that its record wants tried, except those of the hub, which would be downloaded."""
    found = []
    for name in names():
        variants = dict.fromkeys(variant for record in records_of(name) for variant in record.variants)
        found += [candidate(name), *(candidate(f"{name}[{variant}]") for variant in variants)]
    return tuple(each for each in found if not any(isinstance(record.source, Hub) for record in each.records))


@dataclass(frozen=True)
class Auto:
    """`with_backend("auto")`: the kernels of the first row in the table (preferences.py) that fits the call, then `native`."""

    name: str = "auto"
    rows: tuple[Row, ...] = ROWS
    inductor: bool = (
        True  # whether Inductor compiles the graph: without it some kernels are other code (`Backend.compiled`)
    )

    def select(
        self, call: AttentionCall, machine: Machine, limit: Numerics, measure: bool = False, stale: str | None = None
    ) -> tuple[Candidate, ...]:
        found: list[Candidate] = []
        try:
            for row in self.rows if call.obstacle is None else ():
                preferred = [candidate(name, f"auto: {row.evidence}", stale) for name in row.names]
                # Each question about sizes may cost a recompilation: ask only if a kernel of the row can run here.
                preferred = [each for each in preferred if self.inductor or not each.on(machine).compiled]
                able = any(machine.has(each.on(machine).requires) for each in preferred)
                if able and row.fits(call, machine, limit):
                    found = [each for each in preferred if each.on(machine).numerics <= limit]
                    if row.numerics <= Numerics.REORDERED:
                        break
                    found += self._below(row.numerics, call, machine, stale)
                    break
        except UnbackedSizeError:  # nothing is known about sizes that depend on data
            found = []
        native = candidate("native", "auto: no evidence that another is faster" if not found else None, stale)
        if call.written_as == "flex" and call.mask.is_tensor:
            native = replace(
                native, keeps="auto: flex computes this mask in its kernel, SDPA would read it from memory"
            )
        elif not found and wide_on_cpu(call, machine):
            native = replace(
                native,
                keeps="auto: on a CPU the model's own products are faster for heads wider than there are queries and keys",
            )
        return (*found, native)

    def _below(self, numerics: Numerics, call: AttentionCall, machine: Machine, stale: str | None) -> list[Candidate]:
        """The kernels to prefer if a quantised kernel refuses the call."""
        chosen = self.select(call, machine, Numerics(numerics - 1), stale=stale)
        return [each for each in chosen if each.name != "native"]

    def compiled_by(self, inner: Inner) -> Auto:
        return replace(self, inductor=inner == "inductor")

    def libraries(self, machine: Machine) -> tuple[Candidate, ...]:
        return tuple(candidate(name) for name in dict.fromkeys(name for row in self.rows for name in row.names))


@dataclass(frozen=True)
class Planned:
    """`with_backend(plan)`: the plan's kernels for a call that was measured, then "auto"; only "auto" for any other call.

    sharing: the paths of the repeated blocks that share the code; a call bears the name of the first. (): of one module.

    Raises `ValueError` for a plan that was not measured.
    """

    plan: Plan
    name: str = "plan"
    otherwise: Auto = Auto()  # for the calls that were not measured
    sharing: tuple[str, ...] = ()
    # Of the plan's sites: plans are equal without them.
    records: tuple[Backend | None, ...] = field(init=False)

    def __post_init__(self) -> None:
        if self.plan.tuning is None:
            raise ValueError("this plan was not measured: make one with attnrewrite.tune(model, ...)")
        object.__setattr__(self, "records", tuple(site.backend for site in self.plan.sites))

    def select(self, call: AttentionCall, machine: Machine, limit: Numerics, measure: bool) -> tuple[Candidate, ...]:
        tuning = self.plan.tuning
        assert tuning is not None
        if call.obstacle is not None:
            return (candidate("native"),)
        if (stale := foreign(tuning.machines, machine)) is None:
            try:
                site = find(self.plan.sites, call, self._names(call))
            except UnbackedSizeError:
                site = None
            stale = "it has no such call" if site is None else _other_packages(site, tuning.machines, machine)
            if site is not None and stale is None:
                chosen = measured_candidates(site, "plan")
                if (why := site.stale or _unknown(site, chosen)) is not None:
                    chosen = tuple(replace(each, stale=f"the plan of {tuning.model}: {why}") for each in chosen)
                return (*chosen, *self.otherwise.select(call, machine, limit))
        return self.otherwise.select(call, machine, limit, stale=f"the plan of {tuning.model}: {stale}")

    def _names(self, call: AttentionCall) -> list[str]:
        """The names of the call in each of the blocks that share the code."""
        first = self.sharing[0] if self.sharing else None
        if first is None or not call.site.startswith(first):
            return []
        return [path + call.site[len(first) :] for path in self.sharing]

    def compiled_by(self, inner: Inner) -> Planned:
        return replace(self, otherwise=AUTO.compiled_by(inner))

    def libraries(self, machine: Machine) -> tuple[Candidate, ...]:
        chosen = {each.name: each for site in self.plan.sites for each in measured_candidates(site, "plan")[:1]}
        return (*chosen.values(), *self.otherwise.libraries(machine))

    def __str__(self) -> str:
        return self.name


def measured_candidates(site: Site, by: str) -> tuple[Candidate, ...]:
    """The site's choice, then the other timed kernels, the fastest first. Names without a record here are left out."""
    timed = {each.name: each for each in site.measured if each.milliseconds is not None and each.dropped is None}
    order = sorted(timed, key=lambda name: (name != site.chosen, timed[name].least))
    if site.chosen is not None and site.chosen not in timed:
        order.insert(0, site.chosen)
    return tuple(_known(order, site, by))


def _known(order: list[str], site: Site, by: str) -> Iterator[Candidate]:
    native = next((each.milliseconds for each in site.measured if each.name == "native"), None)
    timed = {each.name: each.milliseconds for each in site.measured}
    errors = {each.name: each.error for each in site.measured}
    for name in order:
        note = f"{by}: {_milliseconds(timed.get(name))}"
        note += "" if name == "native" else f", native {_milliseconds(native)}"
        if name == site.chosen and site.backend is not None:  # the registry may not have this record
            yield Candidate(name, (site.backend,), note, error=errors.get(name))
            continue
        try:
            yield replace(candidate(name, note), error=errors.get(name))
        except ValueError:  # a kernel of a plug-in that is not installed here
            continue


def _unknown(site: Site, chosen: Sequence[Candidate]) -> str | None:
    """A chosen kernel that has no record here; None if it has one."""
    if site.chosen is None or any(each.name == site.chosen for each in chosen):
        return None
    return f"its kernel {site.chosen} is not known here; install the package that has it, or give its record"


def _milliseconds(value: float | None) -> str:
    return "not timed" if value is None else f"{value:.3g} ms"


def _other_packages(site: Site, machines: Sequence[Machine], here: Machine) -> str | None:
    """A package that the chosen kernel requires and whose version here is not the measured one; None if there is none."""
    there = next(each for each in machines if each.device == here.device)
    chosen = measured_candidates(site, "")
    for package in chosen[0].on(there).requires if chosen else ():
        if there.packages.get(package) != here.packages.get(package):
            was, now = there.packages.get(package), here.packages.get(package, "not installed")
            return f"{chosen[0].name} was measured with {package} {was}, here it is {now}"
    return None


AUTO = Auto()
