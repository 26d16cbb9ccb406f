"""Along which dimensions an operation treats each element by itself.

A `Row` says of one dimension of an operation's output: element i there depends, of each tensor argument, on element i of one
dimension alone, or on the whole tensor. So a rank that holds some elements of these dimensions computes the same elements of
the output, with the same call. An operation that is not in `ROWS` has no row: its arguments are gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.fx import Node

from ..graphs.axes import Axes, Dims
from ..graphs.nodes import value_of
from ..graphs.operators import arguments_of, is_operator, name_in_aten
from ..graphs.sizes import Size, always, is_one
from ..graphs.trees import leaves

WHOLE = None  # the row depends on the whole tensor
ANY = -1  # the row depends on no element of the tensor: only its dtype or device is read


@dataclass(frozen=True)
class Row:
    """One dimension along which an operation treats each element by itself."""

    output: int
    inputs: tuple[int | None, ...]  # for each tensor argument, in order: its dimension, WHOLE or ANY


@dataclass(frozen=True, eq=False)
class Call:
    """A call of an aten operator in a graph, with its arguments by name."""

    node: Node

    @cached_property
    def name(self) -> str:
        return (name_in_aten(self.node.target) or "") if is_operator(self.node.target) else ""

    @cached_property
    def arguments(self) -> dict[str, Any]:
        return arguments_of(self.node)

    @cached_property
    def tensors(self) -> tuple[Node, ...]:
        """The tensor arguments in the order of the schema, those of a list one by one."""
        nodes = leaves(list(self.arguments.values()))
        return tuple(node for node in nodes if isinstance(node, Node) and isinstance(value_of(node), torch.Tensor))

    def shape(self, position: int = 0) -> tuple[Size, ...]:
        return tuple(value_of(self.tensors[position]).shape)

    def rank(self, position: int = 0) -> int:
        return len(self.shape(position))

    @cached_property
    def output(self) -> Any:
        return value_of(self.node)

    @cached_property
    def output_shape(self) -> tuple[Size, ...]:
        """The shape of the output; of the first one, where there are several."""
        first = self.output if isinstance(self.output, torch.Tensor) else self.output[0]
        return tuple(first.shape)

    def dim(self, name: str = "dim") -> int:
        """An argument that names a dimension of the first tensor, from 0 on."""
        return int(self.arguments[name]) % max(self.rank(), 1)

    def dims(self, name: str = "dim") -> set[int]:
        """An argument that names several dimensions; none or an empty list: all of them."""
        given = self.arguments.get(name)
        listed = [given] if isinstance(given, int) else list(given or range(self.rank()))
        return {dim % max(self.rank(), 1) for dim in listed}

    def number(self, name: str) -> Any:
        """An argument that is a number, or the symbol that it is at run time."""
        return value_of(self.arguments.get(name))

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        if not is_operator(self.node.target) or not self.tensors:
            return ()
        rule = ROWS.get(self.name)
        tags = self.node.target.tags
        if rule is None and torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags:
            rule = pointwise
        if rule is None or (rule is pointwise and not isinstance(self.output, torch.Tensor)):
            return ()
        if "out" in self.arguments:
            return ()
        return tuple(row for row in rule(self) if len(row.inputs) == len(self.tensors))


Rule = Callable[[Call], Iterator[Row]]


def pointwise(call: Call) -> Iterator[Row]:
    """Arguments broadcast to the output."""
    out = call.output_shape
    for dim, size in enumerate(out):
        if is_one(size):
            continue
        inputs = []
        for position in range(len(call.tensors)):
            shape = call.shape(position)
            at = dim - (len(out) - len(shape))
            inputs.append(WHOLE if at < 0 or is_one(shape[at]) else at)
        yield Row(dim, tuple(inputs))


def like_first(call: Call) -> Iterator[Row]:
    """The output has the dimensions of the first tensor; of the others only the dtype is read."""
    for dim in range(call.rank()):
        yield Row(dim, (dim, *[ANY] * (len(call.tensors) - 1)))


def dropout(call: Call) -> Iterator[Row]:
    # What is dropped is drawn for each element: a rank alone would draw other numbers.
    if not call.arguments["train"] or call.arguments["p"] == 0:
        yield from like_first(call)


def not_along(call: Call, dims: set[int], keep: bool = True, weights: int = 0) -> Iterator[Row]:
    """Every dimension of the first tensor but `dims`. keep: these stay in the output. weights: number of the other tensors,
    which are needed whole."""
    out = 0
    for dim in range(call.rank()):
        if dim not in dims:
            yield Row(out, (dim, *[WHOLE] * weights))
        out += keep or dim not in dims


def one_dim(call: Call) -> Iterator[Row]:
    """The operation works along its argument `dim`."""
    return not_along(call, {call.dim()})


def removes_dim(call: Call) -> Iterator[Row]:
    return not_along(call, {call.dim()}, keep=False)


def several_dims(call: Call) -> Iterator[Row]:
    return not_along(call, call.dims("dims"))


def reduces(call: Call) -> Iterator[Row]:
    return not_along(call, call.dims(), keep=bool(call.arguments.get("keepdim", False)))


def normalises_last(call: Call) -> Iterator[Row]:
    last = len(call.arguments["normalized_shape"])
    return not_along(call, set(range(call.rank() - last, call.rank())), weights=len(call.tensors) - 1)


def first_only(call: Call) -> Iterator[Row]:
    """Only the batch, of tensors with a batch: the last dimensions lie in space, and neighbours there are read."""
    spatial = {"conv1d": 1, "conv2d": 2, "conv3d": 3, "group_norm": 1, "upsample_nearest1d": 1}.get(call.name, 2)
    if call.rank() >= spatial + 2 or (call.name == "group_norm" and call.rank() >= 2):
        yield Row(0, (0, *[WHOLE] * (len(call.tensors) - 1)))


def pads(call: Call) -> Iterator[Row]:
    padded = len(call.arguments["pad"]) // 2
    return not_along(call, set(range(call.rank() - padded, call.rank())))


def linear(call: Call) -> Iterator[Row]:
    return not_along(call, {call.rank() - 1}, weights=len(call.tensors) - 1)


def matmul(call: Call) -> Iterator[Row]:
    left, right, out = call.shape(0), call.shape(1), call.output_shape
    if len(left) < 2 or len(right) < 2:
        return
    for dim in range(len(out) - 2):
        at = [dim - (len(out) - len(shape)) for shape in (left, right)]
        dims = [
            WHOLE if place < 0 or is_one(shape[place]) else place
            for place, shape in zip(at, (left, right), strict=True)
        ]
        if not is_one(out[dim]):
            yield Row(dim, tuple(dims))
    yield Row(len(out) - 2, (len(left) - 2, WHOLE))
    yield Row(len(out) - 1, (WHOLE, len(right) - 1))


def added_matmul(call: Call) -> Iterator[Row]:
    """addmm and baddbmm: the first tensor is added, and broadcasts."""
    added, left, right, out = call.shape(0), call.shape(1), call.shape(2), call.output_shape
    rank = len(out)
    places = [(dim, dim) for dim in range(rank - 2)]
    sides = [*places, (rank - 2, WHOLE), (WHOLE, rank - 1)]
    for dim, (of_left, of_right) in enumerate(sides):
        at = dim - (rank - len(added))
        of_added = WHOLE if at < 0 or is_one(added[at]) else at
        if len(left) == rank == len(right):
            yield Row(dim, (of_added, of_left, of_right))


def einsum(call: Call) -> Iterator[Row]:
    equation = str(call.arguments["equation"]).replace(" ", "")
    if "." in equation or "->" not in equation:
        return
    left, right = equation.split("->")
    terms = left.split(",")
    for dim, letter in enumerate(right):
        if all(term.count(letter) <= 1 for term in terms) and len(terms) == len(call.tensors):
            places = [term.find(letter) if letter in term else None for term in terms]
            if not any(place is not None and is_one(call.shape(at)[place]) for at, place in enumerate(places)):
                yield Row(dim, tuple(places))


def outer(call: Call) -> Iterator[Row]:
    yield Row(0, (0, WHOLE))
    yield Row(1, (WHOLE, 0))


def cat(call: Call) -> Iterator[Row]:
    joined = call.dim()
    if any(call.rank(position) != call.rank() for position in range(len(call.tensors))):
        return  # old code may join an empty tensor of another rank
    for dim in range(call.rank()):
        if dim != joined:
            yield Row(dim, tuple([dim] * len(call.tensors)))


def stack(call: Call) -> Iterator[Row]:
    new = int(call.arguments["dim"]) % (call.rank() + 1)
    for dim in range(call.rank()):
        yield Row(dim + (dim >= new), tuple([dim] * len(call.tensors)))


def permutes(order: Callable[[Call], Sequence[int]]) -> Rule:
    def rule(call: Call) -> Iterator[Row]:
        for out, dim in enumerate(order(call)):
            yield Row(out, (dim % call.rank(),))

    return rule


def _swapped(one: str, other: str) -> Callable[[Call], Sequence[int]]:
    def order(call: Call) -> Sequence[int]:
        dims = list(range(call.rank()))
        if dims:
            a, b = call.dim(one), call.dim(other)
            dims[a], dims[b] = dims[b], dims[a]
        return dims

    return order


def _moved(call: Call) -> Sequence[int]:
    source, target = call.arguments["source"], call.arguments["destination"]
    pairs = zip(*[[each] if isinstance(each, int) else each for each in (source, target)], strict=True)
    moved = {to % call.rank(): dim % call.rank() for dim, to in pairs}
    rest = iter(dim for dim in range(call.rank()) if dim not in moved.values())
    return [moved[out] if out in moved else next(rest) for out in range(call.rank())]


def expand(call: Call) -> Iterator[Row]:
    out = call.output_shape
    new = len(out) - call.rank()
    for dim, size in enumerate(call.shape()):
        if not is_one(size):
            yield Row(dim + new, (dim,))


def repeat(call: Call) -> Iterator[Row]:
    times = call.arguments["repeats" if "repeats" in call.arguments else "dims"]
    new = max(len(times) - call.rank(), 0)
    times = [1] * (call.rank() - len(times)) + list(times)
    for dim in range(call.rank()):
        if is_one(times[dim + new]):
            yield Row(dim + new, (dim,))


def repeat_interleave(call: Call) -> Iterator[Row]:
    if call.arguments.get("dim") is not None and len(call.tensors) == 1:
        yield from one_dim(call)


def view(call: Call) -> Iterator[Row]:
    """Views that keep the order of elements: a dimension that stays one by itself."""
    before, after, _ = atoms_of(call)
    for out, axis in enumerate(after):
        for dim, other in enumerate(before):
            if axis and axis == other:
                yield Row(out, (dim,))


def atoms_of(call: Call) -> tuple[Dims, Dims, Axes]:
    """The atoms of each dimension before and after a view. Empty dims where the sizes do not show them."""
    axes = Axes()
    before = axes.fresh(call.shape())
    after = axes.reshaped(before, call.output_shape)
    return (axes.resolved(before), axes.resolved(after), axes) if after is not None else ((), (), axes)


def complex_parts(call: Call) -> Iterator[Row]:
    last = call.rank() - (call.name == "view_as_complex")
    for dim in range(last):
        yield Row(dim, (dim,))


def embedding(call: Call) -> Iterator[Row]:
    # Such gradients of the table are no sum of what each element gives.
    if torch.is_grad_enabled() and (call.arguments["scale_grad_by_freq"] or call.arguments["sparse"]):
        return
    for dim in range(call.rank(1)):
        yield Row(dim, (WHOLE, dim))


def attention(call: Call) -> Iterator[Row]:
    """SDPA: each batch and head by itself, and each query. Masks and causal flags: attention.py."""
    query, key, value = (call.shape(position) for position in range(3))
    rank = len(query)
    if len(key) != rank or len(value) != rank:
        return
    rest = [WHOLE] * (len(call.tensors) - 3)
    yield Row(rank - 2, (rank - 2, WHOLE, WHOLE, *rest))
    for dim in range(rank - 2):
        if always(query[dim] == key[dim]) and always(query[dim] == value[dim]):
            yield Row(dim, (dim, dim, dim, *rest))


SPLITS = ("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "tensor_split")
JOINS = ("cat", "concat", "concatenate")
CUTS = ("slice", "narrow", *SPLITS)
VIEWS = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze")
ATTENTION = "scaled_dot_product_attention"

ROWS: dict[str, Rule] = {
    **dict.fromkeys(
        ("clone", "contiguous", "detach", "alias", "lift_fresh", "lift_fresh_copy", "to", "type_as", "_to_copy", "empty_like",
         "zeros_like", "ones_like", "full_like", "conj", "resolve_conj", "resolve_neg", "nan_to_num"), like_first
    ),
    **dict.fromkeys(("copy_", "fill_", "polar", "complex", "where", "masked_fill"), pointwise),
    "dropout": dropout,
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax", "glu", "cumsum", "cumprod", *CUTS), one_dim),
    **dict.fromkeys(("select", "unbind"), removes_dim),
    **dict.fromkeys(("flip", "roll"), several_dims),
    **dict.fromkeys(("sum", "mean", "amax", "amin", "any", "all", "prod", "max", "min", "argmax", "argmin", "logsumexp", "norm",
                     "linalg_vector_norm"), reduces),
    **dict.fromkeys(("layer_norm", "native_layer_norm", "rms_norm"), normalises_last),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "group_norm", "upsample_nearest1d", "upsample_nearest2d",
                     "upsample_bilinear2d", "avg_pool2d", "max_pool2d"), first_only),
    **dict.fromkeys(("pad", "constant_pad_nd"), pads),
    "linear": linear,
    **dict.fromkeys(("matmul", "bmm", "mm"), matmul),
    **dict.fromkeys(("addmm", "baddbmm"), added_matmul),
    "einsum": einsum,
    "outer": outer,
    **dict.fromkeys(JOINS, cat),
    "stack": stack,
    **dict.fromkeys(("transpose", "swapdims"), permutes(_swapped("dim0", "dim1"))),
    "swapaxes": permutes(_swapped("axis0", "axis1")),
    "permute": permutes(lambda call: call.arguments["dims"]),
    "t": permutes(lambda call: list(range(call.rank()))[::-1]),
    "movedim": permutes(_moved),
    "expand": expand,
    **dict.fromkeys(("repeat", "tile"), repeat),
    "repeat_interleave": repeat_interleave,
    **dict.fromkeys(VIEWS, view),
    **dict.fromkeys(("view_as_complex", "view_as_real"), complex_parts),
    "embedding": embedding,
    ATTENTION: attention,
}  # fmt: skip
