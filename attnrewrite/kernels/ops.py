"""`register`: the one place that makes a torch op from a third-party function.

torch.compile, torch.export and CUDA graphs can hold such an op, `torch.ops.attnrewrite.<name>`. Each op takes three strings
besides its own arguments: the fields of `Origin`.

Ops are made with `torch.library.Library`, whose ops cost less per call than those of `torch.library.custom_op`;
bench/op_overhead.py prints the time that an op adds to the library's own call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..graphs.devices import on_device_of
from .derivatives import once
from .sources import library

NAMESPACE = "attnrewrite"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

Shape = Sequence[int]


@dataclass(frozen=True)
class Origin:
    """Where a call of an op comes from; the op's errors name it."""

    backend: str  # "_flash_3_hub"
    source: str  # the loaded library that the op calls (`sources.load`): "kernels-community/flash-attn3@<commit>"
    site: str  # "blocks.0.attn1"


STRINGS = "*, str backend, str source, str site"


@dataclass(frozen=True)
class Op:
    """A registered function, as torch ops."""

    forward: Any  # without autograd
    backward: Any = None  # without autograd; None where the function has no backward
    autograd: Any = None  # both together, differentiable; None without a backward

    def __call__(self, *args: Any, needs_grad: bool, origin: Origin) -> Any:
        """Calls `autograd` for `needs_grad`, otherwise `forward`, with no autograd kernel in between."""
        return (self.autograd if needs_grad else self.forward)(*args, **vars(origin))


def register(
    name: str,
    schema: str,
    real: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    flops: Callable[..., int],
    backward: Callable[..., Sequence[Tensor]] | None = None,
    backward_flops: Callable[..., int] | None = None,
    tags: tuple[torch.Tag, ...] = (),
) -> Op:
    """Makes `torch.ops.attnrewrite.<name>` from `real(library, *args)`.

    schema: "(Tensor query, Tensor key, Tensor value, ...) -> Tensor", or "-> (Tensor, Tensor)" for output and log-sum-exp
        (float32); `register` adds the three strings of `Origin`.
    fake(*args): the result on fake tensors. The result of `real` must have the same shapes, dtypes and strides.
    backward(library, grad, output, logsumexp, *args): the gradients of query, key and value, each dense in the dimension order
        of its tensor (`torch.empty_like`).
    flops(*shapes and arguments, out_shape): the FLOPs of a call's matrix products, for `torch.utils.flop_counter`.
    backward_flops: the same for the backward; required with one.
    tags: additional PyTorch tags, as `torch.Tag.cudagraph_unsafe`.

    The op runs with the GPU of its first tensor as the current CUDA device, since Triton and CuTe launch on the current one. It
    raises the library's exceptions as a `RuntimeError` that names the site, the backend, its source and the shapes.
    """
    takes, returns = schema.removeprefix("(").split(") -> ")
    forward = _define(name, f"({takes}, {STRINGS}) -> {returns}", real, fake, flops, tags)
    if backward is None:
        return Op(forward)

    def fake_backward(grad: Tensor, output: Tensor, logsumexp: Tensor, *args: Any) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in args[:3])

    backward_schema = f"(Tensor grad, Tensor output, Tensor logsumexp, {takes}, {STRINGS}) -> (Tensor, Tensor, Tensor)"
    assert backward_flops is not None
    back = _define(f"{name}_backward", backward_schema, backward, fake_backward, backward_flops, tags)
    return Op(forward, back, _with_autograd(name, f"({takes}, {STRINGS}) -> {returns}", forward, back))


def _define(
    name: str, schema: str, real: Callable[..., Any], fake: Callable[..., Any], flops: Callable[..., int], tags: Any
) -> Any:
    def run(*args: Any, backend: str, source: str, site: str) -> Any:
        module = library(source)
        try:
            with on_device_of(args[0]):
                return real(module, *args)
        except Exception as error:
            raise _named(error, args, Origin(backend, source, site)) from error

    def fake_run(*args: Any, **_: str) -> Any:
        return fake(*args)

    def count(*args: Any, **_: Any) -> int:
        return flops(*args)

    op = opaque(name, schema, run, fake_run, tags)
    register_flop_formula(op.overloadpacket)(count)
    return op


