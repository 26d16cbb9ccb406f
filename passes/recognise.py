"""Recognises an attention that is written in tensor operations, starting at its softmax. The graph is not changed.

    softmax(scale * q k^T + mask, keys) -> dropout -> @ v

Axes are followed by identity (graphs/axes.py), not by position or size. So any order of axes, heads folded into the batch and
keys repeated for groups of heads come out as SDPA's (batch, heads, length, dim).
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..graphs.axes import Axes, Axis, Dims, size_of
from ..graphs.mutations import Writes, unread_behind
from ..graphs.nodes import value_of
from ..graphs.sizes import UnbackedSizeError, always
from ..graphs.spellings import first, number, shown, spelled
from .arrangements import Sides, arrange
from .cut_off import scores_from_elsewhere, weights_leave
from .found import VANISHING, VANISHING_IN_FLOAT32, Missed, Operand, Operands
from .opaque_functions import is_function
from .operands import best, readables
from .products import leads_to_product, mixes, operand_dims
from .scores import Scores, find_scores
from .softmaxes import Softmax, read_softmax
from .steps import Steps
from .values import Values, find_values, readers

HALF = frozenset({torch.float16, torch.bfloat16})


@dataclass(frozen=True)
class Recognised:
    """An attention that is written in tensor operations."""

    node: Node  # gives the attention's output
    softmax: Node  # gives the weights
    operands: Operands | None  # None: it must stay, because of `obstacle`
    scale: float
    dropout: float  # probability
    dtype: torch.dtype  # of the products
    obstacle: str | None  # why it must stay
    chain: tuple[Node, ...] = ()  # nodes that the swap erases if they have no reader left
    sizes: tuple[Any, Any] = (0, 0)  # head_dim and value_dim, if there are no operands


def recognise(node: Node, writes: Writes, unread: Set[Node]) -> Recognised | Missed | None:
    """The attention around the softmax whose last operation is `node`; `Missed` if there nearly is one; None for any other
    softmax and for what is none.

    unread: the nodes of the graph whose values nothing reads."""
    axes = Axes()
    softmax = read_softmax(node, writes, axes)
    if not isinstance(softmax, Softmax):
        return softmax
    source, weights = softmax.source, softmax.weights
    scores = softmax.stepped(find_scores(source, softmax.dims, softmax.reader, axes, writes))
    values = softmax.divided(find_values(weights, softmax.dims, axes, unread), axes, unread)
    if isinstance(scores, Missed):
        near = isinstance(values, Values) or leads_to_product(weights, forward=True)
        if near and (leads_to_product(source) or is_function(scores.node)):
            return scores
        return scores_from_elsewhere(softmax, values, axes) if isinstance(values, Values) else None
    if isinstance(values, Missed):
        hidden = is_function(values.node) and leads_to_product(source)
        if hidden or leads_to_product(weights, forward=True):
            return values
        return weights_leave(softmax, scores, values)
    return _Recogniser(softmax, scores, values, axes, writes, unread).read()


@dataclass
class _Recogniser:
    """Recognises the attention of one softmax between two products."""

    softmax: Softmax
    scores: Scores
    values: Values
    axes: Axes
    writes: Writes
    unread: Set[Node]

    def read(self) -> Recognised | Missed:
        placed = operand_dims(self.scores.product, self.scores.dims, self.axes)
        if isinstance(placed, Missed):
            return placed
        left, right, inner = placed
        product = self.scores.product
        atoms = self.axes.atoms
        keys, summed = set(atoms(self.softmax.dims[self.softmax.dim])), set(atoms(self.values.summed))
        one, other = ({atom for axis in dims for atom in atoms(axis)} for dims in (left, right))
        if not keys or not summed:
            return Missed("it has a single key", self.softmax.node)
        mixed = mixes(product, self.scores.dims, keys, self.axes)
        mixer = product.node if mixed and any(map(leads_to_product, (product.left, product.right))) else None
        if not (summed <= one) ^ (summed <= other) or summed & one & other:
            end = self.values.product
            if mixes(end, self.values.dims, keys, self.axes):
                return _mixed(end.node)
            return Missed("its values are not summed over a dimension that only its keys have", end.node)
        if keys != summed and mixer is not None:
            return _mixed(mixer)
        if keys != summed:
            reason = f"its softmax runs over dimension {self.softmax.dim} of the scores, which is not that of the keys"
            return self._stays(reason, inner)
        sides = (("left", left), ("right", right))
        (queried, query), (keyed, key) = sides if summed <= other else sides[::-1]
        query_node, key_node = getattr(product, queried), getattr(product, keyed)
        letters = dict(zip(("left", "right"), product.letters[:2], strict=True))
        if not set(letters[queried]) - set(letters[keyed]):
            return Missed("its query is a single vector, without a dimension of queries", product.node)
        own = frozenset(self.softmax.nodes)
        along = self.softmax.dims[self.softmax.dim]
        steps = Steps(self.scores, self.values.output, along, self.axes, self.writes, self.unread | own)
        obstacle = self.scores.obstacle or self.values.obstacle or self._read_elsewhere(steps.lost)
        if (writer := self._writer()) is not None:
            return Missed(f"its scores or weights are written into by {shown(writer)}", writer)
        found = self._arranged(query_node, query, key_node, key, inner, steps, obstacle)
        if isinstance(found, Missed) and mixer is not None:
            return _mixed(mixer)
        return self._stays(obstacle, inner) if isinstance(found, Missed) and obstacle else found

    def _arranged(
        self, query: Node, query_dims: Dims, key: Node, key_dims: Dims, inner: Axis, steps: Steps, obstacle: str | None
    ) -> Recognised | Missed:
        product, end, multiplied = self.scores.product, self.values.output, self.values.product.node
        out, computed = value_of(end).dtype, value_of(product.node).dtype
        narrow = out if out in HALF and torch.promote_types(out, computed) == computed != out else None
        if any(step.how == "times" for step in self.scores.steps):
            narrow = None  # a half query times a tensor is rounded once more
        walk = (self.axes, self.writes, end)
        queries = readables(query, query_dims, product.node, *walk, scales=True, narrow=narrow)
        keys = readables(key, key_dims, product.node, *walk, scales=True, narrow=narrow, repeats=True)
        values = readables(self.values.value, self.values.value_dims, multiplied, *walk, repeats=True)
        if not (queries and keys and values and steps.readable()):
            return Missed("one of its tensors is written into before the product with its values", end)
        # From float16 and bfloat16 kernels compute the same float32 products as the model does from the upcast tensors.
        exact = narrow is not None and any(each.casts for each in queries) and any(each.casts for each in keys)
        queries = [each for each in queries if bool(each.casts) == exact]
        keys = [each for each in keys if bool(each.casts) == exact]
        dtype = out if exact else torch.promote_types(computed, out)

        made = self.values.output_dims
        sides = Sides(self.softmax.dims, self.softmax.dim, made, inner, self.values.width, queries, keys, values)
        arrangement = arrange(sides, self.axes)
        if arrangement is None:
            return Missed("its query is a single vector for all batches: a pooling", product.node)
        shared = set(arrangement.shared)
        chosen = [best(self.axes, queries, arrangement.query)]
        for found, target in ((keys, arrangement.key), (values, arrangement.value)):
            lacking = [each for each in found if not shared & each.atoms(self.axes)]
            chosen.append(best(self.axes, lacking if shared else [each for each in found if not each.repeats], target))
        result = self.axes.views(arrangement.output, made)
        if None in chosen or result is None:
            lacks = [name for name, each in zip(("query", "key", "value"), chosen, strict=True) if each is None]
            what = f"its {lacks[0]}" if lacks else "its output"
            return Missed(f"{what} cannot be viewed as (batch, heads, length, dim)", product.node)
        (query_at, query_views), (key_at, key_views), (value_at, value_views) = chosen  # type: ignore[misc]
        try:
            read = steps.read(arrangement, obstacle)
            if isinstance(read, Missed):
                return read
            scale, obstacle = read.scale, read.obstacle
            for each in (query_at, key_at):
                for amount, power in each.scales:
                    scale *= number(amount) ** power
            dropout = number(self.values.dropout)
        except ZeroDivisionError:
            return Missed("its scores are divided by zero", product.node)
        except UnbackedSizeError as error:
            return Missed(f"its scale, a fill or its dropout depends on data ({error})", product.node)
        if not 0 <= dropout < 1:
            return Missed(f"its dropout is {dropout:g}, which is not in [0, 1)", self.softmax.node)
        if value_of(self.softmax.weights).dtype == torch.float64 != dtype:
            obstacle = obstacle or f"its softmax runs in float64, its products in {dtype}"
        if value_of(end).dtype != dtype:
            result = (*result, ("to", (out,)))
        operands = Operands(
            Operand(query_at.node, query_views, factors=tuple(read.of_query)),
            Operand(key_at.node, key_views, factors=tuple(read.of_key)),
            Operand(value_at.node, value_views),
            tuple(reversed(read.terms)),
            result,
            bool(arrangement.shared),
            self._vanishing(computed),
        )
        if not _fits(operands):
            return Missed("the sizes of its query, key and value are not known to match", product.node)
        chain = (*self._chain(steps.lost), *read.passed, *query_at.passed, *key_at.passed, *value_at.passed)
        return Recognised(end, self.softmax.weights, operands, scale, dropout, dtype, obstacle, chain)

    def _vanishing(self, computed: torch.dtype) -> float:
        """Beside which numbers the scores are lost. A model may name float32 for its softmax: scores vanish beside -1e9 there,
        also where the rest runs in float64."""
        named = any(
            given is torch.float32 for node in self.softmax.nodes for given in (*node.args, *node.kwargs.values())
        )
        narrow = value_of(self.softmax.weights).dtype == torch.float32 and (named or computed in HALF)
        return VANISHING_IN_FLOAT32 if narrow else VANISHING

    def _chain(self, lost: tuple[Node, ...]) -> tuple[Node, ...]:
        extra = first(self.scores.product.node) if spelled(self.scores.product.node) == "baddbmm" else None
        nodes = (*self.scores.nodes, *self.softmax.nodes, *self.values.nodes, *lost)
        nodes = (extra, *nodes) if isinstance(extra, Node) else nodes
        lent = tuple(user for node in nodes for user in node.users if spelled(user) == "to")  # for their dtype
        return (*nodes, *lent, *unread_behind(nodes, self.unread))  # copies that are thrown away

    def _read_elsewhere(self, lost: tuple[Node, ...]) -> str | None:
        scores, weights = set(self.scores.nodes), {*self.softmax.nodes, *self.values.nodes}
        inner = [node for node in (*self.softmax.nodes, *self.values.nodes) if node is not self.values.output]
        for what, nodes in (("weights", inner), ("scores", self.scores.nodes)):
            for node in nodes:
                for user in readers(node, self.unread):
                    if user not in scores and user not in weights and user not in lost:
                        where = "returned" if user.op == "output" else f"used by {user.name}"
                        return f"its attention {what} are used elsewhere ({where})"
        return None

    def _writer(self) -> Node | None:
        """Another node that writes into the scores or the weights; None if there is none."""
        nodes = {*self.scores.nodes, *self.softmax.nodes, *self.values.nodes} - {self.values.output}
        return next((writer for node in nodes for writer in self.writes.writers(node) if writer not in nodes), None)

    def _stays(self, obstacle: str, inner: Axis) -> Recognised:
        node = self.values.output
        sizes = (size_of(inner), size_of(self.values.width))
        return Recognised(node, self.softmax.weights, None, 1.0, 0.0, value_of(node).dtype, obstacle, (), sizes)


def _mixed(node: Node) -> Missed:
    return Missed(f"its heads are mixed by {shown(node)}", node)


def _fits(operands: Operands) -> bool:
    """Whether query, key and value have equal ranks, query and key equal head dims, key and value equal lengths, as in SDPA."""
    query, key, value = (each.value for each in (operands.query, operands.key, operands.value))
    same = query.dim() == key.dim() == value.dim()
    return same and always(query.shape[-1] == key.shape[-1]) and always(key.shape[-2] == value.shape[-2])
