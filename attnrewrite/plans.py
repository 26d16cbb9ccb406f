"""`Plan`: for every site the call, each decision that was taken, and the choice; of a tuned model also what was measured."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from . import decisions
from .calls import AttentionCall
from .decisions import Accepted, Decision, Refused, Step
from .files import write_whole
from .machines import Machine
from .measurements import Measurement
from .policies import Policy, Selector
from .reasons import decide
from .records import Backend
from .sizes import asking
from .sources import Source, SourceError, library, load


class AttentionRefusedError(RuntimeError):
    """Under `strict=True`: no choice may take a site. The message has the site and every reason."""


@dataclass(frozen=True)
class Site:
    """One attention. `chosen` is a kernel's name, or None where the call stays as it was; `decisions` are those taken,
    in order, up to the first that was accepted. `source` is the library that was loaded for it, with its version or commit.
    `note` is by what "auto", "tune" or a plan chose; `stale` why a plan could not. Of a tuned site `decisions` are those of all
    candidates, that of the chosen one last, and `measured` what was found out about those that were accepted."""

    call: AttentionCall
    decisions: tuple[tuple[str, Decision], ...]
    chosen: str | None
    rule: str | None = None  # the pattern of the rule that named the choices
    source: str | None = None
    backend: Backend | None = field(default=None, compare=False, repr=False)  # not kept in reports
    note: str | None = None
    stale: str | None = None
    measured: tuple[Measurement, ...] = ()

    @property
    def name(self) -> str:
        return self.call.site

    @property
    def refusals(self) -> tuple[tuple[str, Refused], ...]:
        return tuple((name, decision) for name, decision in self.decisions if isinstance(decision, Refused))

    @property
    def steps(self) -> tuple[Step, ...]:
        """What is done around the chosen kernel."""
        last = self.decisions[-1][1] if self.decisions else None
        return last.steps if isinstance(last, Accepted) else ()

    @property
    def form(self) -> str:
        """As what the chosen kernel takes the mask, one of `reasons.forms`."""
        last = self.decisions[-1][1] if self.decisions else None
        return last.form if isinstance(last, Accepted) else "given"

    def described(self) -> Site:
        taken = tuple((name, decision.described()) for name, decision in self.decisions)
        return replace(self, call=self.call.described(), decisions=taken, backend=None)

    def to_json(self) -> dict[str, Any]:
        return {
            "call": self.call.to_json(),
            "decisions": [[name, decisions.to_json(decision)] for name, decision in self.decisions],
            "chosen": self.chosen,
            "rule": self.rule,
            "source": self.source,
            "note": self.note,
            "stale": self.stale,
            "measured": [asdict(each) for each in self.measured],
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Site:
        taken = tuple((name, decisions.from_json(decision)) for name, decision in data["decisions"])
        measured = tuple(Measurement(**each) for each in data.get("measured", ()))
        return Site(
            AttentionCall.from_json(data["call"]), taken, data["chosen"], data["rule"], data.get("source"),
            note=data.get("note"), stale=data.get("stale"), measured=measured,
        )  # fmt: skip


VERSION = 1  # of a plan's file


@dataclass(frozen=True)
class Tuning:
    """Where, with what and how a plan was measured. machines: one for each kind of device that the model has sites on.
    complete: False where Ctrl-C ended it. seconds: what it took."""

    model: str
    machines: tuple[Machine, ...]
    attnrewrite: str
    numerics: str = "reordered"
    max_error: float | None = None
    min_gain: float = 0.02
    complete: bool = True
    seconds: float = 0.0


@dataclass(frozen=True)
class Plan:
    """`tuning`: of a plan that `attnrewrite.tune` measured; None where it was only decided. `str()` is a table to read."""

    sites: tuple[Site, ...] = ()
    tuning: Tuning | None = None

    @property
    def swapped(self) -> int:
        return sum(site.chosen is not None for site in self.sites)

    def described(self) -> Plan:
        return replace(self, sites=tuple(site.described() for site in self.sites))

    def selector(self) -> Selector:
        """What `with_backend(plan)` asks. Raises `ValueError` for a plan that was not measured."""
        from .selecting import Planned  # it reads plans

        return Planned(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON, whole or not at all. Raises `OSError`."""
        write_whole(Path(path), self.to_json() + "\n")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Raises `OSError`, and `ValueError` for a file that holds no plan of a version that is known here."""
        text = Path(path).read_text(encoding="utf-8", errors="replace")
        try:
            return Plan.from_json(text)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error

    def to_json(self) -> str:
        """Sites that differ in their names alone stand there once, under "names"."""
        groups: dict[str, dict[str, Any]] = {}
        for site in self.described().sites:
            data = site.to_json()
            name = data["call"].pop("site")
            groups.setdefault(json.dumps(data), {"names": [], **data})["names"].append(name)
        tuning = None
        if self.tuning is not None:
            tuning = {**vars(self.tuning), "machines": [each.to_json() for each in self.tuning.machines]}
        return json.dumps({"attnrewrite plan": VERSION, "tuning": tuning, "sites": list(groups.values())}, indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Raises `ValueError` if the text is no plan of a version that is known here. Sites come out grouped."""
        try:
            data = json.loads(text)
            if data["attnrewrite plan"] != VERSION:
                raise ValueError(f"its version is {data['attnrewrite plan']!r}, {VERSION} is known here")
            tuning = data["tuning"]
            if tuning is not None:
                machines = tuple(Machine.from_json(each) for each in tuning["machines"])
                tuning = Tuning(**{**tuning, "machines": machines})
            sites = []
            for group in data["sites"]:
                names = group.pop("names")
                sites += [Site.from_json({**group, "call": {**group["call"], "site": name}}) for name in names]
            return Plan(tuple(sites), tuning)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            said = str(error) if str(error).startswith("its version") else f"{type(error).__name__}: {error}"
            raise ValueError(f"this is no plan of attnrewrite ({said}): write one with plan.save(path)") from error

    def __str__(self) -> str:
        from .plan_table import table  # for people alone

        return table(self)


