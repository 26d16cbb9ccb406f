"""The tensors that enter and leave the modules of a model, as nodes of its graph.

A graph of Dynamo says for each operation the module that runs it. It does not say which tensor was which argument. So hooks
put an identity operator, with the name of the place, on each tensor that crosses the border of a module.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.nn import Module

from .modules import named

LIBRARY = torch.library.Library("attnrewrite", "FRAGMENT")
LIBRARY.define(
    "boundary(Tensor(a) tensor, str module, str argument, int position) -> Tensor(a)", tags=torch.Tag.pt2_compliant_tag
)
LIBRARY.impl("boundary", lambda tensor, *_: tensor.view_as(tensor), "CompositeExplicitAutograd")
_META = "attnrewrite_boundary"


@dataclass(frozen=True)
class Boundary:
    """One place where tensors cross the border of a module."""

    module: str  # its path; "" for the model itself
    argument: str  # the name of a parameter of its `forward`; "" for its output
    position: int = -1  # of the tensor in a tuple or list; -1 for an argument that is a tensor; from 0 on for outputs

    @property
    def is_output(self) -> bool:
        return not self.argument

    def __str__(self) -> str:
        module = repr(self.module) if self.module else "the model"
        if self.is_output:
            return f"output {self.position} of {module}"
        part = f"[{self.position}]" if self.position >= 0 else ""
        return f"{self.argument}{part} of {module}"


Change = Callable[[torch.Tensor, str, str, int], torch.Tensor]  # a tensor, then the fields of its Boundary


@contextmanager
def changed_at_boundaries(model: Module, change: Change) -> Iterator[None]:
    """While it is open, each tensor that enters or leaves a module below `model` goes through `change`, tensors in tuples and
    lists too. Dynamo traces `change`."""
    with ExitStack() as stack:
        for path, module in named(model):
            before, after = _hooks(path, parameters_of(module), change)
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after, prepend=True).remove)
        yield


def parameters_of(module: Module) -> tuple[str, ...]:
    """The names of the parameters of a module's `forward`, whoever replaced the method of the object."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def _hooks(path: str, names: tuple[str, ...], change: Change) -> tuple[Any, Any]:
    def before(module: Module, args: Any, kwargs: Any) -> Any:
        given = [
            _changed(value, change, path, names[at]) if at < len(names) else value for at, value in enumerate(args)
        ]
        return tuple(given), {name: _changed(value, change, path, name) for name, value in kwargs.items()}

    def after(module: Module, args: Any, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return change(output, path, "", 0)
        return _changed(output, change, path, "")

    return before, after


def _changed(value: Any, change: Change, path: str, name: str) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value, path, name, -1)
    if type(value) is tuple or type(value) is list:
        found = [
            change(each, path, name, at) if isinstance(each, torch.Tensor) else each for at, each in enumerate(value)
        ]
        return tuple(found) if type(value) is tuple else found
    return value


def mark(tensor: torch.Tensor, module: str, argument: str, position: int) -> torch.Tensor:
    """A `Change` that puts a node for the boundary into the graph."""
    marked: torch.Tensor = torch.ops.attnrewrite.boundary(tensor, module, argument, position)
    return marked


def read_marks(graph_module: GraphModule) -> None:
    """Turns each mark in a graph of operators into an alias that knows its boundary (`boundary_of`), and drops what nobody
    uses."""
    for node in graph_module.graph.find_nodes(op="call_function", target=torch.ops.attnrewrite.boundary.default):
        tensor, *place = node.args
        node.meta[_META] = Boundary(*place)
        node.target = torch.ops.aten.alias.default
        node.args = (tensor,)
    graph_module.graph.eliminate_dead_code()


def boundary_of(node: Node) -> Boundary | None:
    """The boundary at which a tensor stands; None for every other node."""
    found: Boundary | None = node.meta.get(_META)
    return found
