"""Calls of `torch.nn.attention.flex_attention` by the model itself: one node, a higher-order operator with two small graphs."""

from __future__ import annotations

import operator
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..graphs.emitting import Emitter
from ..graphs.mutations import storage_of, unread, written_storages
from ..graphs.nodes import Surroundings, calls_of, is_plain_tensor, is_transformed, needs_grad, value_of
from ..graphs.notes import is_ours, note_reading, reading_of, scratch_before
from ..graphs.sizes import always
from ..graphs.spellings import spelled
from .flex_mods import Mods, Term, Unread
from .found import MaskTerm, Operand

FLEX = torch.ops.higher_order.flex_attention
# The options that flex_attention itself sets. A model's own ones are made for flex alone, or change what flex computes.
_OPTIONS = {
    "BACKEND": "AUTO",
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,
    "BLOCKS_ARE_CONTIGUOUS": False,
    "WRITE_DQ": True,
}
_WHOLE = 1 << 30  # the size of the one block of `block_mask=None`; no tensor is longer
_RESULTS = frozenset({"OUTPUT_LOGSUMEXP", "OUTPUT_MAX"})  # say what flex returns besides; the readers are looked at


@dataclass(frozen=True)
class FlexReading:
    """What a call of flex computes, in SDPA's words."""

    scale: float | None
    terms: tuple[MaskTerm, ...] = ()
    obstacle: str | None = None  # why the call must stay
    around: tuple[Node, ...] = ()  # nodes that nothing but the call reads


def read_flex_calls(graph_module: GraphModule, surroundings: Surroundings) -> int:
    """Reads each call of flex_attention, and writes the masks and biases of its functions in front of it, for a kernel that may
    take its place. The call itself stays. `drop_scratch` removes what no kernel has read.

    flex_attention(q, k, v, score_mod: score + bias[h, q, kv])  ->  mask = bias.unsqueeze(0)
                                                                    flex_attention(q, k, v, ...)
    """
    calls = [
        (node, inside)
        for node, inside in calls_of(graph_module, surroundings, lambda target: target is FLEX)
        if not is_ours(node)
    ]
    if not calls:
        return 0
    written, thrown_away = written_storages(graph_module), unread(graph_module)
    for node, inside in calls:
        reading = FlexReading(None, obstacle=inside.transform or _obstacle(node, written, thrown_away))
        if reading.obstacle is None:
            with scratch_before(node):
                reading = _read(graph_module, node)
        note_reading(node, reading)
    return len(calls)


def flex_reading(node: Node) -> FlexReading:
    """What `read_flex_calls` has read of a call."""
    reading = reading_of(node)
    return reading if isinstance(reading, FlexReading) else FlexReading(None, obstacle="its score_mod was not read")


def _obstacle(node: Node, written: Set[int], thrown_away: Set[Node]) -> str | None:
    """Why a call stays that has the arguments `node.args`, by its results, options and block mask."""
    options, block_mask = node.args[6], node.args[4]
    assert isinstance(options, dict)
    assert isinstance(block_mask, tuple | list)
    if any(
        user.target is not operator.getitem or (user.args[1] != 0 and user not in thrown_away) for user in node.users
    ):
        return "its log-sum-exp or its largest scores are read (return_lse, return_aux)"
    own = sorted(str(name) for name, value in options.items() if name not in _RESULTS and _OPTIONS.get(name) != value)
    if own:
        return f"its kernel_options set {', '.join(own)}"
    tensors = [value_of(each) for each in node.args[:3]]
    if any(tensor.is_nested for tensor in tensors):
        return "its tensors are nested"
    for tensor in tensors:
        if not is_plain_tensor(tensor) or is_transformed(tensor):
            return f"it works on a tensor subclass ({type(tensor).__name__})"
    if not _is_one_block(node, block_mask, written):
        return (
            "it has a block_mask, whose lists of blocks are data: whether they agree with its mask_mod is not known from the "
            "graph"
        )
    return None


