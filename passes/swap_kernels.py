"""Carries out a plan: replaces calls with the chosen kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ..graphs.axes import applied
from ..graphs.emitting import Emitter
from ..graphs.mutations import CHECK, storage_of, written_storages
from ..graphs.nodes import SDPA, value_of
from ..graphs.questions import asking
from ..graphs.sizes import always, holds
from ..graphs.spellings import spelled
from ..graphs.strides import restrided, same_strides, strides_matter
from ..graphs.tracing import in_forward_mode
from ..kernels.calls import AttentionCall, Mask, MaskKind
from ..kernels.decisions import Accepted, Step
from ..kernels.derivatives import compilers_misread, differentiable, in_operations, without_tangents
from ..kernels.ops import Origin, zero_unless
from ..kernels.records import Backend
from ..kernels.shapes import lead_sizes, mask_rank4
from ..masks.building import Built, built
from ..planning.reasons import cast_to
from .found import Operand, Operands, Planned, Swapped
from .masks import build_mask, build_rows, rows_matter


def swap_kernels(
    graph_module: GraphModule, attentions: Sequence[Planned], as_it_stands: bool = False
) -> tuple[Planned, ...]:
    """Replaces each call that has a chosen kernel. Returns all attentions in the same order, the replaced ones as `Swapped`.

    sdpa(q, k, v, boolean_mask)  ->  bias = where(mask, 0, -inf)  [once for all sites that read this mask]
                                     _scaled_dot_product_efficient_attention(q, k, v, bias, ...)[0]

    softmax(q @ k.mT * scale) @ v  ->  the same; `native` makes it scaled_dot_product_attention(q, k, v, scale=scale).

    as_it_stands: the graph runs as it is, under plain autograd.
    """
    emitter = Emitter(graph_module)
    written = written_storages(graph_module)
    moved: dict[Node, Node] = {}  # the output of one attention may be an operand of the next
    done: list[Planned] = []
    for planned in attentions:
        kernel, operands = planned.kernel, planned.operands
        if kernel is None or operands is None:
            done.append(planned)
            continue
        with asking(planned.call.site, kernel.name):
            old, new = _swap(planned, operands.moved(moved), kernel, emitter, written, as_it_stands)
        moved |= dict.fromkeys(old, new)
        done.append(planned.then(Swapped, node=new))
    return tuple(done)


def _swap(
    planned: Planned, operands: Operands, backend: Backend, emitter: Emitter, written: set[int], as_it_stands: bool
) -> tuple[list[Node], Node]:
    """Returns the nodes that gave the attention's output, and the node that gives it now."""
    node, call, site = planned.node, planned.call, planned.site
    fused = isinstance(value_of(node), tuple)
    old: torch.Tensor = value_of(node)[0] if fused else value_of(node)

    def tensor(operand: Operand) -> torch.Tensor:
        return operand.emitted(emitter)

    with emitter.before(node, call.needs_grad, old):
        query, key, value = (tensor(each) for each in (operands.query, operands.key, operands.value))
        # Where the kernel gets a boolean mask that is proven, `built` takes care of rows without a key.
        proven = site.mask_as != "given" and planned.proof is not None and planned.proof.keep is not None
        rows = not proven and rows_matter(operands, call.needs_grad)
        given, shared = _mask(operands, call, tensor, emitter, written, rows)
        made = built(
            call, None if rows else planned.proof, site.mask_as, given and (lambda: given()[0]), shared, emitter
        )
        alive = given()[1] if rows and given is not None else made.alive
        if alive is not None:
            query = zero_unless(alive, query)

        logsumexp: list[torch.Tensor] = []

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, made: Built) -> torch.Tensor:
            if backend.op is None:
                return _native(made.call, query, key, value, made.mask, emitter, as_it_stands)
            accepted, shared = Accepted(site.steps, site.mask_as), made.shared
            output, *more = launch(
                backend, made.call, accepted, site.source, query, key, value, made.mask, shared, emitter
            )
            logsumexp.extend(more)
            return output

        derived = as_it_stands and _loses_derivatives(call, backend)
        output = _with_derivatives(attend, query, key, value, made) if derived else attend(query, key, value, made)
        if made.queries is not None:
            output = zero_unless(made.queries, output)
        output = applied(output, operands.result)
        if derived and storage_of(old) in written:
            output = output.clone()  # kernels keep their output for the backward, the product with the values does not
        if not _are_alike(output, old):
            raise RuntimeError(
                f"the op of attention backend {backend.name!r} returned {_about(output)} at site {call.site!r}, "
                f"where SDPA gives {_about(old)}: the record or its op is wrong"
            )
        outputs = [user for user in node.users if user.args[1] == 0] if fused else [node]
        if not same_strides(output, old) and any(strides_matter(each, output, written) for each in outputs):
            output = restrided(output, old)
    new = emitter.node(output)
    for each in outputs:
        each.replace_all_uses_with(new)
    for each in [user for user in node.users if logsumexp and user.args[1] == 1]:
        each.replace_all_uses_with(emitter.node(logsumexp[0]))
    _erase([node, *node.users, *planned.chain], emitter.graph)  # a fused kernel has other results, which nothing reads
    return outputs, new


