"""Runs of a model that are to be compared: from one state, by their floating outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..graphs.tracing import AttributesOf
from ..graphs.trees import leaves


@contextmanager
def same_state(model: Any) -> Iterator[None]:
    """Restores the random state and the model's attributes at its end, so that every run draws the same random numbers."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(list(devices)), AttributesOf(model):
        yield


def floating(output: Any) -> list[Tensor]:
    """The floating tensors in the output of a model."""
    given = output if not hasattr(output, "to_tuple") else output.to_tuple()
    return [each.detach() for each in leaves(given) if isinstance(each, Tensor) and each.is_floating_point()]
