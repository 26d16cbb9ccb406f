"""What a graph writes into, and what it computes for nobody: a tensor read before a write may hold other values after it, and
a node that nothing reads may go."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Set
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .nodes import value_of
from .operators import draws_random_numbers, is_higher_order, is_operator, is_packet, is_pytorchs
from .spellings import name_of, same_shape, writes_in_place
from .trees import leaves

_WRITES = frozenset(
    {"setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "ilshift",
     "irshift"}
)  # fmt: skip
_WRITING_METHODS = frozenset(f"__{name}__" for name in _WRITES)
# In-place methods that change a tensor's shape, strides or storage, not its elements.
RESHAPES = frozenset(
    {
        "unsqueeze_",
        "squeeze_",
        "t_",
        "transpose_",
        "swapaxes_",
        "swapdims_",
        "resize_",
        "resize_as_",
        "as_strided_",
        "set_",
    }
)

# Higher-order operators that write into none of their arguments: flex refuses functions that would.
_READERS = frozenset({torch.ops.higher_order.flex_attention})

CHECK = "_assert_tensor_metadata"  # torch.export writes one after each cast


def written_by(node: Node) -> tuple[Node, ...]:
    """The arguments that a node may write into: `fill_`, `x[i] = y`, `x += y`, `out=`, `inplace=True`,
    `torch._foreach_mul_`, an op whose schema says so. An unknown function counts as writing into all of its arguments."""
    return tuple(leaf for argument in _written_by(node) for leaf in _nodes(argument))


def changed_in_place(node: Node) -> Node | None:
    """The first argument of a node, where PyTorch's own function changes its elements in their places, and returns it:
    `x.fill_(0)`, `x *= y`. None for any other node: an unknown function may write into its argument and return another view
    of it."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or name_of(node) in RESHAPES | {"", "setitem"} or written_by(node) != (source,):
        return None
    before, after = value_of(source), value_of(node)
    both = isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)
    return source if both and storage_of(before) == storage_of(after) and same_shape(before, after) else None


def written_storages(graph_module: GraphModule) -> set[int]:
    """The storages (`storage_of`) that some node writes into."""
    found = {storage_of(value_of(target)) for node in graph_module.graph.nodes for target in written_by(node)}
    return {storage for storage in found if storage is not None}


def storage_of(value: Any) -> int | None:
    """A number that identifies the storage of a tensor; views share it. None for a value without a storage of its own."""
    if not isinstance(value, torch.Tensor):
        return None
    try:
        storage: int = value.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse, or wrapped by torch.func
        return None
    return storage


def unread(graph_module: GraphModule) -> frozenset[Node]:
    """The nodes that compute tensors for nobody: nothing reads them but other such nodes. Only PyTorch's own functions that
    draw no random numbers, and write into nothing but tensors that the graph makes and nobody reads: without them the graph
    does the same."""
    of_storage = _nodes_by_storage(graph_module)
    own = {storage for storage, nodes in of_storage.items() if all(map(_is_made_here, nodes))}
    while True:
        found: set[Node] = set()
        for node in reversed(graph_module.graph.nodes):
            read = [user for user in node.users if user not in found and (user.users or name_of(user) != CHECK)]
            if not read and _only_computes(node, own):
                found.add(node)
        # What is written is read through each node that shows it.
        kept = {storage for storage in own if all(node in found for node in of_storage[storage])}
        if kept == own:
            return frozenset(found)
        own = kept


def _nodes_by_storage(graph_module: GraphModule) -> dict[int, list[Node]]:
    """The nodes that show, or write into, each storage that is written into."""
    found: dict[int, list[Node]] = {storage: [] for storage in written_storages(graph_module)}
    for node in graph_module.graph.nodes if found else ():
        shown = [value_of(node), *map(value_of, written_by(node))]
        for storage in {storage_of(each) for value in shown for each in leaves(value)} & found.keys():
            found[storage].append(node)  # type: ignore[index]
    return found


def _is_made_here(node: Node) -> bool:
    """Whether a node is a function of PyTorch's own that changes no tensor's place in memory."""
    return node.op in ("call_function", "call_method") and name_of(node) not in RESHAPES | {""}


def _only_computes(node: Node, own: Set[int]) -> bool:
    """Whether a node does nothing but compute tensors, by a function of PyTorch's own, and write into storages of `own`."""
    name, written = name_of(node), written_by(node)
    made = leaves(value_of(node))
    if not name or (not made and not written) or draws_random_numbers(name):
        return False
    if not all(isinstance(each, torch.Tensor) or (written and each is None) for each in made):
        return False
    return all(storage_of(value_of(each)) in own for each in written)


