"""DTensors (torch.distributed.tensor) in a graph: which part of one this rank holds, taken out and put back."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from .sizes import holds


def is_dtensor(value: Any) -> bool:
    """Whether a value is a DTensor. Imports nothing: where there is a DTensor, its module is loaded."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def whole_of(local: torch.Tensor, like: Any) -> torch.Tensor:
    """The DTensor of which this rank holds `local`, on the mesh and with the placements of the DTensor `like`. It takes the
    DTensor, not mesh and placements, since a graph's arguments are tensors."""
    from torch.distributed.tensor import DTensor

    whole: torch.Tensor = DTensor.from_local(local, like.device_mesh, like.placements, run_check=False)
    return whole


def why_not_local(query: Any, key: Any, value: Any, mask: Any, output: Any) -> str | None:
    """Why an attention on DTensors is not one attention on each rank's own parts, as a sentence for refusals; None where it
    is: query, key and value lie on one mesh and are sharded alike, by batch or heads, in equal parts.

    mask: may be None, or a DTensor. output: what PyTorch gives for the attention.
    """
    if not all(map(is_dtensor, (query, key, value, output))) or not (mask is None or is_dtensor(mask)):
        return "it mixes DTensors with other tensors"
    others = (key, value, output) if mask is None else (key, value, output, mask)
    if any(each.device_mesh != query.device_mesh for each in others):
        return "its DTensors lie on several meshes"
    if any(each.placements != query.placements for each in (key, value, output)):
        told = "; ".join(_told(each) for each in (query, key, value))
        return f"its DTensors are not sharded alike ({told})"
    if any(_dims(each.placements) is None for each in (query, *others)):
        return f"its DTensors are neither sharded nor replicated ({_told(query)})"
    dims = _dims(query.placements) or ()
    if any(dim is not None and dim >= query.dim() - 2 for dim in dims):
        return f"its DTensors are sharded by tokens or within a head ({_told(query)})"
    if mask is not None:
        if any(dim is not None for dim in dims) and mask.requires_grad and torch.is_grad_enabled():
            return "its mask is a DTensor that needs a gradient from all ranks"
        if _dims(mask.placements) != tuple(_in_mask(dim, query, mask) for dim in dims):
            return f"its mask is not sharded as its queries are ({_told(mask)}; {_told(query)})"
    return next(
        (f"its DTensors are sharded unevenly ({_told(each)})" for each in (query, *others) if uneven(each)), None
    )


def uneven(tensor: Any) -> bool:
    """Whether the ranks hold parts of different sizes."""
    sizes: list[Any] = list(tensor.to_local().shape)
    for place, placement in enumerate(tensor.placements):
        if placement.is_shard():
            sizes[placement.dim] = sizes[placement.dim] * tensor.device_mesh.size(place)
    return not all(holds(size == whole) for size, whole in zip(sizes, tensor.shape, strict=True))


def _dims(placements: Sequence[Any]) -> tuple[int | None, ...] | None:
    """For each dimension of the mesh, the sharded dimension of the tensor, None where it is replicated. None if a placement
    is something else, such as a partial sum."""
    from torch.distributed.tensor import Replicate, Shard

    if any(type(each) not in (Replicate, Shard) for each in placements):
        return None
    return tuple(each.dim if each.is_shard() else None for each in placements)


def _in_mask(dim: int | None, query: torch.Tensor, mask: torch.Tensor) -> int | None:
    """The dimension of the mask that is sharded where the queries' `dim` is; None where the mask is the same for all of it."""
    if dim is None:
        return None
    place = dim - query.dim() + mask.dim()
    return None if place < 0 or mask.shape[place] == 1 else place


def _told(tensor: Any) -> str:
    return f"{tuple(tensor.shape)}: {', '.join(map(str, tensor.placements))}"