def _loses_derivatives(call: AttentionCall, backend: Backend) -> bool:
    """Whether the model's operations may be asked, by plain autograd, for derivatives that the kernel lacks."""
    asked = call.written_as == "operations" and (call.needs_grad or in_forward_mode())
    return asked and call.dropout == 0 and not backend.all_scores


def _with_derivatives(
    attend: Callable[..., torch.Tensor], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, made: Built
) -> torch.Tensor:
    call, mask = made.call, made.mask
    if mask is not None and mask.is_floating_point():
        made = replace(made, mask=without_tangents(mask)[0], shared=(made.shared, call.site))
    output = attend(*without_tangents(query, key, value), made)
    query, key, value = (_cast(each, call.dtype) for each in (query, key, value))
    return differentiable(output, query, key, value, mask, *_attention(call, query))


def _attention(call: AttentionCall, query: torch.Tensor) -> tuple[str | None, float | None, bool]:
    """causal, scale and grouped, as `differentiable` takes them."""
    causal = {MaskKind.CAUSAL_UPPER_LEFT: "upper", MaskKind.CAUSAL_LOWER_RIGHT: "lower"}.get(call.mask.kind)
    return causal, call.scale, query.dim() > 3 and not always(call.heads == call.kv_heads)


MaskAndRows = tuple[torch.Tensor, torch.Tensor | None]


def _mask(
    operands: Operands, call: AttentionCall, tensor: Any, emitter: Emitter, written: set[int], rows: bool
) -> tuple[Callable[[], MaskAndRows] | None, Any]:
    """A function that returns the mask as one tensor, and if `rows` the rows that see a key; and the key under which sites
    share the tensor prepared from the mask."""
    if not operands.mask:
        return None, None
    nodes = [term.tensor.node for term in operands.mask]
    shared: Any = (
        tuple(nodes),
        repr([(term.tensor.views, term.tensor.pads, term.how, term.amount) for term in operands.mask]),
        call.dtype,
        rows,
        operands.vanishing,
    )
    # A mask that the graph writes into may have other values at the next site: it is not shared.
    if any(storage_of(value_of(node)) in written for node in nodes):
        shared = (shared, call.site)
    (first, *rest) = operands.mask
    if not rest and not first.tensor.views and not first.tensor.pads and call.is_sdpa:
        return lambda: (emitter.tensor(first.tensor.node), None), shared
    dtype = getattr(torch, call.dtype)

    def build() -> MaskAndRows:
        if rows:
            made: MaskAndRows = emitter.once(("mask", shared), lambda: build_rows(operands, dtype, tensor))
            return made
        return emitter.once(("mask", shared), lambda: build_mask(operands.mask, dtype, tensor)), None

    return build, shared


def _native(
    call: AttentionCall,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    emitter: Any,
    as_it_stands: bool,
) -> torch.Tensor:
    """Attention that is not SDPA yet as one SDPA call, for which PyTorch chooses the kernel; the math operator where compilers
    misread the one that it would choose."""
    query, key, value = (_cast(each, call.dtype) for each in (query, key, value))
    if not as_it_stands and call.dropout == 0 and compilers_misread(call):
        return in_operations(_attention(call, query), query, key, value, *([] if mask is None else [mask]))
    sdpa = SDPA if emitter.key == "example_value" else torch.ops.aten.scaled_dot_product_attention.default
    arguments: dict[str, Any] = {"dropout_p": call.dropout, "scale": call.scale}
    if call.mask.is_causal:
        arguments["is_causal"] = True
    if query.dim() > 3 and not always(call.heads == call.kv_heads):
        arguments["enable_gqa"] = True
    output: torch.Tensor = sdpa(query, key, value, mask, **arguments)
    return output