def make_plan(
    calls: Sequence[AttentionCall],
    policy: Policy,
    machines: Sequence[Machine],
    load_sources: bool = False,
    name_sources: bool = False,
) -> Plan:
    """Decides for each call, with the machine it runs on. Pure but for the guards that `holds` records, unless
    `load_sources`: then the library behind a choice is loaded, and one that cannot be is refused.

    `name_sources`: the machine is elsewhere, and its packages say which library will be there; nothing is loaded.

    Raises `AttentionRefusedError` if the policy is strict and a site has no taker.
    """
    loaded: dict[Source, str | Refused] = {}
    sites = tuple(
        _site(call, policy, machine, loaded if load_sources else None, name_sources)
        for call, machine in zip(calls, machines, strict=True)
    )
    if policy.strict:
        refused = [site for site in sites if site.chosen is None]
        if refused:
            lines = [f"  {site.name}: {name}: {decision}" for site in refused for name, decision in site.refusals]
            raise AttentionRefusedError(
                f"strict=True, and {len(refused)} of {len(sites)} attention sites have no kernel that may take them:\n"
                + "\n".join(lines)
            )
    return Plan(sites)


def _site(
    call: AttentionCall,
    policy: Policy,
    machine: Machine,
    loaded: dict[Source, str | Refused] | None,
    name_sources: bool,
) -> Site:
    taken: list[tuple[str, Decision]] = []
    for candidate in policy.candidates(call, machine, measure=loaded is not None):
        backend = candidate.on(machine)
        with asking(call.site, candidate.name):
            decision = decide(backend, call, machine, policy.numerics, policy.cast)
        source: str | None = None
        if isinstance(decision, Accepted) and backend.source is not None and name_sources:
            source = backend.source.on(machine.packages)
        elif isinstance(decision, Accepted) and backend.source is not None and loaded is not None:
            found = _loaded(backend.source, policy.trust_remote_code, loaded)
            refused = found if isinstance(found, Refused) else lacking(backend, found, machine)
            if refused is not None:
                decision = refused
            else:
                source = str(found)
        taken.append((candidate.name, decision))
        if isinstance(decision, Accepted):
            rule = policy.rule_for(call)
            return Site(
                call, tuple(taken), candidate.name, rule, source, backend, candidate.note, candidate.stale
            )  # fmt: skip
    return Site(call, tuple(taken), None, policy.rule_for(call))


def lacking(backend: Backend, source: str, machine: Machine) -> Refused | None:
    """Why the loaded library has no such kernel for this machine, None if it has."""
    return backend.library_check(library(source), machine) if backend.library_check else None


def _loaded(source: Source, trust: bool, loaded: dict[Source, str | Refused]) -> str | Refused:
    """The text of a loaded library, or why it does not load: tried once a plan."""
    if source not in loaded:
        try:
            loaded[source] = load(source, trust)
        except SourceError as error:
            loaded[source] = error.refused
    return loaded[source]
