"""Runs of a model that are to be compared: from one state, by their floating outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..graphs.tracing import AttributesOf, Call
from ..graphs.trees import leaves


class Written(NamedTuple):
    """A tensor, with its contents before a call and behind it."""

    tensor: Tensor
    before: Tensor
    behind: Tensor


@contextmanager
def same_state(model: Any) -> Iterator[None]:
    """Restores the random state and the model's attributes at its end, so that every run draws the same random numbers."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(list(devices)), AttributesOf(model):
        yield


class SameContents:
    """The calls of a model, for several passes. Each pass begins with the contents that inputs and buffers had in the first,
    also where the model writes into them, and ends with those that the first pass has left.

    calls: as often as they are read the same ones, or with tensors of their own.
    """

    def __init__(self, model: Any, calls: Iterable[Call]) -> None:
        self._calls = calls
        self._buffers = list(model.buffers()) if isinstance(model, torch.nn.Module) else []
        self._of_model: list[Written] | None = None  # None: before the first pass
        self._of_calls: list[list[Written]] = []

    def __iter__(self) -> Iterator[Call]:
        return self._first() if self._of_model is None else self._again(self._of_model)

    def _first(self) -> Iterator[Call]:
        before = [each.clone() for each in self._buffers]
        for args, kwargs in self._calls:
            tensors = [each for each in leaves((args, kwargs)) if isinstance(each, Tensor)]
            contents = [each.detach().clone() for each in tensors]
            yield args, kwargs
            self._of_calls.append(_written(tensors, contents))
            del args, kwargs, tensors, contents
        self._of_model = _written(self._buffers, before)

    def _again(self, of_model: list[Written]) -> Iterator[Call]:
        _restore(of_model)
        try:
            for call, written in zip(self._calls, self._of_calls, strict=True):
                _restore(written)
                try:
                    yield call
                finally:
                    _redo(written)
        finally:
            _redo(of_model)


def _written(tensors: Sequence[Tensor], before: Sequence[Tensor]) -> list[Written]:
    """Those that have other contents than before."""
    pairs = zip(tensors, before, strict=True)
    return [Written(now, was, now.detach().clone()) for now, was in pairs if not _equal(now, was)]


def _equal(one: Tensor, other: Tensor) -> bool:
    """NaN equals NaN."""
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


@torch.no_grad()
def _restore(written: Sequence[Written]) -> None:
    for each in written:
        each.tensor.copy_(each.before)


@torch.no_grad()
def _redo(written: Sequence[Written]) -> None:
    for each in written:
        each.tensor.copy_(each.behind)


def floating(output: Any) -> list[Tensor]:
    """The floating tensors in the output of a model; complex ones as pairs of numbers."""
    given = output if not hasattr(output, "to_tuple") else output.to_tuple()
    found = [each.detach() for each in leaves(given) if isinstance(each, Tensor)]
    found = [torch.view_as_real(each.resolve_conj()) if each.is_complex() else each for each in found]
    return [each for each in found if each.is_floating_point()]
