"""Turns the operations between q k^T and the softmax into what a kernel takes: a scale, a mask, a query and a key that are
multiplied by tensors."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field, replace

import torch
from torch.fx import Node

from ..graphs.axes import Axes, Axis, Dims, Views, size_of
from ..graphs.mutations import CHECK, Writes, written_by
from ..graphs.nodes import value_of
from ..graphs.sizes import is_one
from ..graphs.spellings import argument, first, is_number, name_of, number, spelled
from .arrangements import Arrangement
from .found import MaskTerm, Missed, Operand, everywhere
from .moves import Cut
from .operands import Readable, best, readables
from .scores import Scores, ScoreStep

# A finite fill must not be above this number to count as a mask: weights of exp(-1e4) are zero in every dtype.
LEAST_FILL = -1e4

# Functions of the scores whose results lie between the least and the largest score, or hardly above.
_LEVELS = frozenset(
    {"amax", "amin", "max", "min", "mean", "median", "logsumexp", "topk", "sort", "kthvalue", "cummax", "cummin"}
)
# Functions that keep the size of a number.
_KEEPERS = frozenset(
    {"clone", "detach", "view", "expand", "to", "abs", "neg", "getitem", "slice", "select", "narrow", "mul", "div"}
)


@dataclass
class Between:
    """The operations between q k^T and the softmax, for a kernel."""

    obstacle: str | None  # why the attention must stay as it is
    scale: float = 1.0  # of q k^T
    terms: list[MaskTerm] = field(default_factory=list)  # the last one first
    of_query: list[tuple[Operand, int]] = field(default_factory=list)  # factors, with their powers
    of_key: list[tuple[Operand, int]] = field(default_factory=list)
    passed: list[Node] = field(default_factory=list)  # nodes on the way to the tensors

    def stays(self, obstacle: str) -> None:
        self.obstacle = self.obstacle or obstacle


class Steps:
    """Reads the steps of the scores of one attention."""

    def __init__(self, scores: Scores, end: Node, keys: Axis, axes: Axes, writes: Writes, unread: Set[Node]) -> None:
        """end: the product with the values. keys: the axis that the softmax runs over."""
        self.scores, self.axes = scores, axes
        self._writes, self._end = writes, end
        self._unread = unread
        self._ways: dict[int, list[Readable]] = {}  # by the identity of a step
        self._lost: dict[int, tuple[Node, ...]] = {}  # the same
        for step in reversed(scores.steps):
            along = {atom for axis in step.dims for atom in axes.atoms(axis)}
            if step.how == "times" and along & set(axes.atoms(keys)):
                break  # what was the same for all keys before it differs behind it
            if step.how == "add" and not step.cuts and (nodes := self._level(step, keys)):
                self._lost[id(step)] = nodes
        self.lost = tuple(node for nodes in self._lost.values() for node in nodes)  # nodes that only lost steps read

    def readable(self) -> bool:
        """Whether all tensors hold the same values where the product with the values is computed."""
        return all(
            self._readables(step)
            for step in self.scores.steps
            if step.tensor is not None and id(step) not in self._lost
        )

    def read(self, arrangement: Arrangement, obstacle: str | None) -> Between | Missed:
        done = Between(obstacle)
        for step in reversed(self.scores.steps):
            if isinstance(step.amount, Node):
                done.passed.append(step.amount)
            if step.how == "scale":
                done.scale *= number(step.amount) ** step.power
            elif step.how == "times":
                self._multiplied(step, arrangement, done)
            elif id(step) not in self._lost and (missed := self._masked(step, arrangement, done)) is not None:
                return missed
        return done

    def _readables(self, step: ScoreStep) -> list[Readable]:
        """The tensors that could be read as the tensor of a step."""
        if id(step) not in self._ways:
            assert step.tensor is not None
            assert step.reader is not None
            found = readables(
                step.tensor, step.dims, step.reader, self.axes, self._writes, self._end, repeats=True,
                flips=step.how in ("keep", "drop"),
            )  # fmt: skip
            self._ways[id(step)] = found
        return self._ways[id(step)]

    def _multiplied(self, step: ScoreStep, arrangement: Arrangement, done: Between) -> None:
        """Scores times a tensor: the query times it, where it is the same for all keys; the key, for all queries."""
        for target, factors in ((arrangement.of_queries, done.of_query), (arrangement.of_keys, done.of_key)):
            if (placed := best(self.axes, self._readables(step), target)) is not None:
                at, views = placed
                factors.append((Operand(at.node, views), step.power))
                done.passed += at.passed
                return
        done.stays("its scores are multiplied by a tensor")

    def _masked(self, step: ScoreStep, arrangement: Arrangement, done: Between) -> Missed | None:
        target = arrangement.mask
        cuts = [_cut_of(axis, step, self.axes) for axis in target]
        if len([cut for cut in cuts if cut is not None]) != len(step.cuts):
            assert step.reader is not None
            return Missed("it changes a part of its scores that is none of queries and keys", step.reader)
        target = tuple(axis if cut is None else (cut.part,) for axis, cut in zip(target, cuts, strict=True))
        product = self.scores.product.node
        if step.tensor is None:  # all of the part
            base, flips = self.scores.product.left, 0
            views: Views = (*everywhere(len(target)),)
        else:
            placed = best(self.axes, self._readables(step), target)
            if placed is None:
                assert step.reader is not None
                return Missed("its mask cannot be viewed as (batch, heads, q_len, kv_len)", step.reader)
            at, views = placed
            base, flips = at.node, at.flips
            done.passed += at.passed
        if done.of_query or done.of_key:
            done.stays("its scores are multiplied by a tensor after they were masked")
        if step.reader is product and value_of(base).dtype != value_of(product).dtype:
            views = (
                *views,
                ("to", (value_of(product).dtype,)),
            )  # under autocast, baddbmm casts the tensor that it adds
        amount, how = number(step.amount) * done.scale, step.how
        if how != "add":
            if flips % 2:
                how = "keep" if how == "drop" else "drop"
            if done.scale <= 0 or not amount <= LEAST_FILL:
                done.stays(f"it fills masked scores with {amount:g}")
        operand = Operand(base, views)
        if step.cuts:
            operand = _padded(operand, arrangement.mask, cuts, how == "keep")
        done.terms.append(MaskTerm(operand, how, amount))
        return None

    def _level(self, step: ScoreStep, keys: Axis) -> tuple[Node, ...]:
        """The nodes of `sim.amax(-1, keepdim=True).detach()` in `sim - ...`: all scores of a row become less by the same
        number, which the softmax loses. () for any other step.

        A tensor from elsewhere stays a mask, even if it is the same for all keys: beside finfo.min the scores of a row vanish,
        and a learned one gets a gradient of zero.
        """
        assert step.tensor is not None
        assert step.reader is not None
        at, reader, amount = step.tensor, step.reader, step.amount
        nodes: list[Node] = []
        reduced = False
        while at not in self.scores.nodes:
            name, source = spelled(at), first(at)
            read = [
                user for user in at.users if user is not reader and user not in self._unread and name_of(user) != CHECK
            ]
            if read or written_by(at) or not isinstance(source, Node) or isinstance(amount, Node):
                return ()
            if name == "getitem" and not isinstance(value_of(source), torch.Tensor) and at.args[1] != 0:
                return ()
            if name in ("mul", "div"):
                factor = argument(at, 1, "other")
                if isinstance(factor, Node) or not is_number(factor) or factor == 0:
                    return ()
                amount = amount * factor if name == "mul" else amount / factor
            elif name not in _LEVELS | _KEEPERS:
                return ()
            reduced = reduced or name in _LEVELS
            nodes.append(at)
            at, reader = source, at
        same = any(not set(self.axes.atoms(keys)) & each.atoms(self.axes) for each in self._readables(step))
        return tuple(nodes) if reduced and same and abs(amount) <= 1 else ()


def _cut_of(axis: Axis, step: ScoreStep, axes: Axes) -> Cut | None:
    """The cut of a step that takes a part of `axis`."""
    return next((cut for cut in step.cuts if axes.atoms(cut.whole) == axes.atoms(axis)), None)


def _padded(operand: Operand, whole: Dims, cuts: list[Cut | None], value: bool) -> Operand:
    """The operand, which covers the parts of `cuts`, padded to the whole."""
    shape = operand.value.shape
    missing = [-1 if cut is None or not is_one(size) else cut.part.size for cut, size in zip(cuts, shape, strict=True)]
    spread = (("expand", (tuple(missing),)),) if any(size != -1 for size in missing) else ()
    pads = tuple(
        (0, 0) if cut is None else (cut.start, size_of(axis) - cut.start - cut.part.size)
        for axis, cut in zip(whole, cuts, strict=True)
    )
    return replace(operand, views=(*operand.views, *spread), pads=pads, pad_value=value)
