"""`Plan`: for every site of a graph the call, each decision that was taken, and the choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from . import decisions
from .calls import AttentionCall
from .decisions import Accepted, Decision, Refused, decide
from .machines import Machine
from .policies import Policy
from .records import Backend


class AttentionRefusedError(RuntimeError):
    """Under `strict=True`: no choice may take a site. The message has the site and every reason."""


@dataclass(frozen=True)
class Site:
    """One attention. `chosen` is a kernel's name, or None where the call stays as it was; `decisions` are those taken,
    in order, up to the first that was accepted."""

    call: AttentionCall
    decisions: tuple[tuple[str, Decision], ...]
    chosen: str | None
    rule: str | None = None  # the pattern of the rule that named the choices
    backend: Backend | None = field(default=None, compare=False, repr=False)  # not kept in reports

    @property
    def name(self) -> str:
        return self.call.site

    @property
    def refusals(self) -> tuple[tuple[str, Refused], ...]:
        return tuple((name, decision) for name, decision in self.decisions if isinstance(decision, Refused))

    def described(self) -> Site:
        return replace(self, call=self.call.described(), backend=None)

    def to_json(self) -> dict[str, Any]:
        return {
            "call": self.call.to_json(),
            "decisions": [[name, decisions.to_json(decision)] for name, decision in self.decisions],
            "chosen": self.chosen,
            "rule": self.rule,
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Site:
        taken = tuple((name, decisions.from_json(decision)) for name, decision in data["decisions"])
        return Site(AttentionCall.from_json(data["call"]), taken, data["chosen"], data["rule"])


@dataclass(frozen=True)
class Plan:
    sites: tuple[Site, ...] = ()

    @property
    def swapped(self) -> int:
        return sum(site.chosen is not None for site in self.sites)

    def described(self) -> Plan:
        return Plan(tuple(site.described() for site in self.sites))


def make_plan(calls: Sequence[AttentionCall], policy: Policy, machines: Sequence[Machine]) -> Plan:
    """Decides for each call, with the machine it runs on. Pure but for the guards that `holds` records.

    Raises `AttentionRefusedError` if the policy is strict and a site has no taker.
    """
    sites = tuple(_site(call, policy, machine) for call, machine in zip(calls, machines, strict=True))
    if policy.strict:
        refused = [site for site in sites if site.chosen is None]
        if refused:
            lines = [f"  {site.name}: {name}: {decision}" for site in refused for name, decision in site.refusals]
            raise AttentionRefusedError(
                f"strict=True, and {len(refused)} of {len(sites)} attention sites have no kernel that may take them:\n"
                + "\n".join(lines)
            )
    return Plan(sites)


def _site(call: AttentionCall, policy: Policy, machine: Machine) -> Site:
    taken: list[tuple[str, Decision]] = []
    for candidate in policy.candidates(call):
        backend = candidate.on(machine.device)
        decision = decide(backend, call, machine, policy.numerics)
        taken.append((candidate.name, decision))
        if isinstance(decision, Accepted):
            return Site(call, tuple(taken), candidate.name, policy.rule_for(call), backend)
    return Site(call, tuple(taken), None, policy.rule_for(call))
