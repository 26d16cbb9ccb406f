"""What a kernel gets of a mask that is understood: built once for all sites whose masks are equal, whoever made them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..graphs.emitting import Emitter
from ..graphs.sizes import is_one
from ..kernels.calls import AttentionCall, Mask, MaskKind
from .expressions import Value, is_axis
from .indices import Index

Home = tuple[Node, tuple[Index, ...]]  # a tensor that holds a value, and at which indices


@dataclass(frozen=True)
class Proof:
    """value: what an element of the mask is, one object for equal masks; keep: when it lets a key take part, where that is
    known. For padding of queries and keys also the boolean tensors of the graph that say which do: all of them must."""

    value: Value
    keep: Value | None = None
    keys: tuple[Home, ...] = ()
    queries: tuple[Home, ...] = ()


@dataclass(frozen=True)
class Built:
    """The call as the kernel sees it, its mask, and a key that is equal for equal masks. alive: False where a batch element
    sees no key and its queries must be zero; queries: False where a row of the output must be."""

    call: AttentionCall
    mask: Tensor | None
    shared: Any
    alive: Tensor | None = None
    queries: Tensor | None = None


def built(
    call: AttentionCall,
    proof: Proof | None,
    mask_as: str,
    given: Callable[[], Tensor] | None,
    shared: Any,
    emitter: Emitter,
) -> Built:
    """mask_as: one of `reasons.masks_for`. given: what makes the model's tensor. shared: the key of that tensor, where nothing
    is proven of it."""
    mask = call.mask
    if proof is not None:
        shared = proof.value
    if mask_as == "given":
        assert mask.given is not None
        return Built(replace(call, mask=mask.given), given and given(), shared)
    if given is None or not mask.is_tensor:
        return Built(replace(call, mask=mask if mask.kind is MaskKind.ADDITIVE else mask.bare), None, None)
    if proof is None or proof.keep is None:
        return Built(call, given(), shared)
    rank = len(mask.shape)
    shared = (mask_as, proof.keep, mask.no_key)
    keep, alive = emitter.once(("keep", shared), lambda: _keep(mask, proof, mask_as, given, rank, emitter))
    queries = None
    if mask_as == "keys":
        queries = emitter.once(("queries", shared), lambda: _all_of(proof.queries, rank, emitter))
    kind = MaskKind.KEY_PADDING if mask_as == "keys" else mask.kind
    seen = replace(mask.bare, kind=kind, shape=tuple(keep.shape))
    return Built(replace(call, mask=seen), keep, shared, alive, queries)


def _keep(
    mask: Mask, proof: Proof, mask_as: str, model: Callable[[], Tensor], rank: int, emitter: Emitter
) -> tuple[Tensor, Tensor | None]:
    """True where a key takes part; and where queries must be zero for it, whether a row sees any key at all."""
    if mask_as == "keys":
        return _all_of(proof.keys, rank, emitter), None
    assert proof.keep is not None
    given = model()
    for dim in range(-given.dim(), -1):
        if dim not in proof.keep.axes and not is_one(given.shape[dim]):
            given = given.narrow(dim, 0, 1)
    keep = given if given.dtype == torch.bool else given == 0
    if mask.no_key == "zeros":
        return keep, None
    alive = keep.any(-1, keepdim=True)
    return keep | ~alive, alive if mask.no_key == "mean" else None


def _all_of(homes: Sequence[Home], rank: int, emitter: Emitter) -> Tensor:
    keep, *others = (_arranged(emitter.tensor(node), indices, rank) for node, indices in homes)
    for other in others:
        keep = keep & other
    return keep


def _arranged(tensor: Tensor, indices: tuple[Index, ...], rank: int) -> Tensor:
    """A view of `rank` dimensions in which each axis stands in its place."""
    axes: list[int] = []
    for dim in reversed(range(tensor.dim())):
        found = is_axis(indices[dim])
        if found is None:
            place: Any = indices[dim].number
            tensor = tensor.select(dim, place)
        else:
            axes.insert(0, found.dim + rank)
    order = sorted(range(len(axes)), key=axes.__getitem__)
    if order != list(range(len(axes))):
        tensor = tensor.permute(order)
    return tensor[tuple(slice(None) if dim in axes else None for dim in range(rank))]
