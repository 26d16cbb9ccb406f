"""comfy-kitchen: Sol-Attn, which is sparse, and int8 attention. https://github.com/Comfy-Org/comfy-kitchen, tried with 0.2.40.

Sol-Attn (arXiv 2607.24027) takes blocks of 64 tokens. Each block of queries attends some key blocks exactly: its own and its
neighbours, the sinks, and those that its mean query scores highest. Each of the other key blocks is one term of the softmax, of
its mean key and the sum of its values. That is right where neighbours in the sequence are alike, as in a trained model of
videos, and wrong where they are not: on an H200 the error is 1.1e-2 on data with the structure of a video, 0.8 on Gaussian
data. Only a measurement on the model's own tensors can tell (`attnrewrite.tune`).

The sinks are the short part of a sequence that the graph joins of two, as the text beside a video, or as many tokens as the
option `sinks` says. Keys that are padding may be sinks alone, since a hidden key would stay in the mean of any other block.
Where the graph does not prove that the others are all seen, the op asks the mask at each call, and is SDPA if it hides one of
them.

The int8 attention rotates queries and keys, and runs both products in int8. On Hopper FlashAttention 3 is faster, and cuDNN
where there is no mask; it is for GPUs without fp8, and for masks.

Both are forward only. The library's own torch ops are not in the graph: that of the int8 attention states dense strides for an
output that is a slice, where the head_dim is none of 64, 128 and 256.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..graphs.sizes import Size, described, holds
from ..kernels import ops
from ..kernels.calls import AttentionCall, MaskKind
from ..kernels.decisions import Code, Refused, Step
from ..kernels.few_queries import attend, attend_few
from ..kernels.machines import Machine
from ..kernels.records import Backend, HeadDim, Numerics, Option, Tolerance
from ..kernels.sources import Package

BLOCK = 64  # tokens
# Added to the score of a hidden key: a block whose keys are all at -inf would make NaN of a running maximum.
HIDDEN = -1e30

# -- the library's functions


def sol_forward(
    library: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, tau: float,
    ratio: float, sinks: int,
) -> Tensor:  # fmt: skip
    blocks = sink_blocks(query.shape[1], sinks)
    tokens = (BLOCK * blocks[0], min(BLOCK * blocks[1], query.shape[1]))
    if tokens == (0, query.shape[1]):
        return dense(query, key, value, mask, scale)
    query, key, value = (aligned(tensor) for tensor in (query, key, value))
    output: Tensor = library.sol_attn(
        query, key, value, tau=tau, scale=scale, topk_ratio=ratio, sink_blocks=blocks, sink_q=[0, 0],
        key_bias=None if mask is None else torch.where(mask, 0.0, HIDDEN),
    )  # fmt: skip
    if blocks[0] < blocks[1]:
        # By `sink_q` the kernel computes these rows too: one block of 64 queries walks over all keys, while the rest of the GPU
        # waits (bench/sink_rows.py).
        rows = slice(*tokens)
        output[:, rows] = attend_few(query[:, rows], key, value, mask, scale, tokens)
    return output


def sol_padded_forward(
    library: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None, tau: float,
    ratio: float, sinks: int,
) -> Tensor:  # fmt: skip
    """The same for a mask that may hide keys of any block."""
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "it reads from the mask whether other keys than the sinks are hidden, which no CUDA graph can record: capture the "
            "model without this kernel, or build the mask in the compiled model, as ones beside the mask of the text"
        )
    first, end = (BLOCK * block for block in sink_blocks(query.shape[1], sinks))
    if mask[:, :first].all() & mask[:, end:].all():
        return sol_forward(library, query, key, value, mask, scale, tau, ratio, sinks)
    return dense(query, key, value, mask, scale)


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Every block exactly; zeros for rows that see no key."""
    output = attend(query, key, value, mask, scale).contiguous()
    return output if mask is None else ops.zero_unless(mask.any(-1)[:, None, None, None], output)


