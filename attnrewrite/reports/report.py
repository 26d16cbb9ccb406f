"""`Report`: what was found and done in every graph that one backend object compiled, for people and for files."""

from __future__ import annotations

import difflib
import json
import os
import textwrap
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import writable, write_whole
from ..kernels.calls import AttentionCall
from ..kernels.machines import Machine
from ..pipeline import Outcome
from ..planning.plans import Plan
from ..planning.sites import NearMiss, Site
from ..planning.tables import cells, count, folded, near_miss_lines
from ..version import __version__
from .reproducing import script

NOTHING = (
    "no graph was compiled through this object yet. (Two equal with_backend(...) share compiled code: "
    "the sites are then in the report of the one that compiled it.)"
)

NO_REPORT = "this is not an attnrewrite report of version 1: write it with report.to_json()"


@dataclass(frozen=True)
class GraphReport:
    """One graph."""

    name: str
    plan: Plan
    machine: Machine | None
    seconds: float  # that the passes took
    unchanged: int  # attention calls that stand in the graph afterwards
    context: str = ""  # the choice of the `attention_backend` that it was compiled in, "" outside of all
    near_misses: tuple[NearMiss, ...] = ()

    @staticmethod
    def of(name: str, outcome: Outcome, context: str = "") -> GraphReport:
        return GraphReport(
            name, outcome.plan, outcome.machine, outcome.seconds, outcome.unchanged, context, outcome.near_misses
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "machine": self.machine.to_dict() if self.machine else None,
            "seconds": self.seconds,
            "unchanged": self.unchanged,
            "context": self.context,
            "sites": [site.to_dict() for site in self.plan.sites],
            "near_misses": [asdict(each) for each in self.near_misses],
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> GraphReport:
        return GraphReport(
            data["name"],
            Plan(tuple(Site.from_dict(site) for site in data["sites"])),
            Machine.from_dict(data["machine"]) if data["machine"] else None,
            data["seconds"],
            data["unchanged"],
            data.get("context", ""),
            tuple(NearMiss(**each) for each in data.get("near_misses", ())),
        )


@dataclass
class Report:
    """Grows as graphs are compiled; a graph compiled again after a restart of the tracer replaces itself.

    `str()` is a table to read, `to_json()` / `from_json()` keep everything.
    """

    policy: str = ""
    graphs: list[GraphReport] = field(default_factory=list)
    unmatched_rules: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._attempts: dict[str, Any] = {}

    def add(self, graph: GraphReport, attempt: Any = None) -> None:
        """Adds a graph. `attempt` tells tries at one compilation apart: where Dynamo starts a frame again, the graphs of
        the earlier try go; the buckets into which DistributedDataParallel splits a frame belong to one and all stay."""
        with self._lock:
            if self._attempts.get(graph.name) != attempt:
                self.graphs[:] = [known for known in self.graphs if known.name != graph.name]
            self._attempts[graph.name] = attempt
            self.graphs.append(graph)

    @property
    def sites(self) -> list[Site]:
        return [site for graph in self.graphs for site in graph.plan.sites]

    def repro(self, site: str | Site, path: str | os.PathLike[str] | None = None, inner: str = "inductor") -> str:
        """A stand-alone Python script that builds the call of one site anew (sizes, dtype, memory layout, mask, scale, seed;
        random tensors), runs the kernel that was chosen for it under torch.compile, and prints its error to float64.

        site: a name of `sites`, or a site. Of several with one name the last counts. path: also write it there.
        inner: the compiler that gets the graph there, by its name in `with_backend`.
        Sizes that are symbols in the graph stand at its top, to be filled in. Raises `ValueError` for an unknown name, and for
        a kernel or an `inner` of your own that has no name to ask for; `OSError` for a place that cannot be written to.
        """
        text = script(self._named(site) if isinstance(site, str) else site, __version__, inner=inner)
        if path is not None:
            writable(file := Path(path))
            write_whole(file, text)
        return text

    def _named(self, name: str) -> Site:
        known = {site.name: site for site in self.sites}
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            hint = f"did you mean {near[0]!r}?" if near else NOTHING
            raise ValueError(f"site is {name!r}, which is none of the {len(known)} in this report; {hint}")
        return known[name]

    @property
    def near_misses(self) -> list[NearMiss]:
        """What looks like an attention and was not taken for one."""
        return [each for graph in self.graphs for each in graph.near_misses]

    @property
    def swapped(self) -> int:
        """How many attentions got another call than they had."""
        return self._together.swapped

    @property
    def native(self) -> int:
        """How many a choice left to PyTorch as they were."""
        return self._together.native

    @property
    def left(self) -> int:
        """How many no choice might take."""
        return self._together.left

    @property
    def _together(self) -> Plan:
        return Plan(tuple(self.sites))

    @property
    def seconds(self) -> float:
        return sum(graph.seconds for graph in self.graphs)

    def to_dict(self) -> dict[str, Any]:
        graphs = [graph.to_dict() for graph in self.graphs]
        return {"version": 1, "policy": self.policy, "unmatched_rules": self.unmatched_rules, "graphs": graphs}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Report:
        """Raises `ValueError` if this is no report of a version that is known here."""
        try:
            if data["version"] != 1:
                raise ValueError(f"its version is {data['version']!r}")
            graphs = [GraphReport.from_dict(graph) for graph in data["graphs"]]
            return Report(data["policy"], graphs, data["unmatched_rules"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(NO_REPORT) from error

    @staticmethod
    def from_json(text: str) -> Report:
        """Raises `ValueError` as `from_dict`, and for a text that is no JSON."""
        try:
            data = json.loads(text)
        except (ValueError, TypeError) as error:
            raise ValueError(NO_REPORT) from error
        return Report.from_dict(data)

    def __str__(self) -> str:
        if not self.graphs:
            return f"attnrewrite ({self.policy}): {NOTHING}"
        sites = self.sites
        lines = [
            f"attnrewrite ({self.policy}): {count(len(sites), 'attention site')} in {count(len(self.graphs), 'graph')}: "
            f"{self._together.counts()}; {self.seconds:.2f} s"
        ]
        machines = dict.fromkeys(str(graph.machine) for graph in self.graphs if graph.machine)
        lines += [f"on {machine}" for machine in machines]
        for context in dict.fromkeys(graph.context for graph in self.graphs):
            lines += [f"in attention_backend({context}):"] if context else []
            lines += _table(site for graph in self.graphs if graph.context == context for site in graph.plan.sites)
        lines += near_miss_lines(self.near_misses)
        lines += [f"rule {pattern!r} matched none of these sites" for pattern in self.unmatched_rules]
        return "\n".join(lines)


def _table(sites: Iterable[Site]) -> list[str]:
    """A row for each group of sites that differ in their names alone, its refusals under it."""
    groups: dict[tuple[Any, ...], list[Site]] = {}
    for site in sites:
        groups.setdefault(
            (_call_key(site.call), site.decisions, site.chosen, site.source, site.note, site.stale), []
        ).append(site)
    rows = [("site", "query (B, H, S, D)", "key, value", "dtype", "mask", "kernel")]
    notes: list[list[str]] = [[]]
    for members in groups.values():
        first = members[0]
        rows.append((folded([site.name for site in members]), *cells(first.call), first.chosen or "(unchanged)"))
        notes.append([f"{name} refused: {refused}" for name, refused in first.refusals] + _how(first))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row, reasons in zip(rows, notes, strict=True):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        for reason in reasons:
            lines += textwrap.wrap(reason, 116, initial_indent="    ", subsequent_indent="      ")
    return lines


def _how(site: Site) -> list[str]:
    """The library behind the chosen kernel, what is done around it, and what chose it."""
    parts = ([f"from {site.source}"] if site.source else []) + [str(step) for step in site.steps]
    parts += [each for each in (site.stale, site.note) if each]
    return [f"{site.chosen}: {'; '.join(parts)}"] if parts else []


def _call_key(call: AttentionCall) -> str:
    return json.dumps({**asdict(call), "site": ""}, default=str)
