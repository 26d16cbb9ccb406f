"""Optional checks of the values around every swapped attention, which no guard can see.

Each check is a torch op that returns a copy of its first tensor, so that no compiler can remove the check or move it behind
the tensor's next use. The op reads values back to the host, which CUDA graphs do not allow: Inductor runs it outside of them
(`torch.Tag.cudagraph_unsafe`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..graphs.emitting import Emitter
from ..graphs.nodes import value_key, value_of, values_only
from ..kernels.ops import LIBRARY, NAMESPACE
from .found import Operand, Planned, Swapped
from .masks import build_mask

AXES = ("batch", "head", "position", "channel")
MASK_AXES = ("batch", "head", "query", "key")


class AttentionCheckError(RuntimeError):
    """An invalid value in the query, key, value, mask or output. The message names the site, the kernel and the position."""


def check_inputs(module: GraphModule, attentions: Sequence[Planned]) -> tuple[Planned, ...]:
    """Before the swap: routes the query of each call that will be swapped through the op `check_inputs`."""
    emitter = Emitter(module)

    def checked(planned: Planned) -> Planned:
        kernel, operands = planned.kernel, planned.operands
        if kernel is None or operands is None:
            return planned

        def tensor(operand: Operand) -> Tensor:
            return operand.emitted(emitter)

        output = value_of(planned.node)
        call = planned.call
        with emitter.before(planned.node, call.needs_grad, output[0] if isinstance(output, tuple) else output):
            query, key, value = (tensor(each) for each in (operands.query, operands.key, operands.value))
            mask = build_mask(operands.mask, getattr(torch, call.dtype), tensor)
            query = torch.ops.attnrewrite.check_inputs(query, key, value, mask, site=call.site, backend=kernel.name)
        return replace(planned, operands=replace(operands, query=Operand(emitter.node(query))))

    return tuple(map(checked, attentions))


def check_outputs(module: GraphModule, attentions: Sequence[Planned]) -> None:
    """After the swap: routes the output of each kernel through the op `check_output`."""
    key = value_key(module)
    for swapped in attentions:
        if not isinstance(swapped, Swapped):
            continue
        node, value = swapped.node, value_of(swapped.node)
        users = list(node.users)
        about: dict[str, Any] = {"site": swapped.call.site, "backend": str(swapped.kernel)}
        with module.graph.inserting_after(node):
            checked = module.graph.call_function(torch.ops.attnrewrite.check_output.default, (node,), about)
        with values_only(value, swapped.call.needs_grad):
            checked.meta = {**node.meta, key: value.clone()}
        for user in users:
            user.replace_input_with(node, checked)


def _check_inputs(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, site: str, backend: str) -> Tensor:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _finite(name, tensor, site, backend)
    if mask is not None and mask.numel():
        _some_key(mask, site, backend)
    return query.clone()


def _check_output(output: Tensor, *, site: str, backend: str) -> Tensor:
    _finite("output", output, site, backend)
    return output.clone()


def _finite(name: str, tensor: Tensor, site: str, backend: str) -> None:
    wrong = ~torch.isfinite(tensor)
    if wrong.any():
        index = tuple(int(place) for place in wrong.nonzero()[0])
        raise AttentionCheckError(
            f"the {name} of attention site {site!r} ({backend}) is not finite: {tensor[index].item()} at "
            f"{_place(index, AXES)}, {int(wrong.sum())} of {tensor.numel()} values"
        )


def _some_key(mask: Tensor, site: str, backend: str) -> None:
    if mask.dtype == torch.bool:
        valid = mask
    else:
        if (wrong := mask.isnan() | (mask == float("inf"))).any():
            index = tuple(int(place) for place in wrong.nonzero()[0])
            raise AttentionCheckError(
                f"the mask of attention site {site!r} ({backend}) is {mask[index].item()} at {_place(index, MASK_AXES)}"
            )
        valid = mask > torch.finfo(mask.dtype).min  # finfo.min stands for -inf if a kernel does not take -inf
    empty = ~valid.any(-1)
    if empty.any():
        index = tuple(int(place) for place in empty.nonzero()[0])
        raise AttentionCheckError(
            f"the mask of attention site {site!r} ({backend}) leaves no key to {_place(index, MASK_AXES[:-1])}, "
            f"{int(empty.sum())} of {empty.numel()} rows"
        )


def _place(index: tuple[int, ...], axes: tuple[str, ...]) -> str:
    """(0, 2, 5, 1) -> "batch 0, head 2, position 5, channel 1"; a tensor of lower rank uses the last axes."""
    names = (*(f"axis {axis}" for axis in range(len(index) - len(axes))), *axes[max(0, len(axes) - len(index)) :])
    return ", ".join(f"{name} {place}" for name, place in zip(names, index, strict=True)) or "its only row"


def _define(name: str, schema: str, real: Any) -> None:
    """Defines an op that is the identity for autograd. On fake tensors the op copies and checks nothing."""

    def fake(tensor: Tensor, *rest: Any, **strings: str) -> Tensor:
        return tensor.clone()

    def setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
        ctx.others = len(inputs) - 1

    def backward(ctx: Any, grad: Tensor) -> Any:
        return (grad, *([None] * ctx.others))

    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe))
    LIBRARY.impl(name, real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup, lib=LIBRARY)


STRINGS = "*, str site, str backend"
_define("check_inputs", f"(Tensor query, Tensor key, Tensor value, Tensor? mask, {STRINGS}) -> Tensor", _check_inputs)
_define("check_output", f"(Tensor output, {STRINGS}) -> Tensor", _check_output)
