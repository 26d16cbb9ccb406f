"""Finds the records of a kernel by its name: records of this package and of plug-ins.

A plug-in is a package with an entry point of the group `attnrewrite.backends` that names a `Backend` or a sequence of
`Backend` objects:

    [project.entry-points."attnrewrite.backends"]
    mine = "my_package.attention:RECORDS"
"""

from __future__ import annotations

import copyreg
import difflib
import functools
import math
import re
import warnings
from dataclasses import replace
from importlib import metadata
from typing import Any

from ..backends import RECORDS
from ..kernels.records import Backend, Option
from ..kernels.sources import PLUG_INS, Hub

GROUP = "attnrewrite.backends"


@functools.cache
def records() -> tuple[Backend, ...]:
    """All records. Plug-ins are imported at the first call; a plug-in that fails is left out with a warning."""
    found = list(RECORDS)
    for entry in sorted(metadata.entry_points(group=GROUP), key=lambda entry: entry.name):
        try:
            found += _brought(entry.load(), {record.name for record in found})
        except Exception as error:
            warnings.warn(
                f"the attention backends of the plug-in {entry.name!r} ({entry.value}) are left out: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )
    return tuple(found)


PLUG_INS.append(records)


def _brought(given: object, taken: set[str]) -> tuple[Backend, ...]:
    brought = (given,) if isinstance(given, Backend) else tuple(given)  # type: ignore[arg-type]
    for record in brought:
        if not isinstance(record, Backend):
            raise TypeError(f"{record!r} is no attnrewrite.Backend")
        if record.name in taken:
            raise ValueError(f"the name {record.name!r} is taken by attnrewrite or another plug-in: choose another")
    return brought


def names() -> tuple[str, ...]:
    """Every kernel's name, in the order of the list in `attnrewrite.backends`, plug-ins last."""
    return tuple(dict.fromkeys(record.name for record in records()))


def records_of(name: str) -> tuple[Backend, ...]:
    """The records of a kernel, one for each group of devices or versions with limits of its own.

    "sol[tau=2.0]" sets options of a kernel (`Backend.options`): its records then have the canonical name, with the options in
    the order of the alphabet. "_flash_3_hub@<revision>" pins a kernel of the hub to a branch, tag or commit; options stand
    before the "@". Raises `ValueError` for an unknown name, an option that the kernel does not have, a value that it does not
    take, an empty revision, and a revision of a kernel that is not from the hub.
    """
    plain, _, revision = name.partition("@")
    base, bracket, options = plain.partition("[")
    found = tuple(record for record in records() if record.name == base)
    if not found:
        near = difflib.get_close_matches(base, names(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(names())}"
        raise ValueError(f"no attention backend is called {name!r}; {hint} (`python -m attnrewrite info` lists them)")
    if bracket:
        given = _given(name, found[0], options)
        found = tuple(_with_options(record, given) for record in found)
    return tuple(_pinned(record, name, revision) for record in found) if "@" in name else found


def canonical(name: str) -> str:
    """The one spelling of a kernel's name: "sol[ tau = 2]" becomes "sol[tau=2.0]". Raises `ValueError` as `records_of`."""
    _, at, revision = name.partition("@")
    return f"{records_of(name)[0].name}{at}{revision}"


def separate(text: str) -> list[str]:
    """The names in a text that separates them by commas, where a comma inside of "[...]" separates options."""
    return [name.strip() for name in re.split(r",(?![^\[\]]*\])", text) if name.strip()]


Given = tuple[tuple[str, int | float], ...]  # options and their values, in the order of the alphabet


def _given(name: str, record: Backend, text: str) -> Given:
    """Reads "tau=2.0,sinks=128]". Raises `ValueError`, with the whole name in the message."""
    if not record.options:
        raise ValueError(f"{name!r} gives options to {record.name}, which has none: leave out the '[...]'")
    known = "; ".join(f"{key}={option}" for key, option in record.options.items())
    found: dict[str, int | float] = {}
    for pair in text.removesuffix("]").split(","):
        key, sign, value = (part.strip() for part in pair.partition("="))
        if not text.endswith("]") or not sign:
            raise ValueError(
                f"{name!r} has no options that can be read: write {record.name}[option=number,...]; {known}"
            )
        if key not in record.options:
            raise ValueError(f"{name!r}: {record.name} has no option {key!r}; its options: {known}")
        if key in found:
            raise ValueError(f"{name!r} gives {key} twice: leave one of them out")
        found[key] = _number(name, key, value, record.options[key])
    return tuple(sorted(found.items()))


def _number(name: str, key: str, text: str, option: Option) -> int | float:
    kind = type(option.minimum)
    try:
        number: int | float = kind(text)
    except ValueError:
        number = math.nan
    if not option.minimum <= number <= option.maximum:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name!r}: {key} is {text!r}: give {what} from {option.minimum!r} to {option.maximum!r}")
    return number + 0  # -0.0 is 0.0, under one name


@functools.cache
def _with_options(record: Backend, given: Given) -> Backend:
    """The same object for the same options: a `functools.partial` equals itself alone, and policies are compared."""
    name = f"{record.name}[{','.join(f'{key}={value!r}' for key, value in given)}]"
    record = record.configured(record, dict(given)) if record.configured is not None else record
    assert record.op is not None
    return replace(record, name=name, op=functools.partial(record.op, **dict(given)))


def _pinned(record: Backend, name: str, revision: str) -> Backend:
    if not isinstance(record.source, Hub):
        raise ValueError(f"{name!r} pins a revision, and {record.name} is not from the kernels hub: leave out the '@'")
    if not revision:
        raise ValueError(f"{name!r} pins no revision: write a branch, tag or commit behind the '@', or leave it out")
    return replace(record, source=replace(record.source, revision=revision))


def _by_name(record: Backend) -> Any:
    """Pickles and copies a registered record by its name, since its functions may be closures. Any other record is pickled
    by its fields."""
    try:
        same = records_of(record.name)
    except ValueError:
        same = ()
    for place, known in enumerate(same):
        if record == known:
            return _registered, (record.name, place)
        revision = record.source.revision if isinstance(record.source, Hub) else None
        if revision and isinstance(known.source, Hub) and record == _pinned(known, record.name, revision):
            return _registered, (f"{record.name}@{revision}", place)
    return object.__reduce_ex__(record, 2)


def _registered(name: str, place: int) -> Backend:
    return records_of(name)[place]


copyreg.pickle(Backend, _by_name)
