"""`Policy`: which kernels to try at which site, in which order, and how far a result may differ."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from ..graphs.inner_compilers import Inner
from ..kernels.calls import AttentionCall
from ..kernels.machines import Machine
from ..kernels.records import Backend, Numerics


@dataclass(frozen=True)
class Candidate:
    """One choice: a name with its records (one for each group of devices or versions). Where a selector has chosen it, `note`
    says by what; `stale` why a plan does not say what is best here, so that something else has."""

    name: str
    records: tuple[Backend, ...]
    note: str | None = None
    stale: str | None = None

    def on(self, machine: Machine) -> Backend:
        """The record for a machine: the first that is for its device and whose packages it has; if there is none, the
        first for its device, or the first at all, whose refusal says what is missing."""
        here = [record for record in self.records if machine.device in record.devices]
        there = [record for record in here if machine.has(record.requires)]
        return (there or here or list(self.records))[0]


class Selector(Protocol):
    """A choice that names other kernels for each call: "auto", a plan (selectors.py), "tune" (measuring/first_use.py). It is
    compared and hashed."""

    @property
    def name(self) -> str: ...

    def select(self, call: AttentionCall, machine: Machine, limit: Numerics, measure: bool) -> tuple[Candidate, ...]:
        """In order of preference. Asks about sizes through `holds`, as little as it can. measure: kernels may be run."""
        ...

    def libraries(self, machine: Machine) -> tuple[Candidate, ...] | None:
        """All that it may name there; None where that is not known beforehand."""
        ...

    def compiled_by(self, inner: Inner) -> Selector:
        """The same for graphs that this compiler gets: one that measures measures under it."""
        ...


Chosen = Candidate | Selector


@dataclass(frozen=True)
class Policy:
    """`choices` in order of preference; `rules` as pairs of a pattern and its own choices, of which the first match holds.

    A pattern is "self", "cross", "masked", "unmasked" or a glob over site names. `cast` is the dtype that a call may be cast
    to for a kernel that does not take its own; `trust_remote_code` loads hub kernels of publishers that the hub does not vouch
    for; `checks` puts checks of values around each swapped call (passes/check_values.py).
    """

    choices: tuple[Chosen, ...]
    rules: tuple[tuple[str, tuple[Chosen, ...]], ...] = ()
    strict: bool = False
    numerics: Numerics = Numerics.REORDERED
    cast: str | None = None
    trust_remote_code: bool = False
    checks: bool = False

    def compiled_by(self, inner: Inner) -> Policy:
        """The same for graphs that this compiler gets."""

        def chosen(choices: tuple[Chosen, ...]) -> tuple[Chosen, ...]:
            return tuple(each if isinstance(each, Candidate) else each.compiled_by(inner) for each in choices)

        rules = tuple((pattern, chosen(choices)) for pattern, choices in self.rules)
        return replace(self, choices=chosen(self.choices), rules=rules)

    def rule_for(self, call: AttentionCall) -> str | None:
        """The pattern whose rule holds for a call, None where the general choices do."""
        return next((pattern for pattern, _ in self.rules if matches(pattern, call)), None)

    def candidates(self, call: AttentionCall, machine: Machine, measure: bool = False) -> Iterator[Candidate]:
        """For one call, in order, each name once. `measure`: a selector may run kernels to find out."""
        pattern = self.rule_for(call)
        seen: set[str] = set()
        for chosen in self.choices if pattern is None else dict(self.rules)[pattern]:
            if isinstance(chosen, Candidate):
                named: tuple[Candidate, ...] = (chosen,)
            else:
                named = chosen.select(call, machine, self.numerics, measure)
            for candidate in named:
                if candidate.name not in seen:
                    seen.add(candidate.name)
                    yield candidate

    def __str__(self) -> str:
        text = _names(self.choices)
        return text + "".join(f"; {pattern}: {_names(choices)}" for pattern, choices in self.rules)


def matches(pattern: str, call: AttentionCall) -> bool:
    if pattern in ("self", "cross"):
        return call.role == pattern
    if pattern in ("masked", "unmasked"):
        return call.mask.is_tensor == (pattern == "masked")
    return fnmatch.fnmatchcase(call.site, pattern)


def _names(choices: tuple[Chosen, ...]) -> str:
    return ", ".join(candidate.name for candidate in choices)
