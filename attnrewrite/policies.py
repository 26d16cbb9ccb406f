"""`Policy`: which kernels to try at which site, in which order, and how far a result may differ."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from .calls import AttentionCall
from .machines import Machine
from .records import Backend, Numerics
from .registry import records_of

CASTS = ("bfloat16", "float16")


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
    """A choice that names other kernels for each call: "auto", "tune", a plan (selecting.py). It is compared and hashed."""

    @property
    def name(self) -> str: ...

    def select(self, call: AttentionCall, machine: Machine, limit: Numerics, measure: bool) -> tuple[Candidate, ...]:
        """In order of preference. Asks about sizes through `holds`, as little as it can. measure: kernels may be run."""
        ...

    def libraries(self, machine: Machine) -> tuple[Candidate, ...] | None:
        """All that it may name there; None where that is not known beforehand."""
        ...


class Chooser(Protocol):
    """What `with_backend` takes besides names and records: a plan."""

    def selector(self) -> Selector: ...


Choice = str | Backend | Chooser
Chosen = Candidate | Selector


@dataclass(frozen=True)
class Policy:
    """`choices` in order of preference; `rules` as pairs of a pattern and its own choices, of which the first match holds.

    A pattern is "self", "cross", "masked", "unmasked" or a glob over site names. `cast` is the dtype that a call may be cast
    to for a kernel that does not take its own; `trust_remote_code` loads hub kernels of publishers that the hub does not vouch
    for; `checks` puts checks of values around each swapped call (checking.py).
    """

    choices: tuple[Chosen, ...]
    rules: tuple[tuple[str, tuple[Chosen, ...]], ...] = ()
    strict: bool = False
    numerics: Numerics = Numerics.REORDERED
    cast: str | None = None
    trust_remote_code: bool = False
    checks: bool = False

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


def make_policy(
    choices: Iterable[Choice],
    rules: Mapping[str, Choice | Iterable[Choice]] | None = None,
    strict: bool = False,
    numerics: str | Numerics = "reordered",
    cast: str | None = None,
    trust_remote_code: bool = False,
    checks: bool = False,
) -> Policy:
    """Reads what a user writes. Raises `ValueError` (unknown name, nothing chosen, a name given twice, unknown numerics or
    cast) and `TypeError` (a choice that is neither name, record nor plan), naming the argument and the value."""
    if rules is not None and not (isinstance(rules, Mapping) and all(isinstance(pattern, str) for pattern in rules)):
        raise TypeError(f"rules is {rules!r}: give a mapping of patterns to choices, as {{'cross': 'native'}}")
    pairs = tuple((pattern, _chosen(chosen, f"rules[{pattern!r}]")) for pattern, chosen in (rules or {}).items())
    if cast not in (None, *CASTS):
        raise ValueError(f"cast is {cast!r}: it is one of {', '.join(map(repr, CASTS))}, or None for no cast at all")
    chosen = _chosen(choices, "choices")
    return Policy(chosen, pairs, bool(strict), numerics_of(numerics), cast, bool(trust_remote_code), bool(checks))


def candidates_of(choices: Any, argument: str) -> tuple[Candidate, ...]:
    """Names and records alone, as `make_policy` reads them."""
    found = []
    for chosen in _chosen(choices, argument):
        if not isinstance(chosen, Candidate):
            raise ValueError(f"{argument} names {chosen.name!r}, which chooses among kernels itself: name kernels")
        found.append(chosen)
    return tuple(found)


def _chosen(choices: Any, argument: str) -> tuple[Chosen, ...]:
    if not isinstance(choices, str | Backend | Iterable) and not hasattr(choices, "selector"):
        raise TypeError(f"{argument} is {choices!r} ({type(choices).__name__}): give names or Backend records")
    one = isinstance(choices, str | Backend) or hasattr(choices, "selector")
    given: list[Any] = [choices] if one else list(choices)
    if not given:
        raise ValueError(f"{argument} is empty: name at least one attention backend, as 'native'")
    found: list[Chosen] = []
    for choice in given:
        chosen = _one(choice, argument)
        if any(chosen.name == earlier.name for earlier in found):
            raise ValueError(f"{argument} names {chosen.name!r} twice: each is tried once, in the order given")
        found.append(chosen)
    return tuple(found)


def _one(choice: Any, argument: str) -> Chosen:
    if isinstance(choice, Backend):
        return Candidate(choice.name, (choice,))
    if hasattr(choice, "selector"):
        selector: Selector = choice.selector()
        return selector
    if isinstance(choice, str):
        from .selecting import SELECTORS  # it chooses among candidates

        try:
            return SELECTORS[choice] if choice in SELECTORS else Candidate(choice, records_of(choice))
        except ValueError as error:
            text = str(error) if argument == "choices" else f"{argument}: {error}"
            near = difflib.get_close_matches(choice, SELECTORS, n=1, cutoff=0.6)
            raise ValueError(f"{text} Or {near[0]!r}?" if near else text) from None
    raise TypeError(f"{argument} holds {choice!r} ({type(choice).__name__}): give names or Backend records")


def numerics_of(value: str | Numerics) -> Numerics:
    if isinstance(value, Numerics):
        return value
    known = {limit.name.lower(): limit for limit in Numerics}
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"numerics is {value!r}: it is one of {', '.join(map(repr, known))}")
    return known[value]


def _names(choices: tuple[Chosen, ...]) -> str:
    return ", ".join(candidate.name for candidate in choices)
