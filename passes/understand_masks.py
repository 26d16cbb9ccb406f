"""Proves from the graph what a mask means: causal, key padding, a sliding window, documents, or no mask at all."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule

from ..graphs.nodes import value_of
from ..graphs.sizes import is_one
from ..kernels.calls import AttentionCall, Mask, MaskKind
from ..masks.building import Home, Proof
from ..masks.expressions import Expressions, Value, rounded
from ..masks.indices import Index, at_least_zero, axis, constant, exchanged, index_of
from ..masks.reading import Reader, Unstable, is_plain
from ..masks.views import before_views
from .found import Found, MaskTerm, Operand, Operands, Understood
from .masks import lowered, one_fill, rows_matter

# A number at or below this one hides a key. Models use -10000 (-9984 in bfloat16), -1e9 and finfo.min: a hidden key takes part
# only if its score is larger than all others by about as much. Numbers nearer to zero are biases.
FAR = -5000.0

KEY, QUERY = -1, -2


def understand_masks(graph_module: GraphModule, attentions: Sequence[Found]) -> tuple[Understood, ...]:
    """Sets `call.mask` of each attention to the kind that the graph proves, and `proof` to the proof. The graph is not changed.
    Nothing is assumed about the values of a tensor that comes from outside the graph.

    where(ones(S, S).tril() == 1, 0, -inf)      ->  causal
    (1 - (lengths[:, None] > arange(S)).to(dtype))[:, None, None] * -10000  ->  key padding
    """
    reader: Reader | None = None
    advisor: Reader | None = None
    understood = []
    for found in attentions:
        mask, operands = found.call.mask, found.operands
        # What is proven may let a row without a key have any log-sum-exp.
        opaque = found.call.obstacle is not None or not mask.is_tensor or mask.needs_grad or found.call.logsumexp
        if opaque or operands is None or not operands.mask:
            understood.append(found.then(Understood))
        elif rows_matter(operands, found.call.needs_grad) and not one_fill(operands.mask):
            # No value stands for these fills.
            understood.append(found.then(Understood))
        else:
            reader = reader or Reader(graph_module)
            each = _understood(found, operands, reader)
            if each.call.mask.kind is MaskKind.ADDITIVE:
                advisor = advisor or Reader(graph_module, zeros_and_ones=True)
                advised = _understood(found, operands, advisor).call.mask
                if advised.kind is not MaskKind.ADDITIVE:
                    each = replace(each, call=replace(each.call, mask=replace(each.call.mask, if_boolean=advised.kind)))
            understood.append(each)
    return tuple(understood)


def _understood(found: Found, operands: Operands, reader: Reader) -> Understood:
    try:
        value = _together(operands.mask, found, reader)
    except Unstable:
        value = None
    if value is None:
        return found.then(Understood)
    call, filled = found.call, one_fill(operands.mask)
    facts = _facts(value, call, operands, reader, filled)
    if facts.mask is None and call.needs_grad:
        facts = _for_gradients(value, call, operands, reader, filled)
    proof = Proof(value, facts.keep, facts.keys, facts.queries)
    mask = facts.mask or call.mask
    if mask.kind is MaskKind.KEY_PADDING:
        mask = replace(mask, whole=tuple(_whole(found, operands.mask, reader)))
    return found.then(Understood, proof=proof, call=replace(call, mask=mask))


def _whole(found: Found, terms: tuple[MaskTerm, ...], reader: Reader) -> Iterator[int]:
    """The parts of a joined sequence, by their places, of which the mask hides no key."""
    start = constant(0)
    for place, size in enumerate(found.call.joined):
        length = index_of(size)
        try:
            value = _together(terms, found, reader, start + axis(KEY, length))
        except Unstable:
            value = None
        if value is not None and not value.boolean:
            parts = hidden(value, reader.expressions)
            value = None if parts is None else parts[0]
        if value is reader.expressions.true:
            yield place
        start = start + length


def _together(terms: tuple[MaskTerm, ...], found: Found, reader: Reader, key: Index | None = None) -> Value | None:
    """One element of the mask that `masks.build_mask` builds from the terms; None if the element is not known.

    key: the key of the element. None: any."""
    make, wanted = reader.expressions, getattr(torch, str(found.call.mask.dtype))
    total: Value | None = None
    for term in terms:
        viewed = term.tensor.value
        indices: tuple[Index, ...] = tuple(
            axis(dim - viewed.dim(), index_of(size)) for dim, size in enumerate(viewed.shape)
        )
        if key is not None and not is_one(viewed.shape[KEY]):
            indices = (*indices[:-1], key)
        inside = make.true
        if term.tensor.pads:
            inside, indices = _before_pads(term.tensor, indices, make)
        value: Value | None = make.true
        if not term.tensor.is_everywhere:
            at = before_views(value_of(term.tensor.node), term.tensor.views, indices)
            value = reader.element(term.tensor.node, at, found.node)
        assert value is not None
        outside = bool(term.tensor.pad_value) if value.boolean else 0.0
        value = make.select(inside, value, make.constant(outside))
        if term.how == "add":
            dtypes = (value_of(term.tensor.node).dtype, term.tensor.dtype, wanted)
            if len(set(dtypes)) > 1:  # under autocast SDPA and baddbmm cast it, and -3.4e38 becomes -inf
                value = make.cast(value, wanted) or (value if len(terms) == 1 and term.amount == 1 else None)
            if value is not None and term.amount != 1:
                value = make.arithmetic(operator.mul, (value, make.constant(term.amount)), wanted)
            if value is not None and total is not None:
                value = make.arithmetic(operator.add, (total, value), wanted)
            if value is None:
                return None
            total = value
            continue
        keep = value if term.how == "keep" else make.not_(value)
        if wanted == torch.bool:
            total = keep if total is None else make.and_(total, keep)
        else:
            total = make.select(keep, total or make.constant(0.0), make.constant(rounded(lowered(term.amount), wanted)))
    return total


def _before_pads(operand: Operand, indices: tuple[Index, ...], make: Expressions) -> tuple[Value, tuple[Index, ...]]:
    """Whether an element lies in what was padded, and its indices there."""
    inside, result = make.true, []
    shape = operand.value.shape
    for index, size, (start, end) in zip(indices, shape, operand.pads, strict=True):
        place = index - index_of(start)
        last = index_of(size) - index_of(start) - index_of(end) - 1
        inside = make.and_(inside, make.at_least_zero(place), make.at_least_zero(last - place))
        result.append(place)
    return inside, tuple(result)


@dataclass(frozen=True)
class Facts:
    mask: Mask | None = None  # the proven mask; None: nothing is proven
    keep: Value | None = None  # as in `Proof`
    keys: tuple[Home, ...] = ()  # as in `Proof`
    queries: tuple[Home, ...] = ()  # as in `Proof`


def _facts(value: Value, call: AttentionCall, operands: Operands, reader: Reader, filled: bool) -> Facts:
    """filled: the number of the mask fills scores and is not added to them."""
    make = reader.expressions
    fills: frozenset[float] = frozenset({-math.inf})
    if not value.boolean:
        parts = hidden(value, make)
        if parts is None:
            return Facts()
        value, fills = parts
    if value is make.true:
        return Facts(replace(call.mask, kind=MaskKind.NONE))
    if value is make.false or len(fills) != 1 or not max(fills) <= FAR:
        return Facts()
    (fill,) = fills

    keys: list[Value] = []
    queries: list[Value] = []
    rest: list[Value] = []
    for part in value.parts if value.kind == "and" else (value,):
        if operands.query.value.dim() > 3 and -3 in part.axes:
            return Facts()
        (rest if {KEY, QUERY} <= part.axes else queries if QUERY in part.axes else keys).append(part)
    finite = fill != -math.inf
    no_key = "mean" if fill <= operands.vanishing else "all keys"
    no_key = no_key if finite else "zeros"
    mask = replace(call.mask, no_key=no_key, low_rows=finite and call.needs_grad and not filled)
    if not rest and not queries and no_key == "mean" and call.needs_grad and not filled:
        return Facts()  # queries of zeros give the mean, but not SDPA's gradient
    if not rest and not queries:
        return Facts(replace(mask, kind=MaskKind.KEY_PADDING), value)
    if not rest and keys and not finite:
        homes = _homes(keys, reader), _homes(queries, reader)
        return Facts(replace(mask, kind=MaskKind.QUERY_KEY_PADDING), value, *homes) if all(homes) else Facts()
    if queries or not rest:
        return Facts()
    kind, window = _structure(rest, call)
    if kind is None or (finite and not _each_row_sees_a_key(kind, keys, call, no_key)):
        return Facts()
    if keys:
        causal = kind in (MaskKind.CAUSAL_UPPER_LEFT, MaskKind.CAUSAL_LOWER_RIGHT)
        return Facts(replace(mask, kind=MaskKind.CAUSAL_PADDING), value) if causal else Facts()
    return Facts(replace(call.mask, kind=kind, window=window), value)


def _for_gradients(value: Value, call: AttentionCall, operands: Operands, reader: Reader, filled: bool) -> Facts:
    """What is known of an additive mask of no other kind, for the gradients of a row that it hides as a whole.

    Fills: the mean of all values, and no gradient for the scores. One number that is added: it shifts all scores of the row
    alike. Several numbers, or one that the scores vanish beside: only the weights themselves give the gradient."""
    parts = None if value.boolean else hidden(value, reader.expressions)
    if parts is None or not parts[1] or not min(parts[1]) <= FAR:
        return Facts()
    keep, numbers = parts
    mask = replace(call.mask, low_rows=not filled and numbers != {-math.inf})
    (number, *others) = numbers
    if others or keep.kind == "constant" or number == -math.inf or not (filled or number > operands.vanishing):
        return Facts(mask)
    return Facts(replace(mask, kind=MaskKind.BOOLEAN, no_key="mean" if filled else "all keys"), keep)


def hidden(value: Value, make: Expressions) -> tuple[Value, frozenset[float]] | None:
    """The condition under which an additive mask is zero, and its other numbers; None if its elements are not constants."""
    if value.kind == "constant":
        zero = value.number == 0
        return make.constant(zero), frozenset(() if zero else (float(value.number),))
    if value.kind != "select":
        return None
    condition, a, b = value.parts
    yes, no = hidden(a, make), hidden(b, make)
    return None if yes is None or no is None else (make.select(condition, yes[0], no[0]), yes[1] | no[1])


def _homes(values: list[Value], reader: Reader) -> tuple[Home, ...]:
    """Boolean tensors of the graph that hold the values: one for their conjunction, or one for each; () if one is missing."""
    for wanted in ([reader.expressions.and_(*values)], values):
        homes = [reader.homes.get(value) for value in wanted]
        found = tuple(home for home in homes if home is not None and is_plain(*home))
        if len(found) == len(wanted) and all(value_of(node).dtype == torch.bool for node, _ in found):
            return found
    return ()


def _structure(parts: list[Value], call: AttentionCall) -> tuple[MaskKind | None, Any]:
    """The kind of mask, and the window, that conditions on both query and key make; (None, None) if they make no known kind."""
    if len(parts) == 1 and _same_document(parts[0]):
        return MaskKind.BLOCKS, None
    bounds: dict[bool, Index] = {}  # key <= query + bounds[True], key >= query - bounds[False]
    for part in parts:
        bound = _bound(part)
        if bound is None or bound[0] in bounds:
            return None, None
        bounds[bound[0]] = bound[1]
    behind, before = bounds.get(True), bounds.get(False)
    q_len, kv_len = index_of(call.q_len), index_of(call.kv_len)
    if before is None and behind is not None:
        if behind.number == 0:
            return MaskKind.CAUSAL_UPPER_LEFT, None
        if behind == kv_len - q_len:
            return MaskKind.CAUSAL_LOWER_RIGHT, None
    numbers = tuple(None if bound is None else bound.number for bound in (before, behind))
    if q_len == kv_len and all(
        bound is None or (number is not None and number >= 0)
        for bound, number in zip((before, behind), numbers, strict=True)
    ):
        return MaskKind.SLIDING_WINDOW, numbers
    return None, None


def _bound(part: Value) -> tuple[bool, Index] | None:
    """(True, c) for key <= query + c, (False, c) for key >= query - c; None for any other condition."""
    if part.kind != "at_least_zero":
        return None
    index: Index = part.parts[0]
    axes = {each.dim: each for each in index.axes()}
    if set(axes) != {KEY, QUERY}:
        return None
    difference = Index({(axes[QUERY],): 1}) - Index({(axes[KEY],): 1})
    for behind, direction in ((True, difference), (False, -difference)):
        rest = index - direction
        if not list(rest.axes()):
            return behind, rest
    return None


def _same_document(part: Value) -> bool:
    """Whether the condition is ids[query] == ids[key], with ids from a tensor or from positions: query // 77 == key // 77."""
    if part.kind == "compare" and part.parts[0] == "eq":
        one, other = part.parts[1:]
        if one.kind == other.kind == "read" and one.parts[0] is other.parts[0]:
            return tuple(map(_turned, one.parts[1])) == other.parts[1] and QUERY in one.axes ^ other.axes
    if part.kind == "zero":
        index: Index = part.parts[0]
        return _turned(index) == -index
    return False


def _turned(index: Index) -> Index:
    return exchanged(index, QUERY, KEY)


def _each_row_sees_a_key(kind: MaskKind, keys: list[Value], call: AttentionCall, no_key: str) -> bool:
    """Whether each row sees a key, or whether the mask built for an additive mask of a finite number is right without one."""
    if keys:
        return no_key == "all keys"
    if kind is MaskKind.CAUSAL_LOWER_RIGHT:
        return at_least_zero(index_of(call.kv_len) - index_of(call.q_len))
    return kind in (MaskKind.CAUSAL_UPPER_LEFT, MaskKind.SLIDING_WINDOW)
