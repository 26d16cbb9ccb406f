"""Makes the `op` of a record from the two kinds of functions that most attention libraries have: functions of batched tensors
and functions of packed tensors. A function with more arguments is registered directly (`ops.register`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .calls import AttentionCall
from .packing import Packing, pack, unpack

Kernel = Callable[..., Tensor]

DENSE = "(Tensor query, Tensor key, Tensor value, bool causal, float? scale)"
WINDOW = ", int left, int right"  # of `window_size`
PACKED = (
    "(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, bool causal, float? scale)"
)


def dense_kernel(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Sequence[Tensor]] | None = None,
    *,
    windows: bool = False,
    output: Callable[[Tensor, Tensor], Tensor] = ops.dense_output,
    tags: tuple[torch.Tag, ...] = (),
) -> Kernel:
    """Makes `torch.ops.attnrewrite.<name>` from a function of batched tensors, for a record with `layout="bshd"`.

    forward(library, query, key, value, causal, scale): tensors are (batch, length, heads, dim); the record's `masks` say how
        causal is aligned; scale is None for 1 / sqrt(head_dim). Returns the output (batch, q_len, heads, value_dim), or a tuple
        that begins with it; with a backward, (output, log-sum-exp in float32 (batch, heads, q_len)).
    backward(library, grad, output, logsumexp, query, key, value, causal, scale): the gradients of query, key and value, which
        are copied where they are not dense in the dimension order of their tensors.
    windows: both functions also get `left` and `right` (`window_size`) behind the scale: the record takes sliding windows.
    output(query, value): an empty tensor with the strides of the output of `forward`. By default the output is made dense.
    tags: as in `ops.register`.
    """
    takes = _with_window(DENSE) if windows else DENSE
    op = _registered(name, takes, forward, backward, output, tags, (ops.products, ops.backward_products))

    def kernel(
        query: Tensor, key: Tensor, value: Tensor, _: None, *, call: AttentionCall, origin: ops.Origin
    ) -> Tensor:
        needs_grad = call.needs_grad and backward is not None
        window = window_size(call) if windows else ()
        found = op(query, key, value, call.mask.is_causal, call.scale, *window, needs_grad=needs_grad, origin=origin)
        return _first(found)

    return kernel


def packed_kernel(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Sequence[Tensor]] | None = None,
    *,
    windows: bool = False,
    output: Callable[[Tensor, Tensor], Tensor] = ops.dense_output,
    tags: tuple[torch.Tag, ...] = (),
) -> Kernel:
    """Makes `torch.ops.attnrewrite.<name>` from a function of packed tensors, for a record with `layout="bshd"`,
    `prepare=packing` and `steps=packing_steps`. Such a record takes key padding.

    forward(library, query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale): query, key and
        value are (tokens, heads, dim), the starts of sequences int32 (batch + 1,). Must not read keys behind the end of the
        last sequence. Returns the output (tokens, heads, value_dim), or a tuple that begins with it; with a backward, (output,
        log-sum-exp in float32 (heads, tokens)).
    backward(library, grad, output, logsumexp, query, ..., scale): the gradients of query, key and value.
    windows, output, tags: as in `dense_kernel`.
    """
    formulas = (ops.packed_products, ops.packed_backward_products)
    takes = _with_window(PACKED) if windows else PACKED
    op = _registered(name, takes, forward, backward, output, tags, formulas)

    def kernel(
        query: Tensor, key: Tensor, value: Tensor, packed: Packing, *, call: AttentionCall, origin: ops.Origin
    ) -> Tensor:
        needs_grad = call.needs_grad and backward is not None
        found = op(
            *pack(query, key, value, packed), packed.cu_seqlens_q, packed.cu_seqlens_k, call.q_len, call.kv_len,
            call.mask.is_causal, call.scale, *(window_size(call) if windows else ()), needs_grad=needs_grad, origin=origin,
        )  # fmt: skip
        return unpack(_first(found), call)

    return kernel


def window_size(call: AttentionCall) -> tuple[int, int]:
    """A sliding window as FlashAttention takes it: the keys before and after a query's own position, -1 for all of them. Any
    other mask gives (-1, -1)."""
    left, right = call.mask.window or (None, None)
    return (-1 if left is None else int(left), -1 if right is None else int(right))


def _with_window(takes: str) -> str:
    return f"{takes.removesuffix(')')}{WINDOW})"


def _registered(
    name: str,
    takes: str,
    forward: Callable[..., Any],
    backward: Callable[..., Sequence[Tensor]] | None,
    output: Callable[[Tensor, Tensor], Tensor],
    tags: tuple[torch.Tag, ...],
    formulas: tuple[Callable[..., int], Callable[..., int]],
) -> ops.Op:
    flops, backward_flops = formulas
    if backward is None:
        return ops.register(
            name,
            f"{takes} -> Tensor",
            lambda library, *args: _dense(_first(forward(library, *args)), output),
            lambda query, key, value, *_: output(query, value),
            flops=flops,
            tags=tags,
        )
    return ops.register(
        name,
        f"{takes} -> (Tensor, Tensor)",
        lambda library, *args: _with_logsumexp(forward(library, *args), output),
        lambda query, key, value, *_: (output(query, value), ops.logsumexp_of(query, True)),
        flops=flops,
        backward=lambda library, *args: _like(backward(library, *args), args[3:6]),
        backward_flops=backward_flops,
        tags=tags,
    )


def _first(result: Any) -> Tensor:
    """The output alone: some versions of a library return the log-sum-exp too."""
    output: Tensor = result[0] if isinstance(result, tuple | list) else result
    return output


def _with_logsumexp(result: Sequence[Tensor], output: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    return _dense(result[0], output), result[1]


def _like(gradients: Sequence[Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Each gradient, dense in the dimension order of its tensor, as autograd is told."""
    found = []
    for gradient, tensor in zip(gradients, tensors, strict=True):
        empty = torch.empty_like(tensor)
        found.append(gradient if gradient.stride() == empty.stride() else empty.copy_(gradient))
    return tuple(found)


def _dense(tensor: Tensor, output: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return tensor.contiguous() if output is ops.dense_output else tensor
