"""`Report`: the attentions in every graph that one backend object compiled, and their kernels, as a table and as JSON."""

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
from ..graphs.eager_calls import EagerCall
from ..kernels.calls import AttentionCall
from ..kernels.machines import Machine
from ..parallel.plans import Sharing
from ..pipeline import Outcome
from ..planning.plans import Plan
from ..planning.sites import NearMiss, Site
from ..planning.tables import cells, count, eager_lines, folded, near_miss_lines
from ..version import __version__
from .reproducing import script

NOTHING = (
    "no graph was compiled through this object yet. (Two equal with_backend(...) share compiled code: "
    "the sites are then in the report of the one that compiled it.)"
)

NO_REPORT = "this is not an attnrewrite report of version 1: write it with report.to_json()"


@dataclass(frozen=True)
class GraphReport:
    """One graph of a `Report`."""

    name: str  # Dynamo's id of the compilation, as "0/1"; "graph 0" outside of Dynamo
    plan: Plan  # the decisions at each attention of the graph
    machine: Machine | None  # the machine of the first attention; None without attention
    seconds: float  # time that the passes took
    unchanged: int  # attention calls that stand in the graph afterwards
    context: str = ""  # choices of the `attention_backend` in which the graph was compiled; "" outside of any
    near_misses: tuple[NearMiss, ...] = ()  # softmaxes that resemble an attention and were not recognised as one
    sharing: tuple[
        str, ...
    ] = ()  # paths of the repeated blocks that run this graph; the sites are named after the first
    parallel: Sharing | None = None  # how the ranks of a `context_parallel` share the graph; None without one

    @staticmethod
    def of(
        name: str,
        outcome: Outcome,
        context: str = "",
        sharing: tuple[str, ...] = (),
        parallel: Sharing | None = None,
    ) -> GraphReport:
        return GraphReport(
            name,
            outcome.plan,
            outcome.machine,
            outcome.seconds,
            outcome.unchanged,
            context,
            outcome.near_misses,
            sharing,
            parallel,
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
            "sharing": list(self.sharing),
            "parallel": self.parallel.to_dict() if self.parallel else None,
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
            tuple(data.get("sharing", ())),
            Sharing.from_dict(data["parallel"]) if data.get("parallel") else None,
        )


