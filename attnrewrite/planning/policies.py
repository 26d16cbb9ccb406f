"""`Policy`: which kernels to try at which site, in which order, and how far a result may differ."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from ..graphs.inner_compilers import Inner
from ..kernels.calls import AttentionCall
from ..kernels.machines import Machine
from ..kernels.records import Backend, Numerics


@dataclass(frozen=True)
class Candidate:
    """A kernel that may be chosen."""

    name: str
    records: tuple[Backend, ...]  # one for each group of devices or versions
    note: str | None = None  # the evidence by which a selector named the kernel
    stale: str | None = None  # why a plan does not cover the call, so that "auto" named the kernel
    error: float | None = None  # its relative error at the site, if a plan measured it
    keeps: str | None = None  # why the model's own call stays, though the kernel could take it

    def on(self, machine: Machine) -> Backend:
        """The record for a machine: the first for its device whose required packages it has. Otherwise the first for its
        device, or the first of all: the refusal of that record says what is missing."""
        here = [record for record in self.records if machine.device in record.devices]
        there = [record for record in here if machine.has(record.requires)]
        return (there or here or list(self.records))[0]


class Selector(Protocol):
    """A choice that names kernels call by call: "auto", a plan (selectors.py), "tune" (measuring/first_use.py). It needs
    `==` and `hash`."""

    @property
    def name(self) -> str: ...

    def select(self, call: AttentionCall, machine: Machine, limit: Numerics, measure: bool) -> tuple[Candidate, ...]:
        """Kernels for the call, in order of preference. Asks about sizes through `holds`, and as little as possible, because
        each answer is a guard. limit: the numerics of the policy. measure: kernels may be run to time them."""
        ...

    def libraries(self, machine: Machine) -> tuple[Candidate, ...] | None:
        """All kernels that it may name on the machine; None if they are not known beforehand."""
        ...

    def compiled_by(self, inner: Inner) -> Selector:
        """The selector for graphs that `inner` compiles: a selector that times kernels compiles them with `inner`."""
        ...


Chosen = Candidate | Selector


@dataclass(frozen=True)
class Policy:
    """The choices and limits of `with_backend`. The pattern of a rule is "self", "cross", "masked", "unmasked", or a glob over
    site names."""

    choices: tuple[Chosen, ...]  # in order of preference
    rules: tuple[tuple[str, tuple[Chosen, ...]], ...] = ()  # (pattern, choices); the first pattern that matches counts
    strict: bool = False  # raise if no choice may take a site
    numerics: Numerics = Numerics.REORDERED  # how far a result may differ from SDPA's
    cast: str | None = None  # the dtype that a call may be cast to if a kernel does not take the call's own dtype
    trust_remote_code: bool = False  # load hub kernels of publishers that the hub does not vouch for
    checks: bool = False  # check values around each swapped call (passes/check_values.py)

    def compiled_by(self, inner: Inner) -> Policy:
        """The policy for graphs that `inner` compiles."""

        def chosen(choices: tuple[Chosen, ...]) -> tuple[Chosen, ...]:
            return tuple(each if isinstance(each, Candidate) else each.compiled_by(inner) for each in choices)

        rules = tuple((pattern, chosen(choices)) for pattern, choices in self.rules)
        return replace(self, choices=chosen(self.choices), rules=rules)

    def rule_for(self, call: AttentionCall) -> str | None:
        """The pattern of the first rule that matches the call; None if none does and `choices` count."""
        return next((pattern for pattern, _ in self.rules if matches(pattern, call)), None)

    def candidates(self, call: AttentionCall, machine: Machine, measure: bool = False) -> Iterator[Candidate]:
        """Kernels for one call, in order of preference, each name once. measure: selectors may run kernels to time them."""
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


KINDS: dict[str, Callable[[AttentionCall], bool]] = {  # patterns of rules that are not globs
    "self": lambda call: call.role == "self",
    "cross": lambda call: call.role == "cross",
    "masked": lambda call: call.mask.is_tensor,
    "unmasked": lambda call: not call.mask.is_tensor,
}


def matches(pattern: str, call: AttentionCall) -> bool:
    return KINDS[pattern](call) if pattern in KINDS else fnmatch.fnmatchcase(call.site, pattern)


def _names(choices: tuple[Chosen, ...]) -> str:
    return ", ".join(candidate.name for candidate in choices)