def opaque(
    name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any], tags: tuple[torch.Tag, ...] = ()
) -> Any:
    """Makes `torch.ops.attnrewrite.<name>` of a function, into which no compiler looks.

    fake(*args): the result on fake tensors, with the shapes, dtypes and strides of `run`'s.
    """
    LIBRARY.define(f"{name}{schema}", tags=TAGS + tags)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _with_autograd(name: str, schema: str, forward: Any, backward: Any) -> Any:
    """An op that decomposes, at the dispatcher's autograd keys, into `forward` and, for a gradient, `backward`."""

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, strings: dict[str, str], *args: Any) -> Any:
            output, logsumexp = forward(*args, **strings)
            tensors = [value for value in args if isinstance(value, Tensor)]
            ctx.save_for_backward(output, logsumexp, *tensors)
            ctx.args = [None if isinstance(value, Tensor) else value for value in args]
            ctx.places = [place for place, value in enumerate(args) if isinstance(value, Tensor)]
            ctx.strings = strings
            ctx.mark_non_differentiable(logsumexp)
            ctx.set_materialize_grads(False)
            return output, logsumexp

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None, _: Any) -> Any:
            output, logsumexp, *tensors = ctx.saved_tensors
            args = list(ctx.args)
            if grad is None:  # the gradient goes another way (`derivatives.differentiable`)
                return (None, *([None] * len(args)))
            for place, tensor in zip(ctx.places, tensors, strict=True):
                args[place] = tensor
            grads = backward(grad, output, logsumexp, *args, **ctx.strings)
            grads = once(ctx.strings["backend"], grads, (grad, *tensors))
            return (None, *grads, *([None] * (len(args) - 3)))

    def run(*args: Any, **strings: str) -> Any:
        return Attention.apply(strings, *args)  # type: ignore[no-untyped-call]

    def below(*args: Any, **strings: str) -> Any:
        return forward(*args, **strings)

    full = f"{name}_autograd"
    LIBRARY.define(f"{full}{schema}", tags=TAGS)
    LIBRARY.impl(full, below, "CompositeExplicitAutograd")
    LIBRARY.impl(full, run, "Autograd")
    return getattr(getattr(torch.ops, NAMESPACE), full).default


def _named(error: Exception, args: tuple[Any, ...], origin: Origin) -> RuntimeError:
    shapes = ", ".join(
        f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}" for value in args if isinstance(value, Tensor)
    )
    return RuntimeError(
        f"{origin.backend} ({origin.source}) failed at attention site {origin.site!r} on tensors {shapes}: "
        f"{type(error).__name__}: {error}. Give this site another kernel: rules={{{origin.site!r}: 'native'}}"
    )


# -- parts of most fakes and FLOP formulas; a query is (batch, length, heads, dim), or packed (tokens, heads, dim)


def zero_unless(condition: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor where a boolean condition holds, zeros elsewhere, even for NaN. The condition broadcasts to the tensor."""
    return torch.where(condition, tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device))


def dense_output(query: Tensor, value: Tensor) -> Tensor:
    """A new dense tensor with the sizes of the query and the head dim of the value."""
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def logsumexp_of(query: Tensor, wanted: bool) -> Tensor:
    """A new float32 tensor (batch, heads, length), or packed (heads, tokens); (0,) where it is not wanted."""
    shape = (query.shape[0], query.shape[2], query.shape[1]) if query.dim() == 4 else (query.shape[1], query.shape[0])
    return query.new_empty(shape if wanted else (0,), dtype=torch.float32)


def products(query: Shape, key: Shape, value: Shape, *_: Any) -> int:
    """The FLOPs of two matrix products: 2 * (head_dim + value_dim) for each pair of query and key."""
    batch, q_len, heads, dim = query
    return 2 * batch * heads * q_len * key[1] * (dim + value[-1])


def backward_products(
    grad: Shape, output: Shape, logsumexp: Shape, query: Shape, key: Shape, value: Shape, *_: Any
) -> int:
    """The FLOPs of five matrix products: the scores again, and the gradients of weights, value, query and key."""
    batch, q_len, heads, dim = query
    return 2 * batch * heads * q_len * key[1] * (3 * dim + 2 * value[-1])


def packed_products(
    query: Shape, key: Shape, value: Shape, cu_q: Shape, cu_k: Shape, max_q: int, max_k: int, *_: Any
) -> int:
    """As `products`, with `max_k` keys in every sequence: only the device knows the true lengths."""
    tokens, heads, dim = query
    return 2 * heads * tokens * max_k * (dim + value[-1])


def packed_backward_products(grad: Shape, output: Shape, logsumexp: Shape, *args: Any) -> int:
    query, _, value, _, _, _, max_k = args[:7]
    tokens, heads, dim = query
    return int(2 * heads * tokens * max_k * (3 * dim + 2 * value[-1]))
