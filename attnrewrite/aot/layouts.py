"""The memory layouts of a package's inputs. AOTInductor compiles the strides of the example inputs into its code and does not
check the strides of a call (2.13): it silently reads an input with other strides wrongly. Such inputs are therefore copied.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from ..graphs.nodes import value_of
from ..graphs.sizes import always
from ..graphs.trees import flattened, in_order, structure_of, unflattened

Layout = dict[str, list[int]]


def layouts_of(program: ExportedProgram) -> str:
    """Returns the layouts of all tensor inputs as JSON: {"order": dimensions, outermost first} for a tensor without gaps in
    memory, else {"strides": ...}. Raises `ValueError` for an input with gaps and symbolic sizes."""
    users = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    tensors = [(name, value_of(nodes[name])) for name in users if name in nodes]
    return json.dumps([_layout(name, value) for name, value in tensors if isinstance(value, torch.Tensor)])


def _layout(name: str, tensor: torch.Tensor) -> Layout:
    strides = [_hint(stride) for stride in tensor.stride()]
    order = sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim))
    if all(always(a == b) or _hint(size) == 1 for a, b, size in zip(
        tensor.stride(), dense_strides(tensor.shape, order), tensor.shape, strict=True
    )):  # fmt: skip
        return {"order": order}
    if not all(isinstance(stride, int) for stride in tensor.stride()):
        raise ValueError(
            f"input {name!r} has strides {tuple(map(str, tensor.stride()))}, which leave gaps between its elements, and "
            "symbolic sizes: export with an example input without gaps, as .contiguous() returns it"
        )
    return {"strides": strides}


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def dense_strides(shape: Any, order: list[int]) -> list[Any]:
    """Returns the strides of a tensor without gaps. order: its dimensions, outermost first."""
    strides: list[Any] = [1] * len(order)
    step: Any = 1
    for dim in reversed(order):
        strides[dim] = step
        step = step * shape[dim]
    return strides


def laid_out(tensor: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Returns the tensor, or a copy in the layout of the example. Returns a tensor of another rank: the checks refuse it."""
    (of_example,) = layout.values()
    if tensor.dim() != len(of_example):
        return tensor
    strides = layout["strides"] if "strides" in layout else dense_strides(tensor.shape, layout["order"])
    same = (have == want or size == 1 for have, want, size in zip(tensor.stride(), strides, tensor.shape, strict=True))
    if all(same):
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


class Layouts:
    """Copies the arguments of a call to the layouts of a package where they differ."""

    def __init__(self, text: str | bytes, model: Any) -> None:
        self._layouts: list[Layout] = json.loads(text)
        self._structure = structure_of(model.loader.get_call_spec()[0])

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        leaves, structure = flattened((args, in_order(kwargs, self._structure)))
        given = sum(isinstance(leaf, torch.Tensor) for leaf in leaves)
        if given != len(self._layouts):
            raise TypeError(
                f"the package takes {len(self._layouts)} tensors, the call has {given}: call it as it was compiled"
            )
        layouts = iter(self._layouts)
        leaves = [laid_out(leaf, next(layouts)) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        moved: tuple[tuple[Any, ...], dict[str, Any]] = unflattened(leaves, structure)
        return moved
