"""Kernels by shape: one attention each, swapped in by attnrewrite, in turn, under the matmul rate of the same run.

Tensors lie in memory as (batch, length, heads, dim), as diffusers makes them; random numbers; nothing needs a gradient.

ms      the median by rounds of the time of a call, CUDA events around several in a row that are queued while the GPU is busy
tflops  4 * batch * heads * q_len * kv_len * dim / time: masked keys count, quantisation and packing are part of the time
error   relative error to float64 on the same tensors (at most 256 queries of each head)
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compilers import with_backend
from ..machines import machine_of
from ..records import Numerics
from ..reference import reference
from ..support import usable
from .measuring import in_turn, milliseconds, words


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
    given = (each.transpose(1, 2) for each in (query, key, value))
    return F.scaled_dot_product_attention(*given, mask).transpose(1, 2)


def kernels(names: Iterable[str], device: torch.device) -> tuple[list[str], dict[str, str]]:
    """Those that run on this machine, and why the others do not."""
    machine = machine_of(device)
    usables, missing = [], {}
    for name in names:
        refused, _ = usable(name, machine)
        if refused is None:
            usables.append(name)
        else:
            missing[name] = str(refused)
    return usables, missing


def measure(
    shape: Shape, names: Iterable[str], device: torch.device, dtype: torch.dtype, rounds: int,
    inner: str = "inductor", say: Callable[[str], object] = print,
) -> dict[str, Any]:  # fmt: skip
    """The record of one shape: its sizes, and for each kernel {"ms", "tflops", "error"} or {"failed": why}."""
    torch.compiler.reset()
    torch.manual_seed(0)
    sizes = [(shape.batch, length, shape.heads, shape.dim) for length in (shape.q_len, shape.kv_len, shape.kv_len)]
    given: list[Any] = [torch.randn(size, device=device, dtype=dtype) for size in sizes]
    keep = None if shape.valid is None else torch.rand(shape.batch, shape.kv_len, device=device) < shape.valid
    given.append(keep)
    rows: dict[str, dict[str, Any]] = {}
    timed: dict[str, Callable[[], float]] = {}
    limits: Any = torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=10_000)
    with torch.no_grad(), limits:
        for name in names:
            try:
                made, rows[name] = _warm(name, given, device, inner)
                if made is not None:
                    timed[name] = made
            except Exception as error:
                rows[name] = {"failed": words(error)}
                if device.type == "cuda":
                    torch.cuda.empty_cache()  # what ran out of memory leaves it in pieces
        times = in_turn(timed, rounds)
    for name, found in times.items():
        ms = statistics.median(found)
        rows[name] = {"ms": ms, "tflops": shape.flops / ms / 1e9, **rows[name]}
    said = " ".join(f"{size:,}" for size in (shape.batch, shape.heads, shape.q_len, shape.kv_len, shape.dim))
    say(f"\n({said}){'' if keep is None else ', key mask'}, {str(dtype).removeprefix('torch.')}")
    for name, row in sorted(rows.items(), key=lambda item: float(item[1].get("ms", "inf"))):
        if "failed" in row:
            say(f"  {name:34} {row['failed']}")
        else:
            say(f"  {name:34} {row['ms']:9.3f} ms  {row['tflops']:7.1f} TFLOP/s  error {row['error']:.1e}")
    return {**asdict(shape), "dtype": str(dtype).removeprefix("torch."), "kernels": rows}


def _warm(
    name: str, given: list[Any], device: torch.device, inner: str
) -> tuple[Callable[[], float] | None, dict[str, Any]]:
    """How a call of the kernel is timed, and its error; None, and why, where it does not take the call."""
    # A call that is an operator needs no compiler around it; flex is made by one, and so is what a mask becomes.
    own = inner if name == "flex" or given[3] is not None else "eager"
    backend = with_backend(name, inner=own, numerics=Numerics.QUANTISED.name.lower())
    compiled = torch.compile(attention, backend=backend, fullgraph=True, dynamic=False)
    output = compiled(*given)
    (site,) = backend.report.sites
    if site.chosen is None:
        _, refused = site.refusals[0]
        return None, {"failed": f"{refused.code.value}: {refused.detail}"}
    query, key, value = (each.transpose(1, 2) for each in given[:3])
    mask = None if given[3] is None else given[3][:, None, None, :]
    error = reference(site.call, query, key, value, mask).error(output.transpose(1, 2))
    del output
    first = min(milliseconds(device, lambda: compiled(*given)) for _ in range(3))
    calls = max(1, min(20, round(10 / first)))

    def timed() -> float:
        return milliseconds(device, lambda: compiled(*given), calls)

    return timed, {"error": error}
