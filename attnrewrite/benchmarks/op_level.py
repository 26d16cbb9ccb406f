"""Kernels by shape: one attention each, every kernel that takes it, in turn, under the matmul rate of the same run.

`attnrewrite.tune` measures: a kernel stands in a compiled graph as it would in a model, with the packing of a mask and the
padding of a head dim; on a GPU the host does not count. Tensors lie in memory as (batch, length, heads, dim), as diffusers
makes them; random numbers; nothing needs a gradient.

ms      the median of rounds in turn; of one that is far behind the fastest, a single sample
tflops  4 * batch * heads * q_len * kv_len * dim / time: masked keys count, quantisation and packing are part of the time
error   relative error to float64 on the same tensors, at most 256 queries of each head
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..decisions import Refused
from ..machines import machine_of
from ..measurements import Measurement
from ..plans import Site, make_plan
from ..policies import make_policy
from ..records import Numerics
from ..registry import records_of
from ..support import usable
from ..tuning import tune


@dataclass(frozen=True)
class Shape:
    """valid: the part of the keys that a boolean key mask leaves, anywhere in the sequence; None: no mask. line: the panel of
    the plot in which it is a point of a line."""

    batch: int
    heads: int
    q_len: int
    kv_len: int
    dim: int
    valid: float | None = None
    line: str = ""

    @property
    def flops(self) -> int:
        return 4 * self.batch * self.heads * self.q_len * self.kv_len * self.dim


# What published denoisers ask for, without a mask and with the prompt's padding.
NAMED = {
    "Flux": Shape(2, 24, 4608, 4608, 128),
    "Wan14B": Shape(1, 40, 32760, 32760, 128),
    "Wan1.3B": Shape(1, 12, 32760, 32760, 128),
    "s16k": Shape(1, 24, 16384, 16384, 64),
    "SDXL": Shape(2, 10, 4096, 4096, 64),
    "s1k": Shape(2, 24, 1024, 1024, 128),
    "cross": Shape(1, 40, 32760, 512, 128),
    "HunyuanVideo, masked": Shape(1, 24, 32896, 32896, 128, valid=0.995),
    "Qwen-Image, masked": Shape(2, 24, 7145, 7145, 128, valid=0.985),
    "LTX length, masked": Shape(2, 32, 6144, 6144, 64, valid=0.7),
}
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
LINES = {
    f"d{dim} {length}": Shape(1, 24, length, length, dim, line=f"1 x 24 heads of {dim}")
    for dim in (64, 128)
    for length in LENGTHS
}
SHAPES = NAMED | LINES
SMALL = {
    "tiny": Shape(2, 3, 33, 33, 16),
    "tiny, masked": Shape(2, 3, 20, 27, 16, valid=0.6),
    **{f"d16 {length}": Shape(1, 2, length, length, 16, line="1 x 2 heads of 16") for length in (16, 64)},
}


def attention(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None) -> Tensor:
    """SDPA of (batch, length, heads, dim); keep (batch, kv_len): True where a key takes part."""
    mask = None if keep is None else keep[:, None, None, :]
    q, k, v = (each.transpose(1, 2) for each in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


def kernels(names: Iterable[str], device: torch.device) -> tuple[list[str], dict[str, str]]:
    """Those that run on this machine, and why the others do not."""
    machine = machine_of(device)
    here, missing = [], {}
    for name in names:
        refused, _ = usable(name, machine)
        if refused is None:
            here.append(name)
        else:
            missing[name] = str(refused)
    return here, missing


def measure(
    shape: Shape, names: Sequence[str], device: torch.device, dtype: torch.dtype, inner: str = "inductor",
    say: Callable[[str], object] = print,
) -> dict[str, Any]:  # fmt: skip
    """The record of one shape: its sizes; for each kernel {"ms", "tflops", "error"} or {"failed": why}; and what `auto` and
    `tune` choose there, by the limit of numerics.

    Kernels that compute as SDPA does take turns; then the quantised ones, with `native` and the best of the others.
    """
    torch.compiler.reset()
    torch.manual_seed(0)
    sizes = [(shape.batch, length, shape.heads, shape.dim) for length in (shape.q_len, shape.kv_len, shape.kv_len)]
    given: list[Any] = [torch.randn(size, device=device, dtype=dtype) for size in sizes]
    given.append(None if shape.valid is None else torch.rand(shape.batch, shape.kv_len, device=device) < shape.valid)
    quantised = [name for name in names if _numerics(name) is Numerics.QUANTISED]
    exact = [name for name in names if name not in quantised]

    def found(candidates: Sequence[str], numerics: str) -> Site:
        plan = tune(attention, *given, candidates=candidates, numerics=numerics, inner=inner, progress=False)
        return plan.sites[0]

    with torch.no_grad():
        one = found(exact or ["native"], "reordered")
        rows = _rows(one, exact, shape)
        choices = {"tuned": one.chosen}
        if quantised:
            best = dict.fromkeys(("native", one.chosen or "native"))
            two = found([*best, *quantised], "quantised")
            rows |= _rows(two, quantised, shape)
            choices["tuned, quantised"] = two.chosen
    for name, numerics in (("auto", "reordered"), ("auto, quantised", "quantised")):
        choices[name] = (
            make_plan([one.call], make_policy(["auto"], numerics=numerics), [machine_of(device)]).sites[0].chosen
        )
    record = {**asdict(shape), "dtype": str(dtype).removeprefix("torch."), "kernels": rows, "choices": choices}
    _print(record, say)
    return record


def to_best(record: dict[str, Any], choice: str) -> float | None:
    """The time of what was chosen to that of the fastest kernel that could have been; None where it was not timed."""
    rows = record["kernels"]
    limit = Numerics.QUANTISED if choice.endswith("quantised") else Numerics.REORDERED
    times = {name: row["ms"] for name, row in rows.items() if "ms" in row and _numerics(name) <= limit}
    chosen = record["choices"].get(choice)
    return times[chosen] / min(times.values()) if chosen in times else None


def _numerics(name: str) -> Numerics:
    return records_of(name)[0].numerics


def _rows(site: Site, names: Iterable[str], shape: Shape) -> dict[str, dict[str, Any]]:
    measured = {each.name: each for each in site.measured}
    decided = dict(site.decisions)
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        decision = decided.get(name)
        if name in measured:
            rows[name] = _row(measured[name], shape)
        elif isinstance(decision, Refused):
            rows[name] = {"failed": f"{decision.code.value}: {decision.detail}"}
    return rows


def _row(found: Measurement, shape: Shape) -> dict[str, Any]:
    if found.milliseconds is None:
        return {"failed": found.dropped}
    ms = found.milliseconds
    row: dict[str, Any] = {"ms": ms, "tflops": shape.flops / ms / 1e9, "error": found.error, "rounds": found.rounds}
    return row | ({"dropped": found.dropped} if found.dropped else {})


def _print(record: dict[str, Any], say: Callable[[str], object]) -> None:
    sizes = " ".join(f"{record[name]:,}" for name in ("batch", "heads", "q_len", "kv_len", "dim"))
    say(f"\n({sizes}){'' if record['valid'] is None else ', key mask'}, {record['dtype']}")
    for name, row in sorted(record["kernels"].items(), key=lambda item: float(item[1].get("ms", "inf"))):
        if "failed" in row:
            say(f"  {name:34} {row['failed']}")
        else:
            said = f"  {name:34} {row['ms']:9.3f} ms  {row['tflops']:7.4g} TFLOP/s  error {row['error']:.1e}"
            say(said + (f"  ({row['dropped']})" if "dropped" in row else ""))
    for choice, kernel in record["choices"].items():
        ratio = to_best(record, choice)
        say(f"  {choice}: {kernel}" + ("" if ratio is None else f", {ratio:.3f} of the fastest's time"))