@dataclass
class Report:
    """The attentions that one backend object found, the kernel of each, and every refusal.

        print(backend.report)                   # a table
        text = backend.report.to_json()         # everything, for `Report.from_json(text)`

    It grows as graphs are compiled. If Dynamo restarts a compilation, the new graph replaces that of the earlier try.

    policy: the choices of kernels.
    graphs: a `GraphReport` for each graph, in the order of their compilation.
    unmatched_rules: patterns of `rules` that matched no site, or no module of a model that was set by its blocks.
    eager_calls: the places at which the model called attention outside of every graph, where nothing is swapped: in the run
        that `explain` traces, or in a compiled model's first call with a graph break.
    """

    policy: str = ""
    graphs: list[GraphReport] = field(default_factory=list)
    unmatched_rules: list[str] = field(default_factory=list)
    eager_calls: list[EagerCall] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._attempts: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy has a lock of its own, and knows nothing of Dynamo's attempts, which belong to this process."""
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_attempts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.__post_init__()

    def add(self, graph: GraphReport, attempt: Any = None) -> None:
        """Adds a graph. attempt: identifies one try at a compilation. If Dynamo starts a frame again, the graphs of the earlier
        try are removed; the buckets into which DistributedDataParallel splits a frame belong to one try, and all stay."""
        with self._lock:
            if self._attempts.get(graph.name) != attempt:
                self.graphs[:] = [known for known in self.graphs if known.name != graph.name]
            self._attempts[graph.name] = attempt
            self.graphs.append(graph)

    @property
    def sites(self) -> list[Site]:
        return [site for graph in self.graphs for site in graph.plan.sites]

    def repro(self, site: str | Site, path: str | os.PathLike[str] | None = None, inner: str = "inductor") -> str:
        """Returns a stand-alone Python script for one site. The script makes random tensors for the site's call (sizes, dtype,
        memory layout, mask, scale, seed), runs the chosen kernel under torch.compile, and prints its error against float64.

            backend.report.repro("transformer_blocks.3.attn", "repro.py")

        site: a name or an entry of `sites`. If several sites have the name, the last one counts.
        path: a file to which the script is written, too.
        inner: the compiler of the script's graph, by its name in `with_backend`.

        Symbolic sizes stand at the top of the script, to be filled in. Raises `ValueError` for an unknown name, for a record
        of your own without a registered name and for an `inner` without a name, `OSError` for a path that cannot be written.
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
        """Softmaxes that resemble an attention and were not recognised as one, each with the reason."""
        return [each for graph in self.graphs for each in graph.near_misses]

    @property
    def swapped(self) -> int:
        """Number of attentions that got another call."""
        return self._together.swapped

    @property
    def native(self) -> int:
        """Number of attentions for which a choice kept PyTorch's call unchanged."""
        return self._together.native

    @property
    def left(self) -> int:
        """Number of attentions that every choice refused."""
        return self._together.left

    @property
    def _together(self) -> Plan:
        return Plan(tuple(self.sites))

    @property
    def seconds(self) -> float:
        """Time that the passes took over all graphs."""
        return sum(graph.seconds for graph in self.graphs)

    def to_dict(self) -> dict[str, Any]:
        graphs = [graph.to_dict() for graph in self.graphs]
        return {
            "version": 1,
            "policy": self.policy,
            "unmatched_rules": self.unmatched_rules,
            "eager_calls": [asdict(each) for each in self.eager_calls],
            "graphs": graphs,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Report:
        """Reads the result of `to_dict`. Raises `ValueError` if `data` is not a report of version 1."""
        try:
            if data["version"] != 1:
                raise ValueError(f"its version is {data['version']!r}")
            graphs = [GraphReport.from_dict(graph) for graph in data["graphs"]]
            eager = [EagerCall(**each) for each in data.get("eager_calls", ())]
            return Report(data["policy"], graphs, data["unmatched_rules"], eager)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(NO_REPORT) from error

    @staticmethod
    def from_json(text: str) -> Report:
        """Reads the result of `to_json`. Raises `ValueError` as `from_dict`, and for text that is not JSON."""
        try:
            data = json.loads(text)
        except (ValueError, TypeError) as error:
            raise ValueError(NO_REPORT) from error
        return Report.from_dict(data)

    def __str__(self) -> str:
        rules = [f"rule {pattern!r} matched none of these sites" for pattern in self.unmatched_rules]
        if not self.graphs:
            return "\n".join([f"attnrewrite ({self.policy}): {NOTHING}", *eager_lines(self.eager_calls), *rules])
        sites = self.sites
        lines = [
            f"attnrewrite ({self.policy}): {count(len(sites), 'attention site')} in {count(len(self.graphs), 'graph')}: "
            f"{self._together.counts()}; {self.seconds:.2f} s"
        ]
        machines = dict.fromkeys(str(graph.machine) for graph in self.graphs if graph.machine)
        lines += [f"on {machine}" for machine in machines]
        for sharing in dict.fromkeys(graph.sharing for graph in self.graphs if graph.sharing):
            lines.append(f"block {sharing[0]}, " + (f"shared by {len(sharing)} blocks" if sharing[1:] else "by itself"))
        for context in dict.fromkeys(graph.context for graph in self.graphs):
            lines += [f"in attention_backend({context}):"] if context else []
            lines += _table(site for graph in self.graphs if graph.context == context for site in graph.plan.sites)
        lines += [] if sites else ["no attention found"]
        for graph in self.graphs:
            if graph.parallel is not None:
                lines += [f"graph {graph.name}:"] if len(self.graphs) > 1 else []
                lines += graph.parallel.lines()
        lines += [*near_miss_lines(self.near_misses), *eager_lines(self.eager_calls), *rules]
        return "\n".join(lines)


def _table(sites: Iterable[Site]) -> list[str]:
    """A row for each group of sites that differ only in their names, with the refusals under the row."""
    groups: dict[tuple[Any, ...], list[Site]] = {}
    for site in sites:
        groups.setdefault(
            (_call_key(site.call), site.decisions, site.chosen, site.source, site.note, site.stale, site.inexact), []
        ).append(site)
    if not groups:
        return []
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
    """A line with the chosen kernel's library, the steps around the kernel (as casts), the error of a kernel that is
    quantised or sparse, and the reason for the choice."""
    parts = ([f"from {site.source}"] if site.source else []) + [str(step) for step in site.steps]
    parts += [str(each) for each in (site.inexact, site.stale, site.note) if each]
    return [f"{site.chosen}: {'; '.join(parts)}"] if parts else []


def _call_key(call: AttentionCall) -> str:
    return json.dumps({**asdict(call), "site": ""}, default=str)
