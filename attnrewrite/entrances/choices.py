"""What users write as choices, rules and settings, read into a `Policy`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from ..kernels.records import Backend, Numerics
from ..measuring.first_use import Tune
from ..planning.plans import Plan
from ..planning.policies import Candidate, Chosen, Policy, Selector
from ..planning.registry import records_of
from ..planning.selectors import AUTO, Planned

CASTS = ("bfloat16", "float16")


Choice = str | Backend | Plan
SELECTORS: dict[str, Selector] = {"auto": AUTO, "tune": Tune()}


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
    if not isinstance(choices, Choice | Iterable):
        raise TypeError(f"{argument} is {choices!r} ({type(choices).__name__}): give names or Backend records")
    given: list[Any] = [choices] if isinstance(choices, Choice) else list(choices)
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
    if isinstance(choice, Plan):
        return Planned(choice)
    if isinstance(choice, str):
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
