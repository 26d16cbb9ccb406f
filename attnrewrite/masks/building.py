"""Builds the mask tensor that a kernel gets: once for all sites whose masks are equal, even if each layer made its own."""

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

Home = tuple[Node, tuple[Index, ...]]  # a tensor that holds a value, and the indices of that value


@dataclass(frozen=True)
class Proof:
    """What the graph proves about the elements of a mask."""

    value: Value  # one element of the mask; the same object for equal masks
    keep: Value | None = None  # the condition under which a key takes part; None: not known
    keys: tuple[Home, ...] = ()  # only for padding of queries and keys: boolean tensors, all True for a valid key
    queries: tuple[Home, ...] = ()  # the same: all True for a valid query


@dataclass(frozen=True)
class Built:
    """A call as the kernel sees it, with its mask tensor."""

    call: AttentionCall
    mask: Tensor | None
    shared: Any  # a key that is equal for equal masks
    alive: Tensor | None = None  # False where a batch element sees no key: its queries must be set to zero
    queries: Tensor | None = None  # False where a row of the output must be set to zero


def built(
    call: AttentionCall,
    proof: Proof | None,
    mask_as: str,
    given: Callable[[], Tensor] | None,
    shared: Any,
    emitter: Emitter,
) -> Built:
    """The call and the mask for a kernel that receives the mask as `mask_as`, one of `reasons.masks_for`.

    given: a function that returns the model's mask tensor. shared: the key of that tensor, used if nothing is proven about it.
    """
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
    kind = {"keys": MaskKind.KEY_PADDING, "boolean": MaskKind.BOOLEAN}.get(mask_as, mask.kind)
    seen = replace(mask.bare, kind=kind, shape=tuple(keep.shape))
    return Built(replace(call, mask=seen), keep, shared, alive, queries)


def _keep(
    mask: Mask, proof: Proof, mask_as: str, model: Callable[[], Tensor], rank: int, emitter: Emitter
) -> tuple[Tensor, Tensor | None]:
    """The boolean mask (True: the key takes part) and, only for `no_key="mean"`, whether each row sees any key."""
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
    """A view of `rank` dimensions with each axis of `indices` at its own dimension; the other dimensions have size 1."""
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
