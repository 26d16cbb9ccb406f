"""`Plan`: for every site of a graph the call, each decision that was taken, and the choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from . import decisions
from .calls import AttentionCall
from .decisions import Accepted, Decision, Refused, Step
from .machines import Machine
from .policies import Policy
from .reasons import decide
from .records import Backend
from .sizes import asking
from .sources import Source, SourceError, library, load


class AttentionRefusedError(RuntimeError):
    """Under `strict=True`: no choice may take a site. The message has the site and every reason."""


@dataclass(frozen=True)
class Site:
    """One attention. `chosen` is a kernel's name, or None where the call stays as it was; `decisions` are those taken,
    in order, up to the first that was accepted. `source` is the library that was loaded for it, with its version or commit."""

    call: AttentionCall
    decisions: tuple[tuple[str, Decision], ...]
    chosen: str | None
    rule: str | None = None  # the pattern of the rule that named the choices
    source: str | None = None
    backend: Backend | None = field(default=None, compare=False, repr=False)  # not kept in reports

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
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Site:
        taken = tuple((name, decisions.from_json(decision)) for name, decision in data["decisions"])
        return Site(AttentionCall.from_json(data["call"]), taken, data["chosen"], data["rule"], data.get("source"))


@dataclass(frozen=True)
class Plan:
    sites: tuple[Site, ...] = ()

    @property
    def swapped(self) -> int:
        return sum(site.chosen is not None for site in self.sites)

    def described(self) -> Plan:
        return Plan(tuple(site.described() for site in self.sites))


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
    for candidate in policy.candidates(call):
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
            return Site(call, tuple(taken), candidate.name, policy.rule_for(call), source, backend)
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
