"""`Plan`: for every site the call, the decisions on the kernels and the choice; for a tuned model also the measurements."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..files import write_whole
from .measurements import Tuning
from .sites import Site
from .tables import tuned_table

VERSION = 1  # of the file format


@dataclass(frozen=True)
class Plan:
    """The decision for every attention site. `str()` is a table to read."""

    sites: tuple[Site, ...] = ()
    tuning: Tuning | None = None  # how `attnrewrite.tune` measured the plan; None: it was not measured

    @property
    def swapped(self) -> int:
        """Number of sites that get another call than the model has."""
        return sum(site.swapped for site in self.sites)

    @property
    def native(self) -> int:
        """Number of sites with the choice `native`, whose call stays as it is."""
        return sum(site.chosen == "native" and not site.swapped for site in self.sites)

    @property
    def left(self) -> int:
        """Number of sites that no choice may take."""
        return sum(site.chosen is None for site in self.sites)

    def counts(self) -> str:
        return f"{self.swapped} swapped, {self.native} native, {self.left} left as they were"

    def described(self) -> Plan:
        return replace(self, sites=tuple(site.described() for site in self.sites))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan to a JSON file, whole or not at all. Raises `OSError`."""
        write_whole(Path(path), self.to_json() + "\n")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Reads a plan from a JSON file. Raises `OSError`, and `ValueError` if the file holds no plan of the known version."""
        text = Path(path).read_text(encoding="utf-8", errors="replace")
        try:
            return Plan.from_json(text)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Sites that differ only in their names share one entry, with the names under "names"."""
        groups: dict[str, dict[str, Any]] = {}
        for site in self.described().sites:
            data = site.to_dict()
            name = data["call"].pop("site")
            groups.setdefault(json.dumps(data), {"names": [], **data})["names"].append(name)
        tuning = self.tuning and self.tuning.to_dict()
        return {"attnrewrite plan": VERSION, "tuning": tuning, "sites": list(groups.values())}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Plan:
        """Sites that share an entry become neighbours. Raises `ValueError` if `data` is no plan of the known version."""
        try:
            if data["attnrewrite plan"] != VERSION:
                raise ValueError(f"its version is {data['attnrewrite plan']!r}, {VERSION} is known here")
            sites = []
            for group in data["sites"]:
                shared = {key: value for key, value in group.items() if key != "names"}
                sites += [
                    Site.from_dict({**shared, "call": {**group["call"], "site": name}}) for name in group["names"]
                ]
            return Plan(tuple(sites), Tuning.from_dict(data["tuning"]) if data["tuning"] is not None else None)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            said = str(error) if str(error).startswith("its version") else f"{type(error).__name__}: {error}"
            raise ValueError(f"this is no plan of attnrewrite ({said}): write one with plan.save(path)") from error

    @staticmethod
    def from_json(text: str) -> Plan:
        """Raises `ValueError` as `from_dict` does, and if `text` is not JSON."""
        try:
            data = json.loads(text)
        except ValueError as error:
            said = f"{type(error).__name__}: {error}"
            raise ValueError(f"this is no plan of attnrewrite ({said}): write one with plan.save(path)") from error
        return Plan.from_dict(data)

    def __str__(self) -> str:
        return tuned_table(self.sites, self.tuning)
