"""What `with_backend("tune")` has measured, on disk: one file a call, by machine, versions and what was searched for.

A file is written whole or not at all, so processes that tune at once do no harm: the last one's stays. What cannot be read,
or is of another key, is ignored with a warning and measured again.
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
from .measure_site import Search

FOLDER = "ATTNREWRITE_CACHE"  # environment: the folder of the cache
VERSION = 1

_KNOWN: dict[tuple[Path, str], Site] = {}  # read or measured in this process
_WARNED: set[str] = set()


def folder() -> Path:
    """Of this user, where the environment names none."""
    if given := os.environ.get(FOLDER):
        return Path(given)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "attnrewrite"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnrewrite"


def load(call: AttentionCall, machine: Machine, search: Search) -> Site | None:
    """What was measured of such a call here, None where nothing was. Warns of a file that does not hold it."""
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
    """Warns where the folder cannot be written; the result serves this process then."""
    key = _key(site.call, machine, search)
    path = _path(key)
    _KNOWN[path, repr(key)] = site
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"key": key, "site": site.described().to_dict()}, indent=1) + "\n")
    except OSError as error:
        _warn(
            f"{path.parent} cannot be written ({error.strerror}): what is measured serves this process alone. Set {FOLDER}"
        )


def _key(call: AttentionCall, machine: Machine, search: Search) -> dict[str, Any]:
    key = {
        "version": VERSION,
        "inner": inner_name(search.inner),
        "attnrewrite": __version__,
        "machine": machine.to_dict(),
        "numerics": search.numerics.name.lower(),
        "candidates": [each.name for each in search.candidates],
        "call": call.to_dict(),
    }
    known: dict[str, Any] = json.loads(json.dumps(key))  # tuples as they come back
    return known


def _path(key: dict[str, Any]) -> Path:
    return folder() / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}.json"


def _warn(text: str) -> None:
    if text not in _WARNED:
        _WARNED.add(text)
        warnings.warn(f"attnrewrite's cache of measurements: {text}", stacklevel=2)
