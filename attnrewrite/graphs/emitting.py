"""Writes plain PyTorch code into a graph by running the code on the graph's own fake tensors.

A kernel's `op` is an ordinary function of tensors. `Emitter` runs it under a `TorchFunctionMode`: each torch call becomes one
node, with the fake result as the node's value. So PyTorch itself gives the shapes, strides and dtypes of emitted nodes, and
a record needs no graph code.

An exported program may hold only operators: there, any other call becomes the aten operators into which it decomposes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .nodes import INHERITED_META, autocasting, value_key, value_of
from .notes import mark_ours
from .operators import is_higher_order, is_operator
from .trees import leaves

Places = dict[Any, tuple[Node, int | None]]  # expression of sympy -> a tensor's node and dimension, or a number's node


class Emitter(TorchFunctionMode):
    """Emits nodes into one graph. `tensor(node)` gives the fake tensor of a node, `node(tensor)` the node of a fake tensor.

    ours: whether emitted nodes are marked as put there by attnrewrite, or are the model's own (an opened function).
    """

    def __init__(self, graph_module: GraphModule, ours: bool = True) -> None:
        super().__init__()
        self.module = graph_module
        self.ours = ours
        self.graph = graph_module.graph
        self.key = value_key(graph_module)
        self._nodes: dict[int, Node] = {}
        self._kept: list[torch.Tensor] = []  # keeps the tensors alive, so that Python gives no id twice
        self._meta: dict[str, Any] = {}
        self._modules: dict[int, str] = {}
        self._symbols: dict[str, Node] = {}
        self._shared: dict[Any, Any] = {}
        self._quiet = False

    def tensor(self, node: Node) -> torch.Tensor:
        value: torch.Tensor = value_of(node)
        self._know(value, node)
        return value

    def node(self, tensor: torch.Tensor) -> Node:
        return self._nodes[id(tensor)]

    @contextmanager
    def before(
        self, node: Node, needs_grad: bool, value: torch.Tensor, autocast: Mapping[str, torch.dtype] | None = None
    ) -> Iterator[None]:
        """Emits the code inside before `node`, as part of the same module and source line.

        needs_grad: whether autograd is on inside. value: a fake tensor of `node`, which gives the fake mode. autocast: the
        device types on which autocast is on around `node`, with the dtype, for code that autocast shall change; None: none.
        """
        self._meta = {key: node.meta[key] for key in INHERITED_META if key in node.meta}
        self._symbols = {}
        fake_mode = value.fake_mode  # type: ignore[attr-defined]
        with (
            self.graph.inserting_before(node),
            torch.set_grad_enabled(needs_grad),
            autocasting(autocast),
            enable_python_dispatcher(),  # symbolic sizes need the Python meta kernels
            _no_saved_tensors(),
            fake_mode,
            self,
        ):
            yield

    @contextmanager
    def around(self, value: torch.Tensor, needs_grad: bool) -> Iterator[None]:
        """Emits the code inside at the end of the graph, under the autocast that applies there. Arguments: as of `before`."""
        with (
            torch.set_grad_enabled(needs_grad),
            same_autocast(),
            enable_python_dispatcher(),
            _no_saved_tensors(),
            value.fake_mode,  # type: ignore[attr-defined]
            self,
        ):
            yield

    def attribute(self, source: Node) -> None:
        """What is emitted from here on is part of the module and source line of `source`."""
        self._meta = {key: source.meta[key] for key in INHERITED_META if key in source.meta}

    def replay(
        self,
        source: Node,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        written: tuple[Any, Any] | None = None,
    ) -> Any:
        """Writes the call of `source` with other arguments: fake tensors and sizes in the place of nodes. Returns the fake
        result. The node is the graph's own, with the metadata of `source`.

        written: the arguments as nodes, where they are no tensors and sizes alone.
        """
        arguments = (self._arguments(args), self._arguments(kwargs)) if written is None else written
        node = self.graph.call_function(target, *arguments)
        self._quiet = True
        try:
            result = target(*args, **kwargs)
        finally:
            self._quiet = False
        node.meta |= {**source.meta, self.key: result}
        if isinstance(result, torch.Tensor):
            self._know(result, node)
        elif isinstance(result, tuple | list):
            for position, member in enumerate(result):
                if isinstance(member, torch.Tensor):
                    self._finish(self.graph.call_function(operator.getitem, (node, position)), member)
        return result

    def once(self, key: Any, build: Callable[[], Any]) -> Any:
        """Calls `build()` at the first use of `key` in this graph; later uses get the same result."""
        if key not in self._shared:
            self._shared[key] = build()
        return self._shared[key]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._quiet:
            return func(*args, **kwargs)
        if self.key == "val" and not (is_operator(func) or is_higher_order(func)):
            with _Operators(self):
                return func(*args, **kwargs)
        result = func(*args, **kwargs)
        self.write(func, args, kwargs, result)
        return result

    def write(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Writes the node of a call that returned `result`."""
        given = [result] if isinstance(result, torch.Tensor) else leaves(result)
        if not any(
            isinstance(each, torch.Tensor) and id(each) not in self._nodes for each in given
        ):  # the call asked for a size, stride or dtype, or returned one of its arguments
            return
        kind, target = _target(func)
        node = self.graph.create_node(kind, target, self._arguments(args), self._arguments(kwargs))
        self._finish(node, result)
        if not isinstance(result, torch.Tensor):  # a tuple: each member is a node of its own
            for position, member in enumerate(result):
                if isinstance(member, torch.Tensor):
                    self._finish(self.graph.call_function(operator.getitem, (node, position)), member)

    def _finish(self, node: Node, value: Any) -> None:
        self._describe(node, value)
        if isinstance(value, torch.Tensor):
            self._know(value, node)

    def statement(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Writes a call without a result, such as a check. Its arguments are nodes."""
        self._describe(self.graph.call_function(op, args, kwargs), None)

    def _describe(self, node: Node, value: Any) -> Node:
        node.meta |= {**self._meta, self.key: value}
        return mark_ours(node) if self.ours else node

    def same(self, one: torch.Tensor, other: torch.Tensor) -> None:
        """Makes `other` a second fake tensor of the node of `one`."""
        if id(other) not in self._nodes:
            self._know(other, self._nodes[id(one)])

    def _know(self, tensor: torch.Tensor, node: Node) -> None:
        self._nodes[id(tensor)] = node
        self._kept.append(tensor)

    def _arguments(self, values: Any) -> Any:
        return map_aggregate(values, self._argument)  # unlike pytree, map_aggregate looks into slices

    def _argument(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._nodes[id(value)]
        if isinstance(value, torch.SymInt | torch.SymFloat):
            return self.number(value)
        if isinstance(value, torch.nn.Module):
            return self._attribute(value)
        return value

    def _attribute(self, module: torch.nn.Module) -> Node:
        if id(module) not in self._modules:
            number = len(self._modules)
            while hasattr(self.module, f"attnrewrite_{number}"):
                number += 1
            self._modules[id(module)] = f"attnrewrite_{number}"
            self.module.add_module(f"attnrewrite_{number}", module)
        return self.graph.get_attr(self._modules[id(module)])

    def number(self, size: torch.SymInt | torch.SymFloat) -> Node | int | float:
        """A node that computes a symbolic number from the sizes of known tensors; the number itself where it is fixed."""
        known = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else size.node.maybe_as_float()
        if known is not None:
            number: int | float = known
            return number
        return self._sized(size.node.expr)

    def _sized(self, expression: Any) -> Node:
        """A node for an expression of sympy: a size as it is at hand, or arithmetic on symbols."""
        at_hand = self._at_hand()
        if expression in at_hand:
            return self._read(*at_hand[expression])
        return self._computed(expression, {symbol: self._symbol(symbol, at_hand) for symbol in expression.free_symbols})

    def _computed(self, expression: Any, symbols: dict[Any, Node]) -> Node:
        from torch.utils._sympy.interp import sympy_interp
        from torch.utils._sympy.reference import PythonReferenceAnalysis

        tracer = _Arithmetic(self.graph)
        proxies = {symbol: torch.fx.Proxy(node, tracer) for symbol, node in symbols.items()}
        node: Node = sympy_interp(PythonReferenceAnalysis, proxies, expression).node
        for step in tracer.made:
            args: Any = map_aggregate(step.args, value_of)
            self._describe(step, step.target(*args))  # type: ignore[operator]
        return node

    def _symbol(self, symbol: Any, at_hand: Places) -> Node:
        name = str(symbol)
        if name not in self._symbols:
            place = at_hand.get(symbol)
            self._symbols[name] = self._solved(symbol, at_hand) if place is None else self._read(*place)
        return self._symbols[name]

    def _solved(self, symbol: Any, at_hand: Places) -> Node:
        """A symbol of which only an affine size is at hand, `factor * symbol + rest`: an exported program with derived sizes
        may hold only 2*s + 1 for s, and a joint sequence only the sum of two lengths."""
        import sympy  # type: ignore[import-untyped]
        from torch.utils._sympy.functions import FloorDiv

        for size, place in at_hand.items():
            expanded = sympy.expand(size)
            factor = expanded.coeff(symbol)
            rest = expanded - factor * symbol
            if factor.is_Integer and factor != 0 and rest.free_symbols <= at_hand.keys():
                whole = sympy.Symbol("whole", integer=True)
                symbols = {other: self._symbol(other, at_hand) for other in rest.free_symbols}
                return self._computed(FloorDiv(whole - rest, factor), {whole: self._read(*place), **symbols})
        raise RuntimeError(f"attnrewrite: no size here holds the symbol {symbol}; please report this graph")

    def _at_hand(self) -> Places:
        """The symbolic sizes of the tensors and inputs that are known here, and the graph's own numbers, by expression."""
        inputs: list[Node] = list(self.graph.find_nodes(op="placeholder"))
        tensors = [(self._nodes[id(tensor)], tensor) for tensor in self._kept]
        tensors += [(node, value) for node in inputs if isinstance(value := value_of(node), torch.Tensor)]
        found: Places = {}
        for node, tensor in tensors:
            for dim, size in enumerate(tensor.shape):
                if isinstance(size, torch.SymInt):
                    found.setdefault(size.node.expr, (node, dim))
        for node in self.graph.nodes:
            value = value_of(node)
            # A number that depends on data stands before every tensor that has it as a size; another may stand behind.
            if isinstance(value, torch.SymInt) and (node.op == "placeholder" or not value.node.has_hint()):
                found.setdefault(value.node.expr, (node, None))
        return found

    def _read(self, node: Node, dim: int | None) -> Node:
        if dim is None:
            return node
        return self._call(torch.ops.aten.sym_size.int, (node, dim), value_of(node).shape[dim])

    def _call(self, function: Any, args: tuple[Any, ...], value: Any) -> Node:
        node = self.graph.call_function(function, args)
        return self._describe(node, value)


class _Operators(TorchDispatchMode):
    """Writes the aten operators into which a torch call decomposes, below autograd and composite operators."""

    def __init__(self, emitter: Emitter) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.emitter = emitter

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.aten.detach.default:  # autograd inserts it; it computes nothing
            self.emitter.same(args[0], result)
        else:
            self.emitter.write(func, args, kwargs, result)
        return result


class _Arithmetic(torch.fx.proxy.GraphAppendingTracer):
    """Collects the nodes that arithmetic on symbols appends to the graph."""

    def __init__(self, graph: torch.fx.Graph) -> None:
        super().__init__(graph)
        self.made: list[Node] = []

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        node = super().create_node(*args, **kwargs)
        self.made.append(node)
        return node


@contextmanager
def same_autocast() -> Iterator[None]:
    """Restores autocast at its end: a graph whose nodes run may enter a region, and fail inside it."""
    devices = [kind for kind in ("cpu", "cuda", "xpu") if torch.amp.is_autocast_available(kind)]
    before = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in devices]
    try:
        yield
    finally:
        for kind, enabled, dtype in before:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)


@contextmanager
def _no_saved_tensors() -> Iterator[None]:
    """Hides tensors saved inside from a checkpoint around the compiled function: the checkpoint counts the tensors that its
    first call saves, and fake tensors must not count."""
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        yield


def _target(func: Any) -> tuple[str, Any]:
    """The kind and target of a node: a graph calls tensor methods by name, everything else as a function."""
    name = getattr(func, "__name__", "")
    if name == "__getitem__":
        return "call_function", operator.getitem
    if getattr(torch.Tensor, name, None) is func:
        return "call_method", name
    return "call_function", func
