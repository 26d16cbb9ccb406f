"""Reads the choices, rules and settings of users into a `Policy`."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypedDict

from ..kernels.flags import are_flags
from ..kernels.records import Backend, Numerics
from ..measuring.first_use import Tune
from ..planning.plans import Plan
from ..planning.policies import Candidate, Chosen, Policy, Selector
from ..planning.registry import separate
from ..planning.selectors import AUTO, Planned, candidate

if TYPE_CHECKING:
    from typing_extensions import Unpack

CASTS = ("bfloat16", "float16")
CHECKS = "ATTNREWRITE_CHECKS"  # environment variable: 1, yes or true turns `checks` on

Choice = str | Backend | Plan
Choices = Choice | Iterable[Choice]
Rules = Mapping[str, Choices]
SELECTORS: dict[str, Selector] = {"auto": AUTO, "tune": Tune()}


class Settings(TypedDict, total=False):
    """The keyword arguments of every function that takes choices and rules; `with_backend` documents each of them. An absent
    setting is one that the user did not give, whereas `cast=None` turns casting off."""

    strict: bool
    numerics: str | Numerics
    cast: str | None
    trust_remote_code: bool


class CompileSettings(Settings, total=False):
    """`Settings` and `checks`, for functions that use torch.compile."""

    checks: bool | None


SETTINGS = tuple(CompileSettings.__annotations__)
FLAGS = ("strict", "trust_remote_code", "checks")


def make_policy(choices: Iterable[Choice], rules: Rules | None = None, **settings: Unpack[CompileSettings]) -> Policy:
    """Makes a `Policy` from choices, rules and settings, which `with_backend` documents.

        policy = attnrewrite.make_policy(["flex", "native"], {"cross": "native"}, cast="bfloat16")

    Raises `ValueError` for an unknown name, no choice at all, a name given twice, and an unknown `numerics` or `cast`;
    `TypeError` for a choice that is neither name, record nor plan, an unknown setting, and a flag that is not a bool. The
    message names the argument and the value.
    """
    if rules is not None and not (isinstance(rules, Mapping) and all(isinstance(pattern, str) for pattern in rules)):
        raise TypeError(f"rules is {rules!r}: give a mapping of patterns to choices, as {{'cross': 'native'}}")
    pairs = tuple((pattern, _chosen(chosen, f"rules[{pattern!r}]")) for pattern, chosen in (rules or {}).items())
    return Policy(_chosen(choices, "choices"), pairs, **read_settings(settings))


def read_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Turns the values of settings into those of a `Policy`. Raises `TypeError` and `ValueError` as `make_policy`."""
    read = {name: value for name, value in given.items() if (name, value) != ("checks", None)}
    for name, value in read.items():
        if name not in SETTINGS:
            near = difflib.get_close_matches(name, SETTINGS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(SETTINGS)}"
            raise TypeError(f"there is no argument {name!r}; {hint}")
        if name in FLAGS:
            are_flags(**{name: value})
    if "numerics" in read:
        read["numerics"] = numerics_of(read["numerics"])
    if (cast := read.get("cast")) not in (None, *CASTS):
        raise ValueError(f"cast is {cast!r}: it is one of {', '.join(map(repr, CASTS))}, or None for no cast at all")
    return read


def checks_of_environment() -> bool:
    """The value of `checks` where the user gives none: ATTNREWRITE_CHECKS of the environment now, False without it."""
    return os.environ.get(CHECKS, "").lower() in ("1", "true", "yes")


def several(choices: Choices) -> tuple[Choice, ...]:
    """One choice or several, as a tuple."""
    return tuple(choices) if isinstance(choices, Iterable) and not isinstance(choices, str) else (choices,)


def candidates_of(choices: Any, argument: str) -> tuple[Candidate, ...]:
    """Reads names and records as `make_policy`. Raises `ValueError` for a choice that chooses kernels itself."""
    found = []
    for chosen in _chosen(choices, argument):
        if not isinstance(chosen, Candidate):
            raise ValueError(f"{argument} names {chosen.name!r}, which chooses among kernels itself: name kernels")
        found.append(chosen)
    return tuple(found)


def _chosen(choices: Any, argument: str) -> tuple[Chosen, ...]:
    if not isinstance(choices, Choice | Iterable | os.PathLike):
        raise TypeError(f"{argument} is {choices!r} ({type(choices).__name__}): give names or Backend records")
    given: list[Any] = [choices] if isinstance(choices, Choice | os.PathLike) else list(choices)
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
        if len(apart := separate(choice)) > 1:
            names = ", ".join(map(repr, apart))
            raise ValueError(f"{argument} has {choice!r}, which is one text: give separate names, {names}")
        if choice.endswith(".json"):
            raise ValueError(f"{argument} has {choice!r}: {_PLAN}, attnrewrite.Plan.load({choice!r})")
        try:
            return SELECTORS[choice] if choice in SELECTORS else candidate(choice)
        except ValueError as error:
            text = str(error) if argument == "choices" else f"{argument}: {error}"
            near = difflib.get_close_matches(choice, SELECTORS, n=1, cutoff=0.6)
            raise ValueError(f"{text} Or {near[0]!r}?" if near else text) from None
    if isinstance(choice, os.PathLike):
        raise TypeError(f"{argument} holds {choice!r}: {_PLAN}, attnrewrite.Plan.load({os.fspath(choice)!r})")
    if isinstance(choice, list | tuple | set | frozenset):
        items = [each.name if isinstance(each, Backend) else each for each in choice]
        raise TypeError(f"{argument} holds a {type(choice).__name__}: give its items one by one, *{items!r}")
    raise TypeError(f"{argument} holds {choice!r} ({type(choice).__name__}): give names or Backend records")


_PLAN = "a plan is read from its file first"


def numerics_of(value: str | Numerics) -> Numerics:
    if isinstance(value, Numerics):
        return value
    known = {limit.word: limit for limit in Numerics}
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"numerics is {value!r}: it is one of {', '.join(map(repr, known))}")
    return known[value]
