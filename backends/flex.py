"""flex_attention, emitted as the higher-order operator that Dynamo itself would trace, so that Inductor makes the kernel.

Masks become a `mask_mod` with a block mask (which skips blocks that no query sees), biases a `score_mod`. Limits as in
`torch/nn/attention/flex_attention.py` and `torch/_inductor/kernel/flex/`, read on torch 2.9, 2.11 and 2.13.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ..graphs.sizes import Size, always, described, holds, is_one
from ..kernels.block_lists import BLOCK, blocks_in, blocks_of, listed
from ..kernels.calls import AttentionCall, MaskKind
from ..kernels.decisions import Code, Refused
from ..kernels.machines import Machine, satisfies
from ..kernels.ops import LIBRARY, opaque
from ..kernels.records import Backend, HeadDim

GRID = 65_535  # CUDA's limit for the second and third dimension of a grid
DECODING = 128  # shorter queries go to the template of flex decoding
WHOLE = 1 << 30  # PyTorch's block size where there is no block mask


@dataclass(frozen=True)
class Prepared:
    """The arguments of the operator that a mask becomes."""

    blocks: tuple[Any, ...]  # `BlockMask.as_tuple()` without the mask_mod
    score_mod: GraphModule
    mask_mod: GraphModule
    score_tensors: tuple[Tensor, ...] = ()  # the bias that score_mod reads
    mask_tensors: tuple[Tensor, ...] = ()  # the boolean mask that mask_mod reads


def flex(query: Tensor, key: Tensor, value: Tensor, prepared: Prepared, *, call: AttentionCall) -> Tensor:
    options: dict[str, Any] = {
        "PRESCALE_QK": False,
        "ROWS_GUARANTEED_SAFE": False,  # a row without any key gives zeros, as in SDPA
        "BLOCKS_ARE_CONTIGUOUS": False,
        "WRITE_DQ": True,
        "OUTPUT_LOGSUMEXP": call.needs_grad and call.device != "cpu",
        "OUTPUT_MAX": False,
    }
    if satisfies(torch.__version__, ">=2.11"):
        options["BACKEND"] = "AUTO"
    scale = float(int(call.head_dim)) ** -0.5 if call.scale is None else call.scale
    if call.device == "cpu":
        query, key, value = STORED(_odd(query, call)), STORED(_odd(key, call)), STORED(value)
    elif not always(call.q_len >= DECODING):
        query = STORED(query)
    output: Tensor = torch.ops.higher_order.flex_attention(
        query, key, value, prepared.score_mod, (*prepared.blocks, prepared.mask_mod), scale, options,
        prepared.score_tensors, prepared.mask_tensors,
    )[0]  # fmt: skip
    return STORED(output) if call.device == "cpu" else output


def _odd(tensor: Tensor, call: AttentionCall) -> Tensor:
    """Queries or keys, with one more channel of zeros where heads are narrow: it changes no score.

    Inductor's C++ computes scores of 16 keys at a time. For heads narrower than 24, where fewer keys are left at the end, it
    still writes 16 if head_dim and the keys that are left are multiples of its vectors (8 floats with AVX2): the output is
    wrong in silence (2.13, PyTorch's own flex_attention too). With AVX-512 there is no such rest. An odd head_dim takes
    another branch.
    """
    narrow = holds(call.head_dim < 24) and holds(call.head_dim % 4 == 0)
    return F.pad(tensor, (0, 1)) if narrow else tensor


def _stored() -> Any:
    """An op that copies a tensor into new dense memory.

    On CUDA, Inductor's template for queries shorter than 128 (flex decoding) reads the query through an `as_strided` that drops
    its storage offset, and its strides where Inductor has not stored it yet: a slice of a batch or a transposed query gives a
    relative error of 1 in silence (torch 2.11, H200, PyTorch's own flex_attention too). Key and value are read right.

    Inductor's CPU template (2.9 to 2.15) reads its operands and its captured tensors as whole buffers: for a part of a buffer
    it loses the offset, for a tensor that Inductor has not stored yet the strides, both in silence or with an error in C++. A
    reader that Inductor fuses into the template raises NotImplementedError. Inductor does not look into this op: what goes in
    is stored, what comes out is a buffer of its own, and nothing is fused across it. An `as_strided` is not enough: Inductor
    reads through it.
    """
    op = opaque(
        "stored",
        "(Tensor tensor) -> Tensor",
        lambda tensor: tensor.clone(memory_format=torch.contiguous_format),
        lambda tensor: tensor.new_empty(tensor.shape),
    )
    torch.library.register_autograd(op, lambda ctx, grad: grad, lib=LIBRARY)
    return op


STORED = _stored()


def prepare(mask: Tensor | None, key: Tensor, call: AttentionCall) -> Prepared:
    """Block lists, score_mod and mask_mod for a mask; no host synchronisation, no shape that depends on data."""
    if call.mask.is_causal or call.mask.kind is MaskKind.SLIDING_WINDOW:
        window = call.mask.window or (None, 0)  # causal: all keys before, none after
        some, all_ = _window_blocks(key, call, window)
        return Prepared(_lists(some, all_, call), _keep_score(), _inside(window))
    if mask is not None and mask.dtype == torch.bool:
        some, all_ = blocks_of(mask, call)
        tensor, dims = _squeezed(mask, call)
        return Prepared(_lists(some, all_, call), _keep_score(), _read_mask(dims), mask_tensors=(tensor,))
    count = torch.ones((1, 1, 1), dtype=torch.int32, device=key.device)
    index = torch.zeros((1, 1, 1, 1), dtype=torch.int32, device=key.device)
    blocks = _tuple(call, (count, index, None, None, count, index, None, None), WHOLE)
    if mask is None:
        return Prepared(blocks, _keep_score(), _everything())
    tensor, dims = _squeezed(mask, call)
    return Prepared(blocks, _add_bias(dims), _everything(), score_tensors=(tensor,))


Window = tuple[Size | None, Size | None]  # keys before and after a query's own position; None: all of them


def _window_blocks(key: Tensor, call: AttentionCall, window: Window) -> tuple[Tensor, Tensor]:
    left, right = window
    rows: Any = blocks_in(call.q_len)
    columns: Any = blocks_in(call.kv_len)
    row = torch.arange(rows, device=key.device)[:, None] * BLOCK
    column = torch.arange(columns, device=key.device)[None, :] * BLOCK
    first, last = column - row - (BLOCK - 1), column - row + (BLOCK - 1)  # the distances from query to key in a block
    some = torch.ones_like(first, dtype=torch.bool)
    all_ = some & (column + BLOCK <= call.kv_len)  # kv_len may cut off the last block
    if right is not None:
        some, all_ = some & (first <= right), all_ & (last <= right)
    if left is not None:
        some, all_ = some & (last >= -left), all_ & (first >= -left)
    return some[None, None], all_[None, None]


def _lists(some: Tensor, all_: Tensor, call: AttentionCall) -> tuple[Any, ...]:
    """For each row of blocks the number and the indices of its partly seen blocks, and of its fully seen blocks; then the same
    for each column of blocks."""
    by_column = listed(some.transpose(-2, -1), all_.transpose(-2, -1))
    return _tuple(call, (*listed(some, all_), *by_column), BLOCK)


def _tuple(call: AttentionCall, lists: Sequence[Tensor | None], block: int) -> tuple[Any, ...]:
    """The block mask as a tuple in the order of this version of PyTorch, without the mask_mod at its end."""
    from torch.nn.attention.flex_attention import BlockMask, noop_mask  # here: it imports sympy (2.15)

    names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices",
             "q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")  # fmt: skip
    lengths: Any = (1, 1) if block == WHOLE else (call.q_len, call.kv_len)
    given: Any = dict(zip(names, lists, strict=True))
    mask = BlockMask(seq_lengths=lengths, BLOCK_SIZE=(block, block), mask_mod=noop_mask, **given)
    return tuple(mask.as_tuple()[:-1])


# -- the small graphs: score_mod(score, b, h, q_idx, kv_idx, *tensors) and mask_mod(b, h, q_idx, kv_idx, *tensors)


def _squeezed(mask: Tensor, call: AttentionCall) -> tuple[Tensor, tuple[int, ...]]:
    """The mask without the dimensions of size 1, which broadcast, and the positions of the other dimensions (at least one)."""
    if all(is_one(size) for size in mask.shape):
        mask = mask.expand(call.batch, 1, 1, 1)
    dims = tuple(dim for dim in range(4) if not is_one(mask.shape[dim])) or (0,)
    for dim in reversed(range(4)):
        if dim not in dims:
            mask = mask.squeeze(dim)
    return STORED(mask) if call.device == "cpu" else mask, dims


def _graph(names: Sequence[str], body: Any) -> GraphModule:
    graph = Graph()
    inputs = [graph.placeholder(name) for name in names]
    graph.output(body(graph, *inputs))
    return GraphModule(torch.nn.Module(), graph)


INDICES = ("b", "h", "q_idx", "kv_idx")


def _keep_score() -> GraphModule:
    return _graph(("score", *INDICES), lambda graph, score, *_: score)


def _add_bias(dims: tuple[int, ...]) -> GraphModule:
    def body(graph: Graph, score: Node, *rest: Node) -> Node:
        return graph.call_function(operator.add, (score, _load(graph, dims, *rest)))

    return _graph(("score", *INDICES, "bias"), body)


def _read_mask(dims: tuple[int, ...]) -> GraphModule:
    return _graph((*INDICES, "mask"), lambda graph, *rest: _load(graph, dims, *rest))


def _inside(window: Window) -> GraphModule:
    left, right = window

    def body(graph: Graph, b: Node, h: Node, q_idx: Node, kv_idx: Node) -> Node:
        if (left, right) == (None, 0):
            return graph.call_function(operator.ge, (q_idx, kv_idx))
        distance = graph.call_function(operator.sub, (kv_idx, q_idx))
        ends = []
        if right is not None:
            ends.append(graph.call_function(operator.le, (distance, right)))
        if left is not None:
            ends.append(graph.call_function(operator.ge, (distance, -left)))
        return ends[0] if len(ends) == 1 else graph.call_function(operator.and_, tuple(ends))

    return _graph(INDICES, body)


def _everything() -> GraphModule:
    return _graph(INDICES, lambda graph, b, *_: graph.call_method("new_ones", (b, ()), {"dtype": torch.bool}))


def _load(graph: Graph, dims: tuple[int, ...], b: Node, h: Node, q_idx: Node, kv_idx: Node, tensor: Node) -> Node:
    indices = (b, h, q_idx, kv_idx)
    return graph.call_function(operator.getitem, (tensor, tuple(indices[dim] for dim in dims)))


def grouped_heads(call: AttentionCall, machine: Machine) -> Refused | None:
    """Short queries go to flex decoding, which needs a power of two of query heads for each key head."""
    if holds(call.heads == call.kv_heads):
        return None
    if any(holds(call.heads == call.kv_heads * 2**power) for power in range(1, 8)):
        return None
    return Refused(
        Code.GQA,
        "flex needs a power of two of query heads for each key head, "
        f"the call has {described(call.heads)} query heads and {described(call.kv_heads)} key heads",
        "Repeat keys and values in the model, or choose another kernel",
    )


def static_lengths(call: AttentionCall, machine: Machine) -> Refused | None:
    """With a mask tensor and symbolic lengths, Inductor's CPU template writes C++ that does not compile (2.9 to 2.13)."""
    if not call.mask.is_tensor or all(isinstance(size, int) for size in (call.q_len, call.kv_len)):
        return None
    return Refused(
        Code.MASK,
        "flex on a CPU takes a mask tensor with static lengths, "
        f"here q_len is {described(call.q_len)} and kv_len {described(call.kv_len)}",
        "Compile with dynamic=False, or choose another kernel",
    )


def one_key_under_a_mask(call: AttentionCall, machine: Machine) -> Refused | None:
    """Inductor's C++ for the block lists of a mask that is computed in the graph does not compile where there is one key: `?:`
    of masks of two types (2.13)."""
    if not call.mask.is_tensor or holds(call.kv_len >= 2):
        return None
    return Refused(
        Code.LENGTH,
        f"flex on a CPU takes masks of two keys and more, here kv_len is {described(call.kv_len)}",
        "Choose another kernel",
    )


def boolean_masks_from_2_13(call: AttentionCall, machine: Machine) -> Refused | None:
    """On a CPU with several threads, two sites that share the block lists of a boolean mask end the process (abort inside the
    kernel, seen on 2.9 and 2.11; 2.13 is right)."""
    version = machine.packages.get("torch", "0")
    if not call.mask.is_boolean or satisfies(version, ">=2.13"):
        return None
    return Refused(
        Code.VERSION,
        f"flex on a CPU takes boolean masks from torch 2.13 on, this is {version}",
        "Upgrade torch, or choose another kernel",
    )


def grid(call: AttentionCall, machine: Machine) -> Refused | None:
    """On CUDA a grid is at most 65,535 wide in the dimensions that the templates use: batch * heads for short queries (flex
    decoding), otherwise batch, and heads. A larger grid ends the model: "CUDA driver error: invalid argument" (torch 2.11)."""
    long = isinstance(call.q_len, int) and call.q_len >= DECODING
    wide = (call.batch, call.heads) if long else (call.batch * call.heads,)
    if all(holds(size <= GRID) for size in wide):
        return None
    return Refused(
        Code.BATCH,
        f"flex takes {'batch and heads' if long else 'batch * heads'} up to {GRID:,}, "
        f"here are {described(call.batch)} and {described(call.heads)}",
        "Choose native or _native_efficient, or call the model with a smaller batch",
    )


def shared_memory(call: AttentionCall, machine: Machine) -> Refused | None:
    """In float32 the template's tiles for head_dim 129 to 255 do not fit into shared memory ("No valid triton configs", torch
    2.11, H200); those for 256 are smaller."""
    if call.dtype != "float32":
        return None
    for name, size in (("head_dim", call.head_dim), ("value_dim", call.value_dim)):
        if not holds(size <= 128) and not holds(size == 256):
            return Refused(
                Code.HEAD_DIM,
                f"flex in float32 takes {name} up to 128, or 256, this is {described(size)}",
                "Run the model in bfloat16, or choose another kernel",
            )
    return None


FLEX_CUDA = Backend(
    name="flex",
    family="PyTorch",
    op=flex,
    summary="flex_attention: a Triton (CPU: C++) kernel made for the mask; needs Inductor to be fast",
    devices=frozenset({"cuda"}),
    capability=((8, 0), (12, 1)),
    dtypes=frozenset({"float16", "bfloat16", "float32"}),
    head_dim=HeadDim(max=256, minimum=16),  # from 257 on the template's tiles do not fit into shared memory
    masks=frozenset(MaskKind) - {MaskKind.CAUSAL_LOWER_RIGHT, MaskKind.QUERY_KEY_PADDING},
    mask_dtypes=frozenset({"float16", "bfloat16", "float32"}),
    gqa=True,
    value_dim=True,
    any_scale=True,
    backward=True,
    compiled=True,
    # The operator takes a dict of options. An exported model that calls flex_attention itself cannot be saved either (2.13).
    not_exported="torch.export.save cannot write the operator flex_attention",
    checks=(grouped_heads, shared_memory, grid),
    prepare=prepare,
    tested="sm_90",
)

FLEX_CPU = replace(
    FLEX_CUDA,
    devices=frozenset({"cpu"}),
    capability=None,
    head_dim=HeadDim(),
    backward=False,
    checks=(boolean_masks_from_2_13, static_lengths, one_key_under_a_mask),
    tested="CPU",
)

RECORDS = (FLEX_CUDA, FLEX_CPU)
