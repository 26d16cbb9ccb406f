"""Reads a `score_mod` and a `mask_mod` of flex_attention as what SDPA has words for: a scale, masks and biases.

flex calls the two functions once for each element of the scores, on tensors of rank 0: the score and its four indices. Here
they run once, on indices of rank 4 that broadcast, and everything that they compute of the indices alone is written in front
of the call as nodes. So every tensor in them has rank 4 where flex has rank 0, and types are promoted alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..graphs.emitting import Emitter
from ..graphs.nodes import value_of
from ..graphs.sizes import always
from ..graphs.spellings import argument, is_number, number, shown, spelled
from .steps import LEAST_FILL

# Functions of one element at a time: they compute the same of broadcast tensors.
_POINTWISE = frozenset(
    {"add", "sub", "mul", "div", "floor_divide", "remainder", "fmod", "neg", "abs", "eq", "ne", "lt", "le", "gt", "ge",
     "and", "bitwise_and", "or", "bitwise_or", "bitwise_xor", "xor", "bitwise_not", "logical_and", "logical_or",
     "logical_xor", "logical_not", "where", "minimum", "maximum", "clamp", "exp", "exp2", "log", "log2", "pow", "square",
     "sqrt", "rsqrt", "sigmoid", "tanh", "sin", "cos", "floor", "ceil", "round", "to"}
)  # fmt: skip
_CONSTANTS = {"new_ones": 1, "ones": 1, "new_zeros": 0, "zeros": 0}


class Unread(Exception):
    """A function that is none of what is read; the text says why, as a reason for the report."""


@dataclass(frozen=True)
class Term:
    """How a tensor changes the scores, as `found.MaskTerm` says it; the tensor is a fake one of rank 4."""

    tensor: torch.Tensor
    how: str
    amount: float


@dataclass
class Scores:
    """The scores on their way through a score_mod."""

    scale: float = 1.0
    terms: list[Term] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """A captured tensor, with the indices that the function has given it so far."""

    tensor: torch.Tensor
    indices: tuple[Any, ...] = ()


class Mods:
    """Runs the functions of one call. All nodes are written where `emitter` stands.

    sizes: batch, heads, queries and keys of the scores.
    """

    def __init__(self, emitter: Emitter, sizes: Sequence[Any], device: torch.device) -> None:
        self._emitter = emitter
        self._sizes = tuple(sizes)
        self._device = device
        self._axes: dict[int, torch.Tensor] = {}

    def scores(self, function: GraphModule, captured: Sequence[Any]) -> Scores:
        """What a score_mod does. Raises `Unread`."""
        result = self._run(function, "score_mod", (Scores(), *range(4)), captured)
        if not isinstance(result, Scores):
            raise Unread("its score_mod does not use the score")
        return result

    def mask(self, function: GraphModule, captured: Sequence[Any]) -> torch.Tensor | None:
        """The tensor of a mask_mod, True where a key takes part; None: everywhere. Raises `Unread`."""
        result = self._run(function, "mask_mod", tuple(range(4)), captured)
        if isinstance(result, torch.Tensor):
            return result if result.dtype == torch.bool else result != 0
        if result is None or isinstance(result, Scores | Part):
            raise Unread("its mask_mod returns no boolean")
        if result:
            return None
        raise Unread("its mask_mod hides every key")

    def _run(self, function: GraphModule, name: str, given: Sequence[Any], captured: Sequence[Any]) -> Any:
        known: dict[Node, Any] = {}
        inputs = iter((*given, *captured))
        for node in function.graph.nodes:
            if node.op == "placeholder":
                value = next(inputs, None)
                axis = len(known) - (name == "score_mod")
                if 0 <= axis < 4:
                    known[node] = self._axis(axis) if node.users else None
                else:
                    known[node] = Part(value) if isinstance(value, torch.Tensor) else value
            elif node.op == "output":
                (result,) = node.args
                result = result[0] if isinstance(result, list | tuple) and len(result) == 1 else result
                return self._plain(known[result] if isinstance(result, Node) else result, name)
            elif node.op in ("call_function", "call_method"):
                known[node] = self._call(node, known, name)
            else:
                raise Unread(f"its {name} reads {node.target}")
        raise Unread(f"its {name} returns nothing")

    def _axis(self, place: int) -> torch.Tensor:
        """The indices of batch, heads, queries or keys, along their own dimension of four."""
        if place not in self._axes:
            shape = [1, 1, 1, 1]
            shape[place] = self._sizes[place]
            self._axes[place] = torch.arange(self._sizes[place], device=self._device).view(shape)
        return self._axes[place]

    def _call(self, node: Node, known: dict[Node, Any], name: str) -> Any:
        word = spelled(node) or ""
        if word in ("getitem", "index"):
            return self._indexed(node, known, name)
        if (constant := _constant(node, word)) is not None:
            return constant

        def given(value: Any) -> Any:
            return known[value] if isinstance(value, Node) else value

        if any(isinstance(given(each), Scores) for each in node.all_input_nodes):
            return self._changed(node, word, known, name)
        if word not in _POINTWISE or node.kwargs.keys() - {"dtype", "min", "max", "rounding_mode"}:
            raise Unread(f"its {name} calls {shown(node)}")
        args = [self._plain(given(each), name) for each in node.args]
        kwargs = {each: self._plain(given(value), name) for each, value in node.kwargs.items()}
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _changed(self, node: Node, word: str, known: dict[Node, Any], name: str) -> Scores:
        """The scores after one operation on them."""

        def given(value: Any) -> Any:
            return known[value] if isinstance(value, Node) else value

        def plain(value: Any) -> Any:
            return value if isinstance(value, Scores) else self._plain(value, name)

        refused = Unread(f"its {name} computes {shown(node)} of the score")
        if node.kwargs.keys() - {"other", "value", "mask", "dtype"} or name != "score_mod":
            raise refused
        if word in ("clone", "to"):
            if value_of(node).dtype != value_of(node.all_input_nodes[0]).dtype:
                raise refused
            source: Scores = given(node.args[0])
            return source
        if word == "where" and len(node.args) == 3:
            condition, one, other = (plain(given(each)) for each in node.args)
            kept = isinstance(one, Scores)
            return _filled(
                one if kept else other, condition, "keep" if kept else "drop",
                argument(node, 2 if kept else 1, "other"), refused, known,
            )  # fmt: skip
        if word == "masked_fill":
            return _filled(
                given(node.args[0]), plain(given(argument(node, 1, "mask"))), "drop", argument(node, 2, "value"), refused,
                known,
            )  # fmt: skip
        one, other = given(node.args[0]), given(argument(node, 1, "other"))
        swapped = isinstance(other, Scores)
        if swapped:
            one, other = other, one
        if not isinstance(one, Scores) or isinstance(other, Scores) or word not in ("add", "sub", "mul", "div"):
            raise refused
        if word in ("mul", "div"):
            plain_number = isinstance(other, int | float) and not isinstance(other, bool)
            if not plain_number or not 0 < other < math.inf or (swapped and word == "div"):
                raise refused
            if any(term.how != "add" and math.isfinite(term.amount) for term in one.terms):
                raise refused  # another fill, which may be no mask
            factor = float(other) if word == "mul" else 1 / float(other)
            return Scores(one.scale * factor, [Term(term.tensor, term.how, term.amount * factor) for term in one.terms])
        other = plain(other)
        if swapped and word == "sub":
            raise refused
        if not isinstance(other, torch.Tensor):
            if isinstance(other, int | float) and math.isfinite(other):
                return one  # the same for all keys: the softmax loses it
            raise refused
        if other.dtype == torch.bool or other.is_complex():
            raise refused
        bias = other if other.is_floating_point() else other.to(torch.float32)
        return Scores(one.scale, [*one.terms, Term(bias, "add", 1.0 if word == "add" else -1.0)])

    def _plain(self, value: Any, name: str) -> Any:
        """A captured number as a tensor of rank 4, where the function uses it as it is."""
        if not isinstance(value, Part):
            return value
        if value.tensor.dim() or value.indices:
            raise Unread(f"its {name} uses a captured tensor without an index for each dimension")
        return value.tensor.view(1, 1, 1, 1)

    def _indexed(self, node: Node, known: dict[Node, Any], name: str) -> Any:
        """captured[b, h, q, kv] as a view of the captured tensor; with computed indices a gather."""
        source = known[node.args[0]] if isinstance(node.args[0], Node) else None
        if not isinstance(source, Part):
            raise Unread(f"its {name} takes an element of what is no captured tensor")
        wanted: Any = node.args[1]
        more = wanted if isinstance(wanted, list | tuple) else (wanted,)
        indices = (*source.indices, *(known[each] if isinstance(each, Node) else each for each in more))
        indices = tuple(self._plain(each, name) for each in indices)
        whole = [
            isinstance(each, int) or (isinstance(each, torch.Tensor) and each.dtype != torch.bool) for each in indices
        ]
        if not all(whole) or any(isinstance(each, torch.Tensor) and each.is_floating_point() for each in indices):
            raise Unread(f"its {name} indexes a captured tensor by more than positions")
        tensor = source.tensor
        if len(indices) < tensor.dim():
            return Part(tensor, indices)
        places = [next((axis for axis, each in self._axes.items() if each is index), None) for index in indices]
        axes = [place for place in places if place is not None]
        if len(axes) < len(indices) or len(set(axes)) < len(axes):
            return tensor[tuple(indices)]
        if axes != sorted(axes):
            tensor = tensor.permute([axes.index(axis) for axis in sorted(axes)])
        for dim, axis in enumerate(sorted(axes)):
            if not always(tensor.shape[dim] == self._sizes[axis]):
                tensor = tensor.narrow(dim, 0, self._sizes[axis])
        for axis in range(4):
            if axis not in axes:
                tensor = tensor.unsqueeze(axis)
        return tensor


def _filled(scores: Any, condition: Any, how: str, amount: Any, refused: Unread, known: dict[Node, Any]) -> Scores:
    """The scores after a fill with a number where a condition is False ("keep") or True ("drop")."""
    own = known.get(amount) if isinstance(amount, Node) else amount
    amount = own if isinstance(own, int | float) else amount
    if not isinstance(scores, Scores) or not isinstance(condition, torch.Tensor) or condition.dtype != torch.bool:
        raise refused
    if not is_number(amount) or not number(amount) <= LEAST_FILL:
        raise refused
    return Scores(scores.scale, [*scores.terms, Term(condition, how, number(amount))])


def _constant(node: Node, word: str) -> Any:
    """The number or boolean that a node makes from nothing; None for any other node."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or value.dim():
        return None
    found: Any = _CONSTANTS.get(word)
    if found is None and is_number(node):
        found = number(node)
    if found is None:
        return None
    return bool(found) if value.dtype == torch.bool else float(found) if value.is_floating_point() else int(found)
