"""Measures kernels by shape: one attention for each shape, with every kernel that takes it, in turn, beside the matmul rate.

Measured as by `attnrewrite.tune` (measuring/measure_site.py): a kernel runs in a compiled graph as it would in a model, with
the packing of its mask and the padding of its head dim. Tensors have random values and the memory layout (batch, length, heads,
dim), as in diffusers. Key padding hides one key in 16. Nothing needs a gradient.

ms      the time of the kernel (on a GPU: its GPU time alone), the median of rounds in turn; a single sample for a kernel that
        is far slower than the fastest
tflops  2 * batch * heads * q_len * kv_len * (head_dim + value_dim) / time. Hidden keys count; quantisation and packing are part
        of the time
host    on a GPU, milliseconds for the host to launch the kernel from compiled code
error   the relative error to float64 on the same tensors, of at most 256 queries of each head
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...entrances.choices import candidates_of, make_policy
from ...graphs.inner_compilers import Inner
from ...graphs.nodes import dtype_name
from ...kernels.calls import AttentionCall, Mask, MaskKind
from ...kernels.decisions import Refused
from ...kernels.records import Numerics
from ...measuring.example_tensors import example
from ...measuring.measure_site import Say, measure_site, silent
from ...measuring.search import Search
from ...planning.measurements import Measurement
from ...planning.planner import make_plan
from ...planning.registry import records_of
from ...planning.sites import Site
from ...planning.this_machine import machine_of
from ...planning.usable import usable


@dataclass(frozen=True)
class Shape:
    """The sizes of one attention."""

    batch: int
    heads: int
    q_len: int
    kv_len: int
    dim: int  # of query, key and value
    padded: bool = False  # with a boolean mask (batch, 1, 1, kv_len)
    window: int = 0  # a query sees so many keys, half of them before its own position; 0: all keys
    documents: bool = False  # a query sees the keys of its own document, one of four (measuring/example_tensors.py)
    kv_heads: int = 0  # 0: as many as heads
    line: str = ""  # the panel of the plot in which this shape is a point of a line; "": a named shape

    def call(self, name: str, device: str, dtype: str) -> AttentionCall:
        mask = Mask(MaskKind.KEY_PADDING, "bool", (self.batch, 1, 1, self.kv_len)) if self.padded else Mask()
        if self.window:
            ends = (self.window // 2, self.window // 2)
            mask = Mask(MaskKind.SLIDING_WINDOW, "bool", (self.q_len, self.kv_len), window=ends)
        if self.documents:
            mask = Mask(MaskKind.BLOCKS, "bool", (self.batch, 1, self.q_len, self.kv_len))
        role = "self" if self.q_len == self.kv_len else "cross"
        return AttentionCall(
            name, self.batch, self.heads, self.kv_heads or self.heads, self.q_len, self.kv_len, self.dim, self.dim, dtype,
            device, mask, layout="bshd", role=role,
        )  # fmt: skip


# Shapes of published denoisers, and lengths at both sides of the limits of "auto" (attnrewrite/planning/preferences.py).
NAMED = {
    "FLUX.1": Shape(1, 24, 4608, 4608, 128),
    "FLUX.1, batch 2": Shape(2, 24, 4608, 4608, 128),
    "1,024 tokens of 128": Shape(2, 24, 1024, 1024, 128),
    "2,048 tokens of 128": Shape(2, 24, 2048, 2048, 128),
    "4,096 tokens of 128, 12 heads": Shape(1, 12, 4096, 4096, 128),
    "Wan2.1 14B": Shape(1, 40, 32760, 32760, 128),
    "Wan2.1 1.3B": Shape(1, 12, 32760, 32760, 128),
    "Wan2.1 14B, cross": Shape(1, 40, 32760, 512, 128),
    "SD3.5-large": Shape(2, 38, 4429, 4429, 64),
    "SDXL, 4,096": Shape(2, 10, 4096, 4096, 64),
    "SDXL, 1,024": Shape(2, 20, 1024, 1024, 64),
    "SDXL, cross": Shape(2, 10, 4096, 77, 64),
    "LTX-Video": Shape(2, 32, 6144, 6144, 64),
    "CogVideoX": Shape(2, 48, 17776, 17776, 64),
    "Lumina-Image 2": Shape(2, 24, 4352, 4352, 96, kv_heads=8),
    "HunyuanVideo, padded": Shape(1, 24, 32896, 32896, 128, padded=True),
    "Qwen-Image, padded": Shape(2, 24, 7145, 7145, 128, padded=True),
    "4,096 tokens of 128, padded": Shape(2, 24, 4096, 4096, 128, padded=True),
    "16,384 tokens of 128, padded": Shape(1, 24, 16384, 16384, 128, padded=True),
    "6,144 tokens of 64, padded": Shape(2, 32, 6144, 6144, 64, padded=True),
    "Lumina-Image 2, padded": Shape(2, 24, 4352, 4352, 96, padded=True, kv_heads=8),
    "LTX-Video, cross, padded": Shape(2, 32, 6144, 128, 64, padded=True),
    # Temporal attention of video UNets: the pixels are the batch, the frames the sequence.
    "SVD, frames of 72 x 128": Shape(18432, 5, 14, 14, 64),
    "SVD, frames of 36 x 64": Shape(4608, 10, 14, 14, 64),
    "SVD, frames of 18 x 32": Shape(1152, 20, 14, 14, 64),
    "AnimateDiff, 40 wide": Shape(8192, 8, 16, 16, 40),
    "AnimateDiff, 80 wide": Shape(2048, 8, 16, 16, 80),
    "AnimateDiff, 160 wide": Shape(512, 8, 16, 16, 160),
    "4,096 sequences of 16, 128 wide": Shape(4096, 8, 16, 16, 128),
    "70,000 sequences of 16": Shape(70000, 8, 16, 16, 64),
    "300,000 sequences of 8": Shape(300000, 8, 8, 8, 64),
    "1,000 sequences of 8": Shape(1000, 8, 8, 8, 64),
    "18,432 sequences of 32": Shape(18432, 5, 32, 32, 64),
    "70,000 sequences of 48": Shape(70000, 8, 48, 48, 64),
    "4,608 sequences of 64": Shape(4608, 10, 64, 64, 64),
    "4,608 sequences of 65": Shape(4608, 10, 65, 65, 64),
    "2,304 sequences of 32, 160 wide": Shape(2304, 8, 32, 32, 160),
    "2,304 sequences of 48, 160 wide": Shape(2304, 8, 48, 48, 160),
    "one query": Shape(2, 24, 1, 32760, 128),
    "32,760 tokens, a window of 1,024": Shape(1, 40, 32760, 32760, 128, window=1024),
    "32,760 tokens, a window of 4,096": Shape(1, 12, 32760, 32760, 128, window=4096),
    "17,776 tokens of 64, a window of 1,024": Shape(2, 48, 17776, 17776, 64, window=1024),
    "4,096 tokens of 64, a window of 256": Shape(2, 10, 4096, 4096, 64, window=256),
    "32,760 tokens, documents": Shape(1, 40, 32760, 32760, 128, documents=True),
}
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
LINES = {
    f"{length:,} of {dim}": Shape(1, 24, length, length, dim, line=f"1 x 24 heads of {dim}")
    for dim in (64, 128)
    for length in LENGTHS
}
SHAPES = NAMED | LINES
SMALL = {
    "tiny": Shape(2, 3, 33, 33, 16),
    "tiny, padded": Shape(2, 3, 20, 27, 16, padded=True),
    "tiny, documents": Shape(2, 3, 20, 20, 16, documents=True),
    **{f"{length} of 16": Shape(1, 2, length, length, 16, line="1 x 2 heads of 16") for length in (16, 64)},
}


def kernels(names: Iterable[str], device: torch.device) -> tuple[list[str], dict[str, str]]:
    """Returns the kernels that run on this machine, and kernel -> reason for the others."""
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
    name: str, shape: Shape, names: Sequence[str], device: torch.device, dtype: torch.dtype, inner: Inner = "inductor",
    say: Callable[[str], object] = print, progress: Say = silent,
) -> dict[str, Any]:  # fmt: skip
    """Measures the kernels `names` at one shape and returns its record. progress: gets what is measured now.

    The record has
    "call": the attention call
    "kernels": kernel -> {"ms", "tflops", "error", ...}, or {"failed": reason}
    "choices": the kernels that `auto` and `tune` choose, with and without quantised and sparse kernels

    First the kernels that only round take turns, then the quantised ones with `native` and the best so far, then, likewise, the
    sparse ones.
    """
    torch.compiler.reset()
    machine = machine_of(device)
    call = shape.call(name, device.type, dtype_name(dtype))
    exact = [name for name in names if not quantised(name)]

    def found(candidates: Iterable[str], numerics: Numerics) -> Site:
        ordered = candidates_of(list(dict.fromkeys(["native", *candidates])), "kernels")
        return measure_site(captured, machine, Search(ordered, numerics, inner=inner), progress)

    with torch.no_grad():
        captured = example(call, device)
        site = found(exact, Numerics.REORDERED)
        rows = _rows(site, exact)
        choices = {"tuned": site.chosen}
        for numerics in (Numerics.QUANTISED, Numerics.SPARSE):
            if others := [name for name in names if class_of(name) is numerics]:
                site = found([site.chosen or "native", *others], numerics)
                rows |= _rows(site, others)
                choices[f"tuned, {numerics.word}"] = site.chosen
    for choice, allowed in (("auto", "reordered"), ("auto, quantised", "quantised")):
        choices[choice] = make_plan([call], make_policy(["auto"], numerics=allowed), [machine]).sites[0].chosen
    record = {"call": call.to_dict(), "line": shape.line, "kernels": rows, "choices": choices}
    show(record, say)
    return record


def to_best(record: dict[str, Any], choice: str) -> float | None:
    """The time of the chosen kernel divided by the time of the fastest kernel that the choice allows; None if the chosen kernel
    was not timed. The time of a call is at least the host's time to launch it."""
    rows = record["kernels"]
    allowed = next((each for each in Numerics if choice.endswith(each.word)), Numerics.REORDERED)
    able = [name for name in rows if class_of(name) <= allowed]
    times = {name: max(rows[name]["ms"], rows[name].get("host") or 0.0) for name in able if "ms" in rows[name]}
    chosen = record["choices"].get(choice)
    return times[chosen] / min(times.values()) if chosen in times else None


