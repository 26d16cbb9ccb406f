"""Interleaved rounds and the machine's matmul rate, for both levels of the benchmark (kernels and models)."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping

import torch

from ...measuring.timing import Stopwatch

# Sizes of square matmuls. Several, because the rate of a GPU at its power limit falls with the length of the call.
CEILING = {"cuda": (4096, 8192, 16384), "cpu": (1024,)}


def in_turn(timed: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Runs all functions once in each round, each round in another order. Returns their values by name, one for each round."""
    order, generator = list(timed), random.Random(0)
    found: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        generator.shuffle(order)
        for name in order:
            found[name].append(timed[name]())
    return found


def by_rounds(base: list[float], other: list[float]) -> float:
    """The median over rounds of base / other. Load that changes only between rounds cancels out."""
    return statistics.median(one / two for one, two in zip(base, other, strict=True))


def matmul_rate(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """TFLOP/s of a square matmul, by size, as the median of several calls. No attention of that dtype can be faster."""
    rates, watch = {}, Stopwatch(device)
    for size in CEILING.get(device.type, CEILING["cpu"]):
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        found = [watch.sample(lambda left=left, right=right: left @ right, 3) for _ in range(7)]  # type: ignore[misc]
        rates[str(size)] = 2 * size**3 / statistics.median(found[2:]) / 1e12
    return rates


def words(error: BaseException) -> str:
    """An error as one line of a table, without Dynamo's wrapping error."""
    error = getattr(error, "inner_exception", None) or error
    if type(error).__module__.startswith("torch._dynamo") and error.__cause__ is not None:
        error = error.__cause__  # the error that the model's own code raised while traced
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
