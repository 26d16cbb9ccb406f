"""A graph of Dynamo as aten operators, above autograd: one spelling for each operation, with a schema that says what it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext
from torch.fx import Graph, GraphModule, Interpreter, Node

from .emitting import same_autocast
from .nodes import fake_mode_of, is_fake, value_of

_SOURCE = "_dynamo_source"  # AOTAutograd asks each input of a graph of Dynamo for the variable that it comes from


def lowered(module: GraphModule) -> GraphModule | None:
    """A new graph of the aten operators that a graph calls, with the same inputs and outputs. SDPA, linear, norms and other
    composite operators stay whole. Nodes keep the modules and the source lines that they come from, and have their value
    under "example_value". None for a graph without a tensor input.

    Raises the errors of tracing, for a graph with an operation that cannot be traced.
    """
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.traceback import preserve_node_meta

    inputs = module.graph.find_nodes(op="placeholder")
    given = [value_of(node) for node in inputs]
    mode = next((fake_mode_of(value) for value in given if fake_mode_of(value) is not None), None)
    if mode is None:
        return None

    def run(*values: Any) -> Any:
        with preserve_node_meta():
            return _Regions(module).run(*values)

    with mode, enable_python_dispatcher(), same_autocast(), _traced_by(mode):
        result: GraphModule = make_fx(run, pre_dispatch=True, _allow_non_fake_inputs=True)(*given)
    for node in result.graph.nodes:
        node.meta["example_value"] = node.meta.pop("val", None)
    for new, old in zip(result.graph.find_nodes(op="placeholder"), inputs, strict=True):
        new.meta = dict(old.meta)
        new.meta["example_value"] = value_of(old)
        new.target = old.name
    for node in result.graph.find_nodes(op="get_attr"):
        held = _held(result, node)
        if isinstance(held, torch.Tensor) and not is_fake(held):
            node.meta["example_value"] = mode.from_tensor(held, static_shapes=True)
    return result


@contextmanager
def _traced_by(mode: Any) -> Iterator[None]:
    """Dynamo gives a backend a fake mode of its own beside that of the graph's values. Torch 2.9 refuses to make a tensor of
    numbers where the two differ."""
    context = TracingContext.try_get()
    if context is None:
        yield
        return
    before, context.fake_mode = context.fake_mode, mode
    try:
        yield
    finally:
        context.fake_mode = before


class _Regions(Interpreter):
    """Runs a graph in its regions of autocast. make_fx only notes where they begin and end (2.9 to 2.15), so that what is
    inside would get the dtype that it has outside."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self._entered: list[torch.autocast] = []

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_function(target, args, kwargs)
        if target is torch.amp.autocast_mode._enter_autocast:
            with torch._C.DisableTorchFunction():
                self._entered.append(torch.autocast(*args).__enter__())
        elif target is torch.amp.autocast_mode._exit_autocast:
            with torch._C.DisableTorchFunction():
                self._entered.pop().__exit__(None, None, None)
        return result


def _held(module: GraphModule, node: Node) -> Any:
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def moved_into(module: GraphModule, graph: Graph, owner: GraphModule) -> None:
    """Gives `module` the graph `graph`, whose constants are attributes of `owner`. What else PyTorch has noted at the module
    stays."""
    constants: dict[str, str] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            if node.target not in constants:
                constants[node.target] = f"attnrewrite_constant_{len(constants)}"
                setattr(module, constants[node.target], _held(owner, node))
            node.target = constants[node.target]
    old = module.graph.find_nodes(op="output")[0]
    graph.find_nodes(op="output")[0].meta |= old.meta
    for new, old in zip(graph.find_nodes(op="placeholder"), module.graph.find_nodes(op="placeholder"), strict=True):
        if (source := getattr(old, _SOURCE, None)) is not None:
            setattr(new, _SOURCE, source)
    module.graph = graph
    graph.lint()
    module.recompile()
