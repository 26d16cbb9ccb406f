"""Graph modules and exported programs, copied and put together anew."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature
from torch.fx import GraphModule


def copied(module: GraphModule) -> GraphModule:
    """A copy whose graphs may be changed. Tensors, and the fake values of nodes, are shared."""
    memo: dict[int, Any] = {}
    for each in module.modules():
        for tensor in (*each._parameters.values(), *each._buffers.values(), *vars(each).values()):
            if isinstance(tensor, torch.Tensor):
                memo[id(tensor)] = tensor
    with _without_own_warnings():
        return copy.deepcopy(module, memo)


def updated(
    program: ExportedProgram,
    module: GraphModule,
    signature: ExportGraphSignature,
    state: dict[str, Any] | None = None,
) -> ExportedProgram:
    """A program of another graph, or other weights, that is the same otherwise; the verifier has seen it."""
    with _without_own_warnings():
        made: ExportedProgram = program._update(module, signature, state_dict=state)
    if hasattr(program, "_guards_code"):  # not in every version
        made._guards_code = program._guards_code
    return made


@contextmanager
def _without_own_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")  # 2.11 to 2.13
        yield
