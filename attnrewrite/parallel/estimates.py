"""`Estimate`: how much of a graph's time its exchanges take, computed from bytes, FLOPs and the rates of a device.

    exchanges = number * exchange_ms + bytes / (link * link_reached)
    products  = FLOPs / (tflops * tflops_reached)
    share     = exchanges / (exchanges + products)

docs/context-parallel.md compares it with what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..kernels.machines import Machine
from .products import Products
from .rates import Rates, rates_of

# The number of those that wait for each other, and the MiB that each rank sends in them.
Exchanges = tuple[int, float | None]


@dataclass(frozen=True)
class Estimate:
    """refused: why there is none; the rest is empty then."""

    sites: tuple[float, ...] = ()  # ms of the exchanges at each attention
    others: float = 0.0  # ms of all other exchanges
    products: float = 0.0  # ms
    tflop: float = 0.0  # 10**12 FLOPs of a rank's products
    rates: str = ""  # in words
    uncounted: tuple[str, ...] = ()  # operators that may hold products, and are not counted
    refused: str = ""

    @property
    def exchanges(self) -> float:
        """ms of all exchanges, one behind the other."""
        return sum(self.sites) + self.others

    @property
    def share(self) -> float | None:
        """The part of a graph's time that its exchanges take if nothing else runs beside them; None where it is not known."""
        return self.part(self.exchanges)

    def part(self, ms: float) -> float | None:
        """The part of a graph's time that so many ms are."""
        total = self.exchanges + self.products
        return None if self.refused or not total else ms / total

    def line(self) -> str:
        if self.refused:
            return f"no estimate of what exchanges take: {self.refused}"
        if self.share is None:
            return "no estimate of what exchanges take: nothing is computed or exchanged here"
        rest = f"; not counted: {', '.join(self.uncounted)}" if self.uncounted else ""
        return (
            f"estimated: exchanges take {percent(self.share)} of the forward of this graph, if nothing runs beside them: "
            f"{_number(self.exchanges)} ms, and {_number(self.products)} ms for the {_number(self.tflop)} TFLOP of a rank's "
            f"products ({self.rates}){rest}"
        )

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Estimate:
        return Estimate(**{**data, "sites": tuple(data["sites"]), "uncounted": tuple(data["uncounted"])})


def estimate(
    sites: Sequence[Exchanges],
    others: Sequence[Exchanges],
    counted: Products | None,
    machine: Machine | None,
    given: Rates,
) -> Estimate:
    """The estimate for one call of a graph. counted: the products of one rank; None where sizes are symbolic."""
    if counted is None or any(mib is None for _, mib in (*sites, *others)):
        return Estimate(refused="sizes are symbolic: give inputs of the sizes that run, with dynamic=False")
    dtypes = [dtype for dtype, flops in counted.flops.items() if flops]
    found = rates_of(machine, dtypes, given)
    if isinstance(found, str):
        return Estimate(refused=found)
    tflops, link = found

    def sent(exchanges: Exchanges) -> float:
        number, mib = exchanges
        return number * given.exchange_ms + (mib or 0.0) * 2**20 / (link * 1e6 * given.link_reached)

    computed = ", ".join(
        f"{rate:g} TFLOP/s" + (f" in {dtype}" if len(tflops) > 1 else "") for dtype, rate in tflops.items()
    )
    name = f"{machine.name}: " if machine is not None and machine.name else ""
    return Estimate(
        tuple(map(sent, sites)),
        sum(map(sent, others)),
        sum(counted.flops[dtype] / (tflops[dtype] * 1e9 * given.tflops_reached) for dtype in dtypes),
        counted.total / 1e12,
        f"{name}{computed or 'no products'}, {percent(given.tflops_reached)} of it reached; {link:g} GB/s to the others, "
        f"{percent(given.link_reached)} of it reached; {given.exchange_ms:g} ms an exchange",
        counted.uncounted,
    )


def percent(part: float) -> str:
    if part > 0.99:
        return "100%" if part == 1 else "more than 99%"
    return f"{100 * part:.0f}%" if part >= 0.0995 else f"{100 * part:.2g}%"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"
