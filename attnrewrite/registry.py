"""Names of kernels to their records."""

from __future__ import annotations

import difflib

from .backends import RECORDS
from .records import Backend


def names() -> tuple[str, ...]:
    """Every kernel's name, in the order of the list in `attnrewrite.backends`."""
    return tuple(dict.fromkeys(record.name for record in RECORDS))


def records_of(name: str) -> tuple[Backend, ...]:
    """The records of a name, one for each group of devices it has limits for. Raises `ValueError` for an unknown name."""
    found = tuple(record for record in RECORDS if record.name == name)
    if not found:
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(names())}"
        raise ValueError(f"no attention backend is called {name!r}; {hint} (`python -m attnrewrite info` lists them)")
    return found