def unread_behind(nodes: Iterable[Node], unread: Set[Node]) -> tuple[Node, ...]:
    """The nodes of `unread` that read any of `nodes`, directly or through others."""
    found: dict[Node, None] = {}
    waiting = list(nodes)
    while waiting:
        for user in waiting.pop().users:
            if user in unread and user not in found:
                found[user] = None
                waiting.append(user)
    return tuple(found)


class Writes:
    """The positions of a graph's nodes, and the tensors that each of them writes into."""

    def __init__(self, graph_module: GraphModule) -> None:
        self.position: dict[Node, int] = {}
        self._writers: dict[int, list[Node]] = {}
        self._edits: dict[Node, list[Node]] = {}
        for position, node in enumerate(graph_module.graph.nodes):
            self.position[node] = position
            for target in written_by(node):
                self._edits.setdefault(target, []).append(node)
                if (storage := storage_of(value_of(target))) is not None:
                    self._writers.setdefault(storage, []).append(node)

    def current(self, node: Node, reader: Node) -> Node:
        """The node that computed the value of `node` as `reader` reads it: after `x.mul_(2)`, the node of mul_."""
        before = [edit for edit in self._edits.get(node, ()) if self.position[edit] < self.position[reader]]
        return before[-1] if before else node

    def last(self, node: Node, reader: Node) -> Node | None:
        """The last node between `node` and `reader` that writes into a part or a view of the value of `node`; None if nothing
        does, or if the last write is one into the whole of `node` itself, as `current` returns it."""
        start, end = self.position[node], self.position[reader]
        found = [writer for writer in self.writers(node) if start < self.position[writer] < end]
        if not found or (found[-1] is self.current(node, reader) and name_of(found[-1]) not in ("setitem", "copy_")):
            return None
        return found[-1]

    def writers(self, node: Node) -> list[Node]:
        """All nodes that write into the storage of a node's value."""
        storage = storage_of(value_of(node))
        return [] if storage is None else self._writers.get(storage, [])

    def unchanged(self, node: Node, reader: Node, later: Node) -> bool:
        """Whether `later` reads the same value from `node` as `reader` did."""
        start, end = self.position[reader], self.position[later]
        return not any(start < self.position[writer] < end for writer in self.writers(node))


def _nodes(argument: Any) -> list[Node]:
    if argument is None or isinstance(argument, Node):
        return [] if argument is None else [argument]
    return [leaf for leaf in leaves(argument, is_leaf=lambda leaf: isinstance(leaf, Node)) if isinstance(leaf, Node)]


def _written_by(node: Node) -> Iterator[Any]:
    if node.op == "call_method":
        name = str(node.target)
        if writes_in_place(name) or name in _WRITING_METHODS:
            yield node.args[0]
    elif node.op == "call_module":
        owner = node.graph.owning_module
        module = owner.get_submodule(str(node.target)) if owner is not None else None
        # PyTorch's modules show by `inplace` whether they write. The input check of `ExportedProgram.module()` is one of them.
        if not type(module).__module__.startswith("torch.") or getattr(module, "inplace", False):
            yield from (*node.args, *node.kwargs.values())
    elif node.op == "call_function":
        yield from _written_by_function(node.target, node.args, node.kwargs)


def _written_by_function(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    if is_operator(target):
        yield from _written_by_schema(target._schema, args, kwargs)
    elif is_packet(target):
        for overload in target.overloads():
            yield from _written_by_schema(getattr(target, overload)._schema, args, kwargs)
    elif target in _READERS:
        return
    elif is_higher_order(target) or not is_pytorchs(target):  # it may write anywhere
        yield from (*args, *kwargs.values())
    else:
        name = getattr(target, "__name__", "")
        if (
            name in _WRITES
            or (writes_in_place(name) and not _is_operator(target))
            or _says_inplace(target, args, kwargs)
        ):
            yield args[0] if args else next(iter(kwargs.values()))
        yield kwargs.get("out")


def _written_by_schema(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield kwargs.get(argument.name, args[position] if position < len(args) else None)


def _is_operator(target: Any) -> bool:
    """Whether a function is from the module `operator`: its and_, or_ and not_ write nothing, in spite of their names."""
    return getattr(target, "__module__", "") in ("_operator", "operator")


def _says_inplace(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if "inplace" in kwargs:
        return bool(kwargs["inplace"])
    if not any(each is True for each in args):  # `is`: the number 1 is not a flag
        return False
    try:
        return bool(inspect.signature(target).bind(*args, **kwargs).arguments.get("inplace", False))
    except (TypeError, ValueError):  # a builtin without a signature, none of which has `inplace`
        return False
