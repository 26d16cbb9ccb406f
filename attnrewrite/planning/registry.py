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
import warnings
from dataclasses import replace
from importlib import metadata
from typing import Any

from ..backends import RECORDS
from ..kernels.records import Backend
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

    "_flash_3_hub@<revision>" pins a kernel of the hub to a branch, tag or commit. Raises `ValueError` for an unknown name,
    an empty revision, and a revision of a kernel that is not from the hub.
    """
    plain, _, revision = name.partition("@")
    found = tuple(record for record in records() if record.name == plain)
    if not found:
        near = difflib.get_close_matches(plain, names(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(names())}"
        raise ValueError(f"no attention backend is called {name!r}; {hint} (`python -m attnrewrite info` lists them)")
    return tuple(_pinned(record, name, revision) for record in found) if "@" in name else found


def _pinned(record: Backend, name: str, revision: str) -> Backend:
    if not isinstance(record.source, Hub):
        raise ValueError(f"{name!r} pins a revision, and {record.name} is not from the kernels hub: leave out the '@'")
    if not revision:
        raise ValueError(f"{name!r} pins no revision: write a branch, tag or commit behind the '@', or leave it out")
    return replace(record, source=replace(record.source, revision=revision))


def _by_name(record: Backend) -> Any:
    """Pickles and copies a registered record by its name, since its functions may be closures. Any other record is pickled
    by its fields."""
    same = [each for each in records() if each.name == record.name]
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
