"""Copies graph modules, and rebuilds exported programs."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature
from torch.fx import GraphModule


def copied(module: GraphModule) -> GraphModule:
    """A copy whose graphs may be changed. It shares tensors and the fake values of nodes with the original."""
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
    """The program with another graph or other weights, checked by PyTorch's verifier; everything else stays."""
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


def fake_of_check(operator: Any, text: str) -> Callable[..., None]:
    """What an operator without outputs does with fake tensors: nothing. Registered as its decomposition too, it makes
    torch.onnx.export leave the operator out, with a warning (2.9 to 2.15). run_decompositions and Inductor do not take it.

    With CI in the environment, Inductor raises for an operator that has a decomposition and no lowering (`make_fallback` in
    torch/_inductor/lowering.py), unless its list of exceptions has the name. Whoever compiles has imported Inductor before
    the operator sees fake tensors, so that nothing is imported here.
    """

    def nothing(*_: Any, **__: Any) -> None:
        if torch.onnx.is_in_onnx_export():
            warnings.warn(text, stacklevel=2)
        lowering = sys.modules.get("torch._inductor.lowering")
        if lowering is not None:
            lowering.FALLBACK_ALLOW_LIST.add(operator.name())

    torch._decomp.decomposition_table[operator] = nothing
    return nothing
