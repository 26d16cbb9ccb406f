"""`Rates`: what a device computes and sends in a second."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..kernels.machines import Machine

# By the name that CUDA gives a device, without NVIDIA's. Dense products of a dtype, in 10**12 FLOPs a second: the data sheet of
# the H200 (SXM) has 1,979 for bfloat16 and float16 with sparsity, half of it without; float32 is without TF32, PyTorch's
# default.
TFLOPS = {"H200": {"bfloat16": 989.0, "float16": 989.0, "float32": 67.0, "float64": 67.0}}
# GB (10**9 bytes) a second that a device sends to the others of its host, in one direction: the data sheet's 900 of NVLink are
# both directions together.
LINKS = {"H200": 450.0}


@dataclass(frozen=True)
class Rates:
    """What a device computes and sends in a second, by its data sheet, and how much of it is reached.

    tflops: dense matrix products, in 10**12 FLOPs a second. None: those of the machine, by dtype.
    link: what a device sends to the others, in one direction, in GB (10**9 bytes) a second. None: that of the machine.
    tflops_reached, link_reached: the part of these that a step reaches. The defaults are those of two H200 with bfloat16
        (docs/context-parallel.md).
    exchange_ms: what an exchange takes beside its bytes, in ms. The default is that of two H200.

    Raises `TypeError` for a field that is no number, `ValueError` for a rate that is not above 0, a part that is not above 0
    and up to 1, and a time below 0.
    """

    tflops: float | None = None
    link: float | None = None
    tflops_reached: float = 0.6
    link_reached: float = 0.68
    exchange_ms: float = 0.05

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is None and name in ("tflops", "link"):
                continue
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise TypeError(f"{name} is {value!r} ({type(value).__name__}): give a number")
            if name in ("tflops", "link") and not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}: give a rate above 0")
            if name.endswith("_reached") and not 0 < value <= 1:
                raise ValueError(f"{name} is {value}: give the part that is reached, above 0 and up to 1")
            if name == "exchange_ms" and not 0 <= value < float("inf"):
                raise ValueError(f"exchange_ms is {value}: give a time in ms, 0 or more")


def rates_of(machine: Machine | None, dtypes: Iterable[str], given: Rates) -> tuple[dict[str, float], float] | str:
    """What the devices do: TFLOP/s of each dtype, and GB/s of the link. A text that says what is not known, and what to do."""
    name = machine.name.removeprefix("NVIDIA ") if machine is not None else ""
    known = TFLOPS.get(name, {})
    tflops = {dtype: rate for dtype in dtypes if (rate := given.tflops or known.get(dtype))}
    link = given.link or LINKS.get(name)
    missing = [] if given.tflops or known else ["tflops"]
    missing += [] if link else ["link"]
    if missing or link is None:
        words = {"tflops": "the rate of its products", "link": "the rate of its link to the others"}
        return (
            f"{_told(machine)} is no {' or '.join(LINKS)}, and {' and '.join(words[each] for each in missing)} must be given: "
            f"{_remedy(missing)}"
        )
    if others := [dtype for dtype in dtypes if dtype not in tflops]:
        return f"the rate of products in {', '.join(others)} is not known for {name}: {_remedy(['tflops'])}"
    return tflops, link


def _told(machine: Machine | None) -> str:
    if machine is None:
        return "this machine"
    capability = f" sm_{machine.capability[0]}{machine.capability[1]} without a name" if machine.capability else ""
    return machine.name or f"{machine.device}{capability}"


def _remedy(missing: list[str]) -> str:
    fields, flags = (template.join(missing) for template in ("=..., ", " and --"))
    return f"DescribedRanks(..., rates=Rates({fields}=...)), or --{flags} at the command line"
