"""Runs a pipeline once and keeps the calls of its denoisers at some steps.

How many steps there will be is not known before, with guidance a step has several calls, and a pipeline may have two denoisers
that share the steps. So of each denoiser the steps 0, n, 2n, ... are kept, and the latest; where that becomes too many, n
doubles. The tensors wait on the CPU, copied, since a pipeline may write into them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..graphs.modules import UNSET, implementation_of, plain_call, restore_implementation, set_implementation
from ..graphs.tracing import Call
from ..graphs.trees import mapped
from .schedules import Steps

MOST = 16  # steps of a denoiser that are kept


@dataclass(frozen=True)
class _Kept:
    """A tensor that waits on the CPU."""

    tensor: Tensor
    device: torch.device

    def back(self) -> Tensor:
        return self.tensor.to(self.device)


@dataclass
class Recorded:
    """The calls of one denoiser.

    steps: the numbers of the steps in which it was called.
    kept: the calls of a step, by the step.
    """

    steps: list[int] = field(default_factory=list)
    kept: dict[int, list[Any]] = field(default_factory=dict)
    _every: int = 1  # of its own steps one in so many is kept

    def add(self, step: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if not self.steps or self.steps[-1] != step:
            if len(self.kept) > MOST:
                self._every *= 2
            wanted = {self.steps[place] for place in range(0, len(self.steps), self._every)}
            self.kept = {known: calls for known, calls in self.kept.items() if known in wanted}
            self.steps.append(step)
        self.kept.setdefault(step, []).append(mapped(_kept, (tuple(args), dict(kwargs))))

    def at(self, places: Sequence[float]) -> list[int]:
        """The kept steps nearest to each place: 0 is this denoiser's first step, 1 its last."""
        span = self.steps[-1] - self.steps[0]
        nearest = (min(self.kept, key=lambda step: abs(step - self.steps[0] - place * span)) for place in places)
        return sorted(set(nearest))


class Calls:
    """The calls of a denoiser at some steps, on their device one at a time. May be read again."""

    def __init__(self, recorded: Recorded, steps: Sequence[int]) -> None:
        self.steps = [step for step in steps for _ in recorded.kept[step]]
        self._calls = [call for step in steps for call in recorded.kept[step]]

    def __iter__(self) -> Iterator[Call]:
        for call in self._calls:
            args, kwargs = mapped(lambda each: each.back() if isinstance(each, _Kept) else each, call)
            yield args, kwargs


def record(
    pipeline: Any, denoisers: Mapping[str, Module], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Recorded], int]:
    """Runs `pipeline(*args, **kwargs)`. Returns the calls of each denoiser that ran, and the number of all steps. Afterwards
    the denoisers are as before, also if the pipeline raises."""
    found: dict[str, Recorded] = {}
    counter, steps = Steps(pipeline), 0

    def recording(path: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            step, _ = counter.next()
            steps = max(steps, step + 1)
            found.setdefault(path, Recorded()).add(step, args, kwargs)
            return call(*args, **kwargs)

        return run

    before = {path: implementation_of(module, UNSET) for path, module in denoisers.items()}
    try:
        for path, module in denoisers.items():
            was = before[path]
            set_implementation(module, recording(path, plain_call(module) if was in (UNSET, None) else was))
        pipeline(*args, **kwargs)
    finally:
        for path, module in denoisers.items():
            restore_implementation(module, before[path])
    return found, steps


def _kept(value: Any) -> Any:
    return _Kept(value.detach().to("cpu", copy=True), value.device) if isinstance(value, Tensor) else value
