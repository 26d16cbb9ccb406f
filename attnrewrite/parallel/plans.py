"""`Sharing`: how one graph is shared by ranks, as data for reports and for the comparison between ranks."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..kernels.machines import Machine
from .estimates import Estimate, estimate, percent
from .products import Products
from .rates import Rates

MIB = 1024**2

# What the ranks exchange at an attention.
BATCH = "nothing: each rank has a part of the batch or of the heads"
ALL_TO_ALL = "all-to-all between tokens and heads"
KEYS_GATHERED = "all-gather of keys and values"
RING = "ring: keys and values go from rank to rank"
GROUPS = "all-to-all in groups of ranks, and a ring of the groups"
KEYS_WHOLE = "nothing: each rank has a part of the queries, and all keys"
WHOLE = "computed whole on every rank"
EXCHANGED = frozenset({ALL_TO_ALL, KEYS_GATHERED, RING, GROUPS})


@dataclass(frozen=True)
class Begin:
    """A tensor that every rank has whole, and of which each rank goes on with a part."""

    where: str  # module path and operation, or the name of an input
    shape: tuple[int | str, ...]
    dim: int
    lengths: tuple[int | str, ...]  # of the segments along `dim`


@dataclass(frozen=True)
class SharedSite:
    """One attention."""

    site: str
    exchange: str  # one of the sentences above
    mib: float | None  # sent by each rank; None where a size is symbolic
    reason: str = ""  # why this exchange and no cheaper one; "" where there is nothing to say
    exchanges: int = 0  # the number of those that wait for each other


@dataclass(frozen=True)
class Gathered:
    """A tensor that every rank needs whole: an operation for which no rule is known, or an output."""

    where: str
    shape: tuple[int | str, ...]
    mib: float | None  # received by each rank
    reason: str


@dataclass(frozen=True)
class Sharing:
    """How one graph is shared. refused: why the graph runs whole on every rank; the rest is empty then."""

    ranks: int
    begins: tuple[Begin, ...] = ()
    sites: tuple[SharedSite, ...] = ()
    gathered: tuple[Gathered, ...] = ()
    summed: int = 0  # number of all-reduces
    refused: str = ""
    added: int = 0  # number of inputs whose gradients are added up over the ranks
    estimate: Estimate | None = None  # of the exchanges' share of the time, where `explain` asks for it

    @property
    def mib(self) -> float | None:
        """What each rank sends or receives in one call of the graph."""
        found = [each.mib for each in self.sites] + [each.mib for each in self.gathered]
        known = [mib for mib in found if mib is not None]
        return sum(known) if len(known) == len(found) else None

    def estimated(self, counted: Products | None, machine: Machine | None, rates: Rates) -> Sharing:
        """The same with an estimate of the exchanges' share of the time. counted: the products of the graph of one rank."""
        if not self.begins:
            return self
        sites = [(each.exchanges, each.mib if each.exchange in EXCHANGED else 0.0) for each in self.sites]
        others = [(1, each.mib) for each in self.gathered] + [(1, 0.0)] * self.summed
        return replace(self, estimate=estimate(sites, others, counted, machine, rates))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Sharing:
        return Sharing(
            data["ranks"],
            tuple(
                Begin(each["where"], tuple(each["shape"]), each["dim"], tuple(each["lengths"]))
                for each in data["begins"]
            ),
            tuple(SharedSite(**each) for each in data["sites"]),
            tuple(Gathered(**{**each, "shape": tuple(each["shape"])}) for each in data["gathered"]),
            data["summed"],
            data["refused"],
            data["added"],
            Estimate.from_dict(data["estimate"]) if data.get("estimate") else None,
        )

    def lines(self) -> list[str]:
        """The table that reports show."""
        if self.refused:
            return _wrapped(
                f"context parallelism over {self.ranks} ranks: the graph runs whole on every rank: {self.refused}"
            )
        if not self.begins:
            return [f"context parallelism over {self.ranks} ranks: nothing is shared"]
        found = [f"context parallelism over {self.ranks} ranks, {_mib(self.mib)} exchanged by each rank in a call:"]
        for begin, count in _counted(self.begins):
            lengths = " + ".join(map(str, begin.lengths))
            found += _wrapped(
                f"  from {begin.where} {_shape(begin.shape)} on, along dimension {begin.dim} ({lengths}){count}"
            )
        for (exchange, mib, reason, part), names in self._grouped().items():
            because = f": {reason}" if reason else ""
            share = "" if part is None else f", estimated {percent(part)} of the time"
            cost = f", {_mib(mib)}{share} each" if exchange in EXCHANGED else ""
            found += _wrapped(f"  at {_names(names)}: {exchange}{cost}{because}")
        for each, count in _counted(self.gathered):
            found += _wrapped(f"  gathered: {each.where} {_shape(each.shape)}, {_mib(each.mib)}: {each.reason}{count}")
        if self.summed:
            found.append(f"  {self.summed} sums over all ranks")
        if self.added:
            found.append(
                f"  in the backward: each exchange the other way, and {self.added} gradients added up over all ranks"
            )
        if self.estimate is not None:
            found += _wrapped(f"  {self.estimate.line()}")
        return found

    def _grouped(self) -> dict[tuple[str, float | None, str, float | None], list[str]]:
        """The names of the attentions that differ in nothing else."""
        parts: list[float | None] = [None] * len(self.sites)
        if self.estimate is not None and not self.estimate.refused:
            parts = [self.estimate.part(ms) for ms in self.estimate.sites]
        groups: dict[tuple[str, float | None, str, float | None], list[str]] = {}
        for each, part in zip(self.sites, parts, strict=True):
            groups.setdefault((each.exchange, each.mib, each.reason, part), []).append(each.site)
        return groups


def _names(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _counted(items: Iterable[Any]) -> list[tuple[Any, str]]:
    """Each distinct item once, with how often it is there."""
    counts: dict[Any, int] = {}
    for each in items:
        counts[each] = counts.get(each, 0) + 1
    return [(each, f" ({number} times)" if number > 1 else "") for each, number in counts.items()]


def _shape(shape: tuple[int | str, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


def _mib(mib: float | None) -> str:
    return "? MiB" if mib is None else f"{mib:.3g} MiB"


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, 116, subsequent_indent="      ")