def sink_blocks(length: int, sinks: int) -> list[int]:
    """The first block that holds one of the first `sinks` tokens, or of the last `-sinks`, and the first behind them."""
    blocks = -(-length // BLOCK)
    if sinks < 0:
        return [max(0, length + sinks) // BLOCK, blocks]
    return [0, min(blocks, -(-sinks // BLOCK))]


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where the kernel's loads of 16 bytes cannot read it: the library raises for those."""
    element = 16 // tensor.element_size()
    strides = (stride for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True) if size > 1)
    if tensor.data_ptr() % 16 or any(stride % element for stride in strides):
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


SOL = ops.register(
    "sol",
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, float? scale, float tau, float ratio, SymInt sinks) -> Tensor",
    sol_forward,
    lambda query, key, value, *_: ops.dense_output(query, value),
    flops=ops.products,  # of dense attention: how many of them run depends on the data
)
SOL_PADDED = ops.register(
    "sol_padded",
    "(Tensor query, Tensor key, Tensor value, Tensor mask, float? scale, float tau, float ratio, SymInt sinks) -> Tensor",
    sol_padded_forward,
    lambda query, key, value, *_: ops.dense_output(query, value),
    flops=ops.products,
    tags=(torch.Tag.cudagraph_unsafe,),  # it reads the mask back to the host
)


def int8_forward(
    library: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    output: Tensor = library.int8_attention(query, key, value, scale=scale, attn_mask=mask)
    return output.contiguous()


INT8 = ops.register(
    "ck_int8",
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, float? scale) -> Tensor",
    int8_forward,
    lambda query, key, value, *_: ops.dense_output(query, value),
    flops=lambda query, key, value, *_: 4 * query[0] * query[1] * query[2] * key[2] * query[3],
)

# -- the code that is emitted into the graph


def sol(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, call: AttentionCall, origin: ops.Origin,
    tau: float = 1.0, sinks: int | None = None,
) -> Tensor:  # fmt: skip
    return _sol(query, key, value, mask, call, origin, tau, 0.0, sinks)


def sol_topk(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, call: AttentionCall, origin: ops.Origin,
    ratio: float = 0.25, sinks: int | None = None,
) -> Tensor:  # fmt: skip
    return _sol(query, key, value, mask, call, origin, 1.0, ratio, sinks)


def _sol(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, call: AttentionCall, origin: ops.Origin, tau: float,
    ratio: float, sinks: int | None,
) -> Tensor:  # fmt: skip
    op = SOL if mask is None or only_sinks_are_hidden(call, sinks) else SOL_PADDED
    number = sinks_of(call, sinks)
    output: Tensor = op(query, key, value, mask, call.scale, tau, ratio, number, needs_grad=False, origin=origin)
    return output


def hidden_keys(mask: Tensor | None, key: Tensor, call: AttentionCall) -> Tensor | None:
    """Key padding as (batch or 1, kv_len), True where a key takes part."""
    if mask is None:
        return None
    valid: Tensor = mask.select(1, 0).select(1, 0)
    return valid.expand(valid.shape[0], call.kv_len)


def int8(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, call: AttentionCall, origin: ops.Origin
) -> Tensor:
    output: Tensor = INT8(query, key, value, mask, call.scale, needs_grad=False, origin=origin)
    # A row that sees no key is zero, as in SDPA. (batch, heads, q_len, 1), with 1 where the mask has it.
    return output if mask is None else ops.zero_unless(mask.any(-1, keepdim=True), output)


# -- limits that no field of a record expresses


def long_part(call: AttentionCall) -> int | None:
    """The part of a joined sequence that is longer than all others together, by its place. None where it does not stand at an
    end, and where the graph joins nothing."""
    if len(call.joined) < 2:
        return None
    total: Any = sum(call.joined)
    for place in (0, len(call.joined) - 1):
        if holds(2 * call.joined[place] > total):
            return place
    return None


def sinks_of(call: AttentionCall, sinks: int | None = None) -> Size:
    """How many tokens are sinks: the first ones, or -n: the last n. sinks: the option, where it is given."""
    if sinks is not None:
        return sinks
    long = long_part(call)
    if long is None:
        return 0
    others: Any = sum(call.joined[1:]) if long == 0 else sum(call.joined[:-1])
    found: Size = -others if long == 0 else others
    return found


def only_sinks_are_hidden(call: AttentionCall, sinks: int | None = None) -> bool:
    """Whether the graph proves that key padding hides none but derived sinks."""
    return sinks is None and long_part(call) in call.mask.whole


def padding_of_sinks(call: AttentionCall, machine: Machine, sinks: int | None = None) -> Refused | None:
    if call.mask.kind is not MaskKind.KEY_PADDING:
        return None
    number = sinks_of(call, sinks)
    if not (isinstance(number, int) and number == 0):
        return None
    return Refused(
        Code.MASK,
        "Sol-Attn hides keys that are sinks alone, and the graph does not show a short part of the sequence, as a text: "
        f"the call has a mask: {call.mask}",
        "Say by the option sinks=N, or sinks=-N for the last N, which tokens are the text, or choose another kernel here",
    )


def sink_steps(call: AttentionCall, sinks: int | None = None) -> tuple[Step, ...]:
    number = sinks_of(call, sinks)
    if isinstance(number, int) and number == 0:
        return ()
    last = long_part(call) == 0 if sinks is None else sinks < 0
    tokens = f"the {'last' if last else 'first'} {described(-number if last else number)} tokens"
    found = [Step("sinks", tokens, "exact blocks", "all tokens attend them, and they all tokens")]
    if call.mask.kind is MaskKind.KEY_PADDING and not only_sinks_are_hidden(call, sinks):
        cost = "each call reads the mask; it is SDPA where the mask hides another key"
        found.append(Step("check_padding", "key padding", "padding of the sinks", cost))
    return tuple(found)


def with_sinks(record: Backend, options: Mapping[str, Any]) -> Backend:
    sinks = options.get("sinks")
    check = partial(padding_of_sinks, sinks=sinks)
    return replace(record, mask_check=check, steps=partial(sink_steps, sinks=sinks))


def as_many_queries_as_keys(call: AttentionCall, machine: Machine) -> Refused | None:
    if holds(call.q_len == call.kv_len):
        return None
    return Refused(
        Code.LENGTH,
        "Sol-Attn is for self attention, with as many queries as keys: "
        f"q_len is {described(call.q_len)}, kv_len {described(call.kv_len)}",
        "Choose another kernel for this site by a rule",
    )


SINKS = Option(
    None, -65_536, 65_536,
    "tokens that always attend and are attended exactly: the first ones, or -n: the last n; derived: the short part of a "
    "sequence that the graph joins",
)  # fmt: skip
SOL_ATTN = Backend(
    name="sol",
    family="comfy-kitchen",
    op=sol,
    summary="Sol-Attn: blocks of keys above a threshold exactly, the others by one term each",
    devices=frozenset({"cuda"}),
    capability=((8, 0), (12, 1)),
    dtypes=frozenset({"float16", "bfloat16"}),
    head_dim=HeadDim(max=128, multiple=128, pad=True),
    max_batch=65_535,
    layout="bshd",
    numerics=Numerics.SPARSE,
    tolerance=Tolerance(2e-2, "the far blocks by one term each: 1.1e-2 measured on data with the structure of a video"),
    masks=frozenset({MaskKind.NONE, MaskKind.KEY_PADDING}),
    prepare=hidden_keys,
    steps=sink_steps,
    mask_check=padding_of_sinks,
    checks=(as_many_queries_as_keys,),
    configured=with_sinks,
    tested="sm_90",
    source=Package("comfy-kitchen", "comfy_kitchen"),
    requires={"comfy-kitchen": ">=0.2.40"},
    options={
        "tau": Option(1.0, 0.0, 8.0, "the threshold in standard deviations of a row's scores: higher is sparser"),
        "sinks": SINKS,
    },
    # On an H200 at 32,760 and 75,600 tokens tau=0 was no faster than FlashAttention 3, and the error grew threefold from 1 to 2
    # and again from 2 to 3 (bench/results/sparse_models_h200.json).
    variants=("tau=1.5", "tau=2.0", "tau=2.5", "tau=3.0", "tau=3.5"),
)
SOL_TOPK = replace(
    SOL_ATTN,
    name="sol_topk",
    op=sol_topk,
    summary="Sol-Attn: the same part of the blocks of keys exactly for every block of queries",
    options={"ratio": Option(0.25, 0.01, 0.99, "the part of the blocks that is exact"), "sinks": SINKS},
    variants=("ratio=0.05", "ratio=0.1"),
)
CK_INT8 = Backend(
    name="ck_int8",
    family="comfy-kitchen",
    op=int8,
    summary="rotated queries and keys in int8, both products in int8",
    devices=frozenset({"cuda"}),
    capability=((8, 0), (12, 1)),
    dtypes=frozenset({"float16", "bfloat16"}),
    head_dim=HeadDim(max=256, multiple=64, pad=True),
    masks=frozenset({MaskKind.NONE, MaskKind.KEY_PADDING, MaskKind.BOOLEAN}),
    gqa=True,
    max_batch=65_535,
    numerics=Numerics.QUANTISED,
    tolerance=Tolerance(3.5e-2, "int8 scores and values: 1.7e-2 measured on Gaussian data"),
    tested="sm_90",
    source=Package("comfy-kitchen", "comfy_kitchen"),
    requires={"comfy-kitchen": ">=0.2.40"},
)

RECORDS = (SOL_ATTN, SOL_TOPK, CK_INT8)
