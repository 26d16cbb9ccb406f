"""What chooses kernels by the call: "auto" by a table, a plan by what was measured before. ("tune": measuring/first_use.py.)"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..graphs.inner_compilers import Inner
from ..graphs.sizes import UnbackedSizeError
from ..kernels.calls import AttentionCall
from ..kernels.machines import Machine
from ..kernels.records import Numerics
from ..kernels.sources import Hub
from .matching import find, foreign
from .plans import Plan
from .policies import Candidate
from .preferences import ROWS, Row
from .registry import names, records_of
from .sites import Site


def candidate(name: str, note: str | None = None, stale: str | None = None) -> Candidate:
    return Candidate(name, records_of(name), note, stale)


def usual_candidates() -> tuple[Candidate, ...]:
    """Every kernel but those of the hub, which would be downloaded."""
    found = [Candidate(name, records_of(name)) for name in names()]
    return tuple(each for each in found if not any(isinstance(record.source, Hub) for record in each.records))


@dataclass(frozen=True)
class Auto:
    """`with_backend("auto")`: the first row of the table (preferences.py) that is about the call, then `native`."""

    name: str = "auto"
    rows: tuple[Row, ...] = ROWS

    def select(
        self, call: AttentionCall, machine: Machine, limit: Numerics, measure: bool = False, stale: str | None = None
    ) -> tuple[Candidate, ...]:
        found: list[Candidate] = []
        try:
            for row in self.rows if call.obstacle is None else ():
                preferred = [candidate(name, f"auto: {row.evidence}", stale) for name in row.names]
                # A question about sizes that could change nothing would only cost a recompilation.
                able = any(machine.has(each.on(machine).requires) for each in preferred)
                if able and row.fits(call, machine, limit):
                    found = [each for each in preferred if each.on(machine).numerics <= limit]
                    if row.numerics <= Numerics.REORDERED:
                        break
                    found += self._below(row.numerics, call, machine, stale)
                    break
        except UnbackedSizeError:  # of sizes that only the data decides nothing is known
            found = []
        return (*found, candidate("native", "auto: no evidence for another" if not found else None, stale))

    def _below(self, numerics: Numerics, call: AttentionCall, machine: Machine, stale: str | None) -> list[Candidate]:
        """What is preferred where a quantised kernel refuses."""
        chosen = self.select(call, machine, Numerics(numerics - 1), stale=stale)
        return [each for each in chosen if each.name != "native"]

    def compiled_by(self, inner: Inner) -> Auto:
        return self

    def libraries(self, machine: Machine) -> tuple[Candidate, ...]:
        return tuple(candidate(name) for name in dict.fromkeys(name for row in self.rows for name in row.names))


@dataclass(frozen=True)
class Planned:
    """`with_backend(plan)`: what was the fastest where the call was measured; "auto" where it was not."""

    plan: Plan
    name: str = "plan"

    def __post_init__(self) -> None:
        if self.plan.tuning is None:
            raise ValueError("this plan was not measured: make one with attnrewrite.tune(model, ...)")

    def select(self, call: AttentionCall, machine: Machine, limit: Numerics, measure: bool) -> tuple[Candidate, ...]:
        tuning = self.plan.tuning
        assert tuning is not None
        if call.obstacle is not None:
            return (candidate("native"),)
        if (stale := foreign(tuning.machines, machine)) is None:
            try:
                site = find(self.plan.sites, call)
            except UnbackedSizeError:
                site = None
            stale = "it has no such call" if site is None else _other_packages(site, tuning.machines, machine)
            if site is not None and stale is None:
                return (*measured_candidates(site, "plan"), *AUTO.select(call, machine, limit))
        return AUTO.select(call, machine, limit, stale=f"the plan of {tuning.model}: {stale}")

    def compiled_by(self, inner: Inner) -> Planned:
        return self

    def libraries(self, machine: Machine) -> tuple[Candidate, ...]:
        chosen = {each.name: each for site in self.plan.sites for each in measured_candidates(site, "plan")[:1]}
        return (*chosen.values(), *AUTO.libraries(machine))

    def __str__(self) -> str:
        return self.name


def measured_candidates(site: Site, by: str) -> tuple[Candidate, ...]:
    """The choice, then the others that were timed, the fastest first; of names that are known here."""
    timed = {each.name: each for each in site.measured if each.milliseconds is not None and each.dropped is None}
    order = sorted(timed, key=lambda name: (name != site.chosen, timed[name].least))
    if site.chosen is not None and site.chosen not in timed:
        order.insert(0, site.chosen)
    return tuple(_known(order, site, by))


def _known(order: list[str], site: Site, by: str) -> Iterator[Candidate]:
    native = next((each.milliseconds for each in site.measured if each.name == "native"), None)
    timed = {each.name: each.milliseconds for each in site.measured}
    for name in order:
        note = f"{by}: {_milliseconds(timed.get(name))}"
        note += "" if name == "native" else f", native {_milliseconds(native)}"
        if name == site.chosen and site.backend is not None:  # a record that no name leads to
            yield Candidate(name, (site.backend,), note)
            continue
        try:
            yield candidate(name, note)
        except ValueError:  # a plug-in's, which is not installed here
            continue


def _milliseconds(value: float | None) -> str:
    return "not timed" if value is None else f"{value:.3g} ms"


def _other_packages(site: Site, machines: Sequence[Machine], here: Machine) -> str | None:
    """What the chosen kernel needs, in another version than it was measured in."""
    there = next(each for each in machines if each.device == here.device)
    chosen = measured_candidates(site, "")
    for package in chosen[0].on(there).requires if chosen else ():
        if there.packages.get(package) != here.packages.get(package):
            was, now = there.packages.get(package), here.packages.get(package, "not installed")
            return f"{chosen[0].name} was measured with {package} {was}, here it is {now}"
    return None


AUTO = Auto()
