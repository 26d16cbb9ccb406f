"""Derivatives that no fused kernel has: of its backward, and forward ones. Plain autograd gives them where a graph runs as it
stands; compilers that trace a backward allow neither.

Attention that a model writes in tensor operations has them all. So the kernel gives the output and its gradient, and the same
attention in tensor operations any other derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from ..graphs.nodes import is_fake
from .calls import AttentionCall
from .machines import satisfies


def compilers_misread(call: AttentionCall) -> bool:
    """Whether a compiled backward of PyTorch's CPU kernel raises "expected scalar type Double but found Float": before torch
    2.13 the operator's fake version says that its log-sum-exp is float32, and in float64 the kernel returns it in float64."""
    read = call.needs_grad or call.logsumexp
    return (call.dtype, call.device) == ("float64", "cpu") and read and not satisfies(torch.__version__, ">=2.13")


def without_tangents(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as a kernel takes them. A tangent is that of a dual tensor (`torch.autograd.forward_ad`)."""
    if has_torch_function(tensors):
        return handle_torch_function(without_tangents, tensors, *tensors)
    if is_fake(tensors[0]):  # each value of a graph is an object of its own
        return tuple(each.view_as(each) for each in tensors)
    return tuple(forward_ad.unpack_dual(each).primal if _tangent(each) is not None else each for each in tensors)


def differentiable(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: str | None,
    scale: float | None,
    grouped: bool,
) -> Tensor:
    """`output`, which a kernel computed from the primals of the other tensors, with all derivatives.

    query, key, value: (..., heads, length, dim). mask: boolean or additive, broadcasts to (..., heads, q_len, kv_len). causal:
    "upper" or "lower", with the mask's corner; None for another mask. grouped: heads of the query share those of the key.
    """
    tensors = (query, key, value) if mask is None else (query, key, value, mask)
    if has_torch_function((output, *tensors)):
        arguments = (output, query, key, value, mask, causal, scale, grouped)
        return handle_torch_function(differentiable, (output, *tensors), *arguments)
    if any(_tangent(each) is not None for each in tensors):
        return in_operations((causal, scale, grouped), *tensors)
    return _Differentiable.apply((causal, scale, grouped), output, *tensors)  # type: ignore[no-untyped-call, no-any-return]


def once(name: str, gradients: Sequence[Any], tensors: Sequence[Tensor]) -> Sequence[Any]:
    """The gradients of a kernel, computed from the tensors. A derivative of them raises an error that has the kernel's name."""
    if not torch.is_grad_enabled():  # PyTorch turns it on in a backward only for `create_graph=True`
        return gradients
    return [_Once.apply(name, each, *tensors) if isinstance(each, Tensor) else each for each in gradients]  # type: ignore[no-untyped-call]


def _tangent(tensor: Tensor) -> Tensor | None:
    tangent: Tensor | None = forward_ad.unpack_dual(tensor).tangent
    return tangent


def in_operations(
    call: tuple[str | None, float | None, bool], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Attention by the math operator, which has every derivative. call: causal, scale and grouped, as `differentiable`
    takes them."""
    causal, scale, grouped = call
    if causal == "lower":
        q_len, kv_len = query.shape[-2], key.shape[-2]
        mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device).tril(kv_len - q_len)
    if mask is not None and mask.dtype == torch.bool:  # the operator would add 1 and 0
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    output: Tensor = torch.ops.aten._scaled_dot_product_attention_math.default(
        query, key, value, mask, 0.0, causal == "upper", scale=scale, enable_gqa=grouped
    )[0]
    return output


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Any, output: Tensor, *tensors: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(*tensors)
        return output.detach()  # unlike a view, it may be written into

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        tensors = ctx.saved_tensors
        if not torch.is_grad_enabled():  # the kernel's own backward
            return (None, grad, *[None] * len(tensors))
        own = [each.view_as(each) for each in tensors]  # query and key may be one tensor
        wanted = [each for each in own if each.requires_grad]
        found = iter(torch.autograd.grad(in_operations(ctx.call, *own), wanted, grad, create_graph=True))
        return (None, None, *(next(found) if each.requires_grad else None for each in own))


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, gradient: Tensor, *_: Tensor) -> Tensor:
        ctx.name = name
        return gradient.detach()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"{ctx.name} has no second derivative. Give the attention another kernel: _native_math has all of them"
        )