def _erase(chain: Sequence[Node], graph: Graph) -> None:
    """Erases the nodes of `chain` that nothing reads after the swap."""
    waiting = [node for node in dict.fromkeys(chain) if node.op != "placeholder"]
    while dead := [node for node in waiting if all(spelled(user) == CHECK for user in node.users)]:
        for node in dead:
            for check in list(node.users):
                graph.erase_node(check)
            graph.erase_node(node)
        waiting = [node for node in waiting if node not in dead]


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
) -> tuple[torch.Tensor, ...]:
    """Calls the kernel on SDPA's tensors (..., heads, length, dim) of any rank, with the steps of the plan, and returns SDPA's
    output; for a call that reads the log-sum-exp also that, (batch, heads, q_len). Sites with the same `shared` key share the
    tensor prepared from the mask."""
    returned = getattr(torch, call.dtype)
    if (cast := accepted.step("cast")) is not None:
        call = cast_to(str(cast.after), call)
    lead = lead_sizes(query, key, value)
    shape = (*lead, call.heads) if query.dim() > 3 else lead
    query, key, value = (_cast(tensor, call.dtype) for tensor in (query, key, value))
    query = _rank4(query, call.batch, call.heads, shape)
    key, value = (_rank4(tensor, call.batch, call.kv_heads, shape) for tensor in (key, value))
    call, query, key, value = _padded(accepted, call, query, key, value)

    # `prepare` sees only what the prepared mask may depend on besides the mask, because sites share the prepared mask.
    about = replace(call, site="", role="", layout="", scale=None, dropout=0.0)

    def prepare() -> Any:
        wide = None if mask is None else mask_rank4(_cast_mask(mask, call.mask, cast is not None), lead, len(shape) + 2)
        return backend.prepare(wide, key, about) if backend.prepare else wide

    prepared = emitter.once((backend.prepare, shared, key.device, repr(about.described())), prepare)
    if backend.layout == "bshd":
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    query, key, value = (
        tensor if holds(tensor.stride(-1) == 1) else tensor.contiguous() for tensor in (query, key, value)
    )
    given: dict[str, Any] = {"origin": Origin(backend.name, source, call.site)} if source is not None else {}
    op: Any = backend.logsumexp if call.logsumexp else backend.op
    found = op(query, key, value, prepared, call=call, **given)
    output, *more = found if call.logsumexp else (found,)
    if backend.layout == "bshd":
        output = output.transpose(1, 2)
    if output.shape[-1] is not call.value_dim and not holds(output.shape[-1] == call.value_dim):
        output = output[..., : call.value_dim]
    if output.dtype != returned:
        output = output.to(returned)
    wanted = (*shape, call.q_len, call.value_dim)
    return (output if len(wanted) == 4 else output.reshape(wanted), *more)


def _cast(tensor: torch.Tensor, dtype: str | None) -> torch.Tensor:
    """Under autocast SDPA casts floating tensors. Autocast does not know the ops of this package, so the cast is explicit."""
    wanted = getattr(torch, str(dtype))
    return tensor if tensor.dtype == wanted else tensor.to(wanted)


def _cast_mask(mask: torch.Tensor, wanted: Mask, chosen: bool) -> torch.Tensor:
    """Casts the mask as SDPA does under autocast. If the policy chose the cast (`chosen`), finite numbers stay finite: a row
    that is masked with finfo.min throughout would become -inf and have no key at all."""
    dtype = getattr(torch, str(wanted.dtype))
    if chosen and mask.is_floating_point() and mask.dtype != dtype:
        limit = torch.finfo(dtype).max
        mask = torch.where(mask.isinf(), mask, mask.clamp(-limit, limit))
    return _cast(mask, wanted.dtype)


def _rank4(tensor: torch.Tensor, batch: Any, heads: Any, shape: Any) -> torch.Tensor:
    """(..., heads, length, dim) -> (batch, heads, length, dim), expanded where SDPA broadcasts: kernels do not broadcast."""
    length, dim = tensor.shape[-2:]
    lead = (*shape[:-1], heads) if len(shape) > 1 else tuple(shape)
    if len(lead) != tensor.dim() - 2 or any(not holds(a == b) for a, b in zip(tensor.shape[:-2], lead, strict=True)):
        tensor = tensor.expand(*lead, length, dim).contiguous()
    return tensor if tensor.dim() == 4 else tensor.reshape(batch, heads, length, dim)


def _padded(
    accepted: Accepted, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[AttentionCall, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pads head_dim and value_dim with zeros, which change no score. The scale stays that of the unpadded head_dim."""

    def pad(tensor: torch.Tensor, step: Step | None) -> torch.Tensor:
        missing: Any = (0, 0 if step is None else step.after - tensor.shape[-1])  # type: ignore[operator]
        return tensor if step is None else torch.nn.functional.pad(tensor, missing)

    heads, values = accepted.step("pad_head_dim"), accepted.step("pad_value_dim")
    if heads is not None and call.scale is None:
        call = replace(call, scale=float(call.head_dim) ** -0.5)
    return call, pad(query, heads), pad(key, heads), pad(value, values)


def _are_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def _about(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
