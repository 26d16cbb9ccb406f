"""The memory layouts of a package's inputs. AOTInductor compiles the strides of the example inputs into its code and does not
check the strides of a call (2.13): it silently reads an input with other strides wrongly. Such inputs are therefore copied.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from ..graphs.exported import updated
from ..graphs.nodes import value_of, values_only
from ..graphs.sizes import always
from ..graphs.trees import flattened, in_order, mapped, structure_of, unflattened
from .programs import copy_of

Layout = dict[str, list[int]]


def layouts_of(program: ExportedProgram) -> str:
    """Returns the layouts of all tensor inputs as JSON: {"order": dimensions, outermost first} for a tensor without gaps in
    memory, else {"strides": ...}. Raises `ValueError` for an input with gaps and symbolic sizes."""
    users = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    tensors = [(name, value_of(nodes[name])) for name in users if name in nodes]
    return json.dumps([_layout(name, value) for name, value in tensors if isinstance(value, torch.Tensor)])


def without_overlaps(program: ExportedProgram) -> ExportedProgram:
    """Returns the program for inputs that have memory of their own for each element, as `contiguous` gives them. AOTInductor's
    code would read one element of an example made by `expand`, whatever a call gives."""
    users = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT}
    module = copy_of(program.graph_module)
    found = [
        node for node in module.graph.find_nodes(op="placeholder")
        if node.name in users and _overlaps(value_of(node))
    ]  # fmt: skip
    if not found:
        return program
    for node in found:
        value = value_of(node)
        with values_only(value):
            node.meta["val"] = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    made = updated(program, module, program.graph_signature)
    made.example_inputs = mapped(lambda leaf: leaf.contiguous() if _overlaps(leaf) else leaf, program.example_inputs)
    return made


def _overlaps(value: Any) -> bool:
    """Whether several elements of a tensor lie at one place: those along an expanded dimension."""
    return isinstance(value, torch.Tensor) and any(
        isinstance(stride, int) and stride == 0 and not (isinstance(size, int) and size <= 1)
        for size, stride in zip(value.shape, value.stride(), strict=True)
    )


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
