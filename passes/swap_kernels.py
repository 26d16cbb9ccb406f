"""Carries out a plan: puts the chosen kernel where the call stood."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..calls import AttentionCall, Mask
from ..decisions import Accepted, Step
from ..emitting import Emitter
from ..graphs import value_of
from ..mutations import storage_of, written_storages
from ..ops import Origin
from ..plans import Site
from ..reasons import cast_to
from ..records import Backend
from ..sizes import holds
from ..strides import restrided, same_strides, strides_matter
from .context import Context, Found
from .find_calls import arguments, leading


def swap_kernels(graph_module: GraphModule, context: Context) -> int:
    """Replaces each call whose site chose a kernel with an op of its own.

    sdpa(q, k, v, boolean_mask)  ->  bias = where(mask, 0, -inf)  [once for all sites that read this mask]
                                     _scaled_dot_product_efficient_attention(q, k, v, bias, ...)[0]
    """
    emitter = Emitter(graph_module)
    written = written_storages(graph_module)
    swapped = 0
    for found in context.found:
        if found.site is not None and (kernel := found.kernel) is not None:
            _swap(found, found.site, kernel, emitter, written)
            swapped += 1
    return swapped


def _swap(found: Found, site: Site, backend: Backend, emitter: Emitter, written: set[int]) -> None:
    node, call = found.node, found.call
    given = arguments(node)
    old: torch.Tensor = value_of(node)
    with emitter.before(node, call.needs_grad):
        query, key, value = (emitter.tensor(given[name]) for name in ("query", "key", "value"))
        mask_node = given["attn_mask"]
        mask = emitter.tensor(mask_node) if isinstance(mask_node, Node) else None
        # A mask that the graph writes into may be another one at the next site: it is not shared.
        shared = mask_node if mask is None or storage_of(mask) not in written else (mask_node, call.site)
        output = launch(backend, call, Accepted(site.steps), site.source, query, key, value, mask, shared, emitter)
        if (output.shape, output.dtype, output.device) != (old.shape, old.dtype, old.device):
            raise RuntimeError(
                f"the op of attention backend {backend.name!r} returned {_form(output)} at site {call.site!r}, "
                f"where SDPA gives {_form(old)}: the record or its op is wrong"
            )
        if not same_strides(output, old) and strides_matter(node, output, written):
            output = restrided(output, old)
    node.replace_all_uses_with(emitter.node(output))
    found.node = emitter.node(output)
    emitter.graph.erase_node(node)


def launch(
    backend: Backend,
    call: AttentionCall,
    accepted: Accepted,
    source: str | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    shared: Any,
    emitter: Emitter,
) -> torch.Tensor:
    """From SDPA's tensors, of any rank, to the kernel's and back, by the steps of the plan. Sites of one `shared` key share
    what a mask becomes."""
    returned = getattr(torch, call.dtype)
    if (cast := accepted.step("cast")) is not None:
        call = cast_to(str(cast.after), call)
    shape = (*leading(query, key, value), call.heads) if query.dim() > 3 else leading(query, key, value)
    query, key, value = (_cast(tensor, call.dtype) for tensor in (query, key, value))
    query = _rank4(query, call.batch, call.heads, shape)
    key, value = (_rank4(tensor, call.batch, call.kv_heads, shape) for tensor in (key, value))
    call, query, key, value = _padded(accepted, call, query, key, value)

    # What a prepared mask may depend on besides the mask: it is shared, so no more than this is shown to `prepare`.
    about = replace(call, site="", role="", layout="", scale=None, dropout=0.0)

    def prepare() -> Any:
        wide = None if mask is None else _mask_rank4(_cast_mask(mask, call.mask, cast is not None), call, shape)
        return backend.prepare(wide, key, about) if backend.prepare else wide

    prepared = emitter.once((backend.prepare, shared, key.device, repr(about.described())), prepare)
    if backend.layout == "bshd":
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    query, key, value = (
        tensor if holds(tensor.stride(-1) == 1) else tensor.contiguous() for tensor in (query, key, value)
    )
    given: dict[str, Any] = {"origin": Origin(backend.name, source, call.site)} if source is not None else {}
    output: torch.Tensor = backend.op(query, key, value, prepared, call=call, **given)  # type: ignore[misc]
    if backend.layout == "bshd":
        output = output.transpose(1, 2)
    if output.shape[-1] is not call.value_dim and not holds(output.shape[-1] == call.value_dim):
        output = output[..., : call.value_dim]
    if output.dtype != returned:
        output = output.to(returned)
    wanted = (*shape, call.q_len, call.value_dim)
    return output if len(wanted) == 4 else output.reshape(wanted)


def _cast(tensor: torch.Tensor, dtype: str | None) -> torch.Tensor:
    """Under autocast SDPA casts what is floating; an op of ours is not on autocast's list, so the cast is written out."""
    wanted = getattr(torch, str(dtype))
    return tensor if tensor.dtype == wanted else tensor.to(wanted)


def _cast_mask(mask: torch.Tensor, wanted: Mask, chosen: bool) -> torch.Tensor:
    """As SDPA does under autocast; where the policy chose the cast, what was finite stays so: in a row that is masked with
    finfo.min throughout -inf would leave no key at all."""
    dtype = getattr(torch, str(wanted.dtype))
    if chosen and mask.is_floating_point() and mask.dtype != dtype:
        limit = torch.finfo(dtype).max
        mask = torch.where(mask.isinf(), mask, mask.clamp(-limit, limit))
    return _cast(mask, wanted.dtype)


def _rank4(tensor: torch.Tensor, batch: Any, heads: Any, shape: Any) -> torch.Tensor:
    """(..., heads, length, dim) -> (batch, heads, length, dim). Kernels do not broadcast: what SDPA would, is expanded."""
    length, dim = tensor.shape[-2:]
    lead = (*shape[:-1], heads) if len(shape) > 1 else tuple(shape)
    if len(lead) != tensor.dim() - 2 or any(not holds(a == b) for a, b in zip(tensor.shape[:-2], lead, strict=True)):
        tensor = tensor.expand(*lead, length, dim).contiguous()
    return tensor if tensor.dim() == 4 else tensor.reshape(batch, heads, length, dim)


def _mask_rank4(mask: torch.Tensor, call: AttentionCall, shape: Any) -> torch.Tensor:
    """A mask of any rank that broadcasts against (..., heads, q_len, kv_len), with four sizes; each may be 1."""
    rank = len(shape) + 2
    mask = mask[(None,) * (rank - mask.dim())]
    if rank == 2:
        return mask[None, None]
    if rank == 3:
        return mask.unsqueeze(1)
    if rank > 4:
        lead = mask.shape[:-3]
        if all(isinstance(size, int) and size == 1 for size in lead):
            return mask.reshape(1, *mask.shape[-3:])
        return mask.expand(*shape[:-1], *mask.shape[-3:]).reshape(call.batch, *mask.shape[-3:])
    return mask


def _padded(
    accepted: Accepted, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[AttentionCall, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Zeros behind the head dim change no score; the scale stays that of the true one."""

    def pad(tensor: torch.Tensor, step: Step | None) -> torch.Tensor:
        missing: Any = (0, 0 if step is None else step.after - tensor.shape[-1])  # type: ignore[operator]
        return tensor if step is None else torch.nn.functional.pad(tensor, missing)

    heads, values = accepted.step("pad_head_dim"), accepted.step("pad_value_dim")
    if heads is not None and call.scale is None:
        call = replace(call, scale=float(call.head_dim) ** -0.5)
    return call, pad(query, heads), pad(key, heads), pad(value, values)


def _form(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
