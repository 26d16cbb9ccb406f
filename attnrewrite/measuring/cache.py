"""Results of `with_backend("tune")` on disk: one file a call, keyed by call, machine, versions, compiler, numerics, candidates.

A file is replaced in one step, so processes may tune at the same time: the last result stays. A file that cannot be read, or
that has another key, is ignored with a warning, and its call is measured again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from ..files import write_whole
from ..graphs.inner_compilers import inner_name
from ..kernels.calls import AttentionCall
from ..kernels.machines import Machine
from ..planning.sites import Site
from ..version import __version__
from .search import Search

FOLDER = "ATTNREWRITE_CACHE"  # environment variable: the folder of the cache
VERSION = 1

_KNOWN: dict[tuple[Path, str], Site] = {}  # results read or measured in this process
_WARNED: set[str] = set()


def folder() -> Path:
    """The folder that ATTNREWRITE_CACHE names, or attnrewrite's in the user's cache folder."""
    if given := os.environ.get(FOLDER):
        return Path(given)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "attnrewrite"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnrewrite"


def load(call: AttentionCall, machine: Machine, search: Search) -> Site | None:
    """Returns the result for such a call on this machine, None if there is none. Warns of a file that cannot be used."""
    key = _key(call, machine, search)
    path = _path(key)
    if (path, repr(key)) in _KNOWN:
        return _KNOWN[path, repr(key)]
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        _warn(f"{path} cannot be read ({error.strerror}): the call is measured again")
        return None
    try:
        data = json.loads(text)
        if data["key"] != key:
            raise ValueError("it is of another call, machine or version")
        site = Site.from_dict(data["site"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        _warn(
            f"{path} is ignored ({type(error).__name__}: {error}): the call is measured again. Delete the file if this stays"
        )
        return None
    _KNOWN[path, repr(key)] = site
    return site


def save(site: Site, machine: Machine, search: Search) -> None:
    """Stores a result. If the folder cannot be written, warns and keeps the result for this process alone."""
    key = _key(site.call, machine, search)
    path = _path(key)
    _KNOWN[path, repr(key)] = site
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"key": key, "site": site.described().to_dict()}, indent=1) + "\n")
    except OSError as error:
        _warn(
            f"{path.parent} cannot be written ({error.strerror}): results last for this process alone. Set {FOLDER} to another "
            "folder"
        )


def _key(call: AttentionCall, machine: Machine, search: Search) -> dict[str, Any]:
    key = {
        "version": VERSION,
        "inner": inner_name(search.inner),
        "attnrewrite": __version__,
        "machine": machine.to_dict(),
        "numerics": search.numerics.word,
        "candidates": [each.name for each in search.candidates],
        "call": call.to_dict(),
    }
    known: dict[str, Any] = json.loads(json.dumps(key))  # tuples become lists, as in the file
    return known


def _path(key: dict[str, Any]) -> Path:
    return folder() / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}.json"


def _warn(text: str) -> None:
    if text not in _WARNED:
        _WARNED.add(text)
        warnings.warn(f"attnrewrite's cache of measurements: {text}", stacklevel=2)