def _is_one_block(node: Node, block_mask: Any, written: Set[int]) -> bool:
    """Whether a block mask is that of `block_mask=None`: one block that holds everything, in which the mask_mod decides."""
    blocks, indices, full_blocks, full_indices = block_mask[2:6]
    sizes = block_mask[-3:-1]
    if full_blocks is not None or full_indices is not None or not all(isinstance(each, int) for each in sizes):
        return False
    if not _is_filled(blocks, 1, 3, written) or not _is_filled(indices, 0, 4, written):
        return False
    lengths = (value_of(each).shape[-2] for each in node.args[:2])
    return all(size >= _WHOLE or always(length <= size) for length, size in zip(lengths, sizes, strict=True))


def _is_filled(node: Any, wanted: int, rank: int, written: Set[int]) -> bool:
    """Whether a node makes a tensor of one element with this number, into which nothing writes."""
    if not isinstance(node, Node) or node.op != "call_function" or tuple(value_of(node).shape) != (1,) * rank:
        return False
    if storage_of(value_of(node)) in written:
        return False
    name = spelled(node)
    if name in ("ones", "zeros"):
        return wanted == (name == "ones")
    return name == "full" and bool(node.args[1] == wanted)


def _read(graph_module: GraphModule, node: Node) -> FlexReading:
    emitter = Emitter(graph_module)
    score_mod, mask_mod = (_graph(graph_module, each) for each in (node.args[3], node.args[4][-1]))  # type: ignore[index]
    query, key = (value_of(each) for each in node.args[:2])
    scale: Any = value_of(node.args[5])
    if not isinstance(scale, float | int | torch.SymFloat):
        return FlexReading(None, obstacle="its scale is computed in the graph")
    if score_mod is None or mask_mod is None:
        return FlexReading(None, obstacle="its score_mod or mask_mod is not in the graph")
    sizes = (query.shape[0], query.shape[1], query.shape[-2], key.shape[-2])
    output = value_of(node)[0]

    def given(buffers: Any) -> list[Any]:
        return [
            emitter.tensor(each) if isinstance(value_of(each), torch.Tensor) else value_of(each) for each in buffers
        ]

    try:
        with emitter.before(node, needs_grad(node), output):
            for each in node.args[:3]:
                emitter.tensor(each)  # type: ignore[arg-type]
            mods = Mods(emitter, sizes, query.device)
            scores = mods.scores(score_mod, given(node.args[7]))
            kept = mods.mask(mask_mod, given(node.args[8]))
    except Unread as error:
        return FlexReading(None, obstacle=str(error))
    except (
        IndexError,
        RuntimeError,
        TypeError,
        ValueError,
    ):  # a function that no one here knows, on other tensors than its own
        return FlexReading(None, obstacle="its score_mod or mask_mod cannot be computed for all elements at once")
    terms = [*scores.terms, *([Term(kept, "keep", float("-inf"))] if kept is not None else [])]
    found = tuple(MaskTerm(Operand(emitter.node(term.tensor)), term.how, term.amount) for term in terms)
    return FlexReading(float(scale) * scores.scale, found, around=_around(node))


def _graph(graph_module: GraphModule, node: Any) -> GraphModule | None:
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    found = getattr(graph_module, str(node.target), None)
    return found if isinstance(found, GraphModule) else None


def _around(node: Node) -> tuple[Node, ...]:
    """The nodes from the first of the block mask to the call, with those of torch.func, where nothing but the call reads them:
    `flex_attention` computes a transposed block mask for its backward."""
    first: Any = node.args[4][2]  # type: ignore[index]
    run: list[Node] = []
    at = node.prev
    while at is not first and at.op != "root":
        run.append(at)
        at = at.prev
    run = [each for each in (*run, first) if not is_ours(each)]
    inside = {*run, node}
    return tuple(run) if at is first and all(inside.issuperset(each.users) for each in run) else ()