def class_of(name: str) -> Numerics:
    """The class of a kernel. A kernel without a record here, as of a plug-in elsewhere, counts as exact."""
    try:
        return records_of(name)[0].numerics
    except ValueError:
        return Numerics.EXACT


def quantised(name: str) -> bool:
    """Whether a kernel is quantised or sparse."""
    return class_of(name).is_inexact


def _rows(site: Site, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    measured = {each.name: each for each in site.measured}
    decided = dict(site.decisions)
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        decision = decided.get(name)
        if name in measured:
            rows[name] = _row(measured[name], site.call)
        elif isinstance(decision, Refused):
            rows[name] = {"failed": f"{decision.code.value}: {decision.detail}"}
    return rows


def _row(found: Measurement, call: AttentionCall) -> dict[str, Any]:
    if found.milliseconds is None:
        return {"failed": found.dropped}
    ms = found.milliseconds
    row: dict[str, Any] = {
        "ms": ms, "tflops": products(call) / ms / 1e9, "error": found.error, "spread": found.spread, "rounds": found.rounds,
    }  # fmt: skip
    row |= {"host": found.host} if found.host else {}
    return row | ({"dropped": found.dropped} if found.dropped else {})


def products(call: AttentionCall) -> int:
    """The multiplications and additions of a call, whose sizes must be numbers. Hidden keys count."""
    pairs = int(call.batch) * int(call.heads) * int(call.q_len) * int(call.kv_len)
    return 2 * pairs * (int(call.head_dim) + int(call.value_dim))


def show(record: dict[str, Any], say: Callable[[str], object]) -> None:
    """Passes the table of a record to `say`, line by line."""
    call = AttentionCall.from_dict(record["call"])
    sizes = " ".join(f"{size:,}" for size in (call.batch, call.heads, call.q_len, call.kv_len, call.head_dim))
    say(f"\n{call.site}: ({sizes}), mask {call.mask}, {call.dtype}")
    for name, row in sorted(record["kernels"].items(), key=lambda item: float(item[1].get("ms", "inf"))):
        if "failed" in row:
            say(f"  {name:34} {row['failed']}")
        else:
            said = f"  {name:34} {row['ms']:9.3f} ms  {row['tflops']:7.4g} TFLOP/s  error {row['error']:.1e}"
            say(said + (f"  ({row['dropped']})" if "dropped" in row else ""))
    native = record["kernels"].get("native", {}).get("ms")
    for choice, kernel in record["choices"].items():
        ratio, ms = to_best(record, choice), record["kernels"].get(kernel, {}).get("ms")
        said = f"  {choice}: {kernel}" + (
            "" if ratio is None else f", {ratio:.3f} times the time of the fastest kernel"
        )
        say(said + (", slower than native" if native and ms and ms > 1.02 * native else ""))
