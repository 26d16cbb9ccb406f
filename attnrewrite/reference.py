"""How far an attention's output lies from float64, on its own inputs: some rows at long lengths, head by head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .calls import MaskKind

ROWS = 256  # queries of each head that are compared where there are more: first, last, and others spread over the length


@dataclass(frozen=True)
class Accuracy:
    """relative_error: |output - exact| / |exact| (2-norms) over the rows compared; sqnr_db: 20 log10 of its inverse; cosine: of
    the two as vectors. NaN where one of them is not finite.

    worst_row: (batch, head, query) of the row with the largest relative error of its own, and worst_error that error; a row
        that is exactly zero is measured by the mean norm of the others.
    nan, inf: counts over the whole output. rows: how many rows were compared, of all_rows.
    """

    relative_error: float
    sqnr_db: float
    cosine: float
    worst_row: tuple[int, int, int]
    worst_error: float
    nan: int
    inf: int
    rows: int
    all_rows: int


def compare(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    causal: MaskKind = MaskKind.NONE,
    scale: float | None = None,
    rows: int = ROWS,
) -> Accuracy:
    """The accuracy of `output` (..., heads, q_len, value_dim) as SDPA of the tensors, in SDPA's form: ranks from 3 on, leading
    sizes and heads that broadcast, grouped heads, a boolean or additive mask of any rank. `causal` counts where there is no
    mask. A row without any key is zero.

    Memory: float64 copies of one head's keys and values, and of (rows, kv_len) scores.
    """
    with torch.no_grad():
        lead = torch.broadcast_shapes(*(each.shape[:-3] for each in (query, key, value)))
        query, key, value, output = (_rank4(each, lead) for each in (query, key, value, output))
        wide = None if mask is None else _mask_rank4(mask, lead)
        batch, heads, q_len, _ = output.shape
        chosen = _spread(q_len, rows, output.device)
        difference = scalar = product = own = 0.0
        errors, norms = [], []
        for b in range(batch):
            for h in range(heads):
                exact = _rows(b, h, heads, chosen, query, key, value, wide, causal, scale)
                found = output[b, h].index_select(0, chosen).double()
                apart, norm = (found - exact).norm(dim=-1), exact.norm(dim=-1)
                difference += apart.square().sum().item()
                scalar += norm.square().sum().item()
                own += found.square().sum().item()
                product += (found * exact).sum().item()
                errors.append(apart)
                norms.append(norm)
        error = _ratio(math.sqrt(difference), math.sqrt(scalar))
        apart, norm = torch.stack(errors), torch.stack(norms)
        by_row = apart / torch.where(norm > 0, norm, norm.mean())
        by_row = torch.where(apart == 0, 0.0, by_row)  # also where all rows are zero
        # NaN counts as the largest: max() takes it.
        place = int(by_row.flatten().nan_to_num(nan=math.inf).argmax()) if by_row.numel() else 0
        head, row = divmod(place, max(len(chosen), 1))
        return Accuracy(
            relative_error=error,
            sqnr_db=math.inf if error == 0 else -20 * math.log10(error) if error == error else math.nan,
            cosine=_ratio(product, math.sqrt(scalar * own)) if scalar * own != 0 else (1.0 if error == 0 else 0.0),
            worst_row=(head // heads, head % heads, int(chosen[row])) if by_row.numel() else (0, 0, 0),
            worst_error=float(by_row.flatten()[place]) if by_row.numel() else 0.0,
            nan=int(output.isnan().sum()),
            inf=int(output.isinf().sum()),
            rows=by_row.numel(),
            all_rows=batch * heads * q_len,
        )


def _ratio(one: float, other: float) -> float:
    if other == 0:
        return 0.0 if one == 0 else math.nan if math.isnan(one) else math.inf
    return one / other if math.isfinite(one) and math.isfinite(other) else math.nan


def _spread(length: int, most: int, device: torch.device) -> Tensor:
    """Indices of rows: all, or `most` of them, first and last included, at odd distances, so that no block is missed."""
    if length <= most:
        return torch.arange(length, device=device)
    return torch.linspace(0, length - 1, most, dtype=torch.float64, device=device).round().long()


def _rank4(tensor: Tensor, lead: torch.Size) -> Tensor:
    """(batch, heads, length, dim), where batch is the product of `lead`; heads as they are, one for rank 3 and below."""
    if tensor.dim() == 2:
        tensor = tensor[None]
    if not lead and tensor.dim() == 3:
        return tensor[None]
    return tensor.expand(*lead, *tensor.shape[-3:]).reshape(-1, *tensor.shape[-3:])


def _mask_rank4(mask: Tensor, lead: torch.Size) -> Tensor:
    """Four sizes, each of which may be 1."""
    mask = mask[(None,) * max(0, len(lead) + 3 - mask.dim())]
    if all(size == 1 for size in mask.shape[:-3]):
        return mask.reshape(1, *mask.shape[-3:])
    return mask.expand(*lead, *mask.shape[-3:]).reshape(-1, *mask.shape[-3:])


def _rows(
    b: int, h: int, heads: int, rows: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Any, causal: Any, scale: Any
) -> Tensor:
    """Some rows of one head, in float64."""
    q = query[b, h % query.shape[1]].index_select(0, rows).double()
    k, v = (each[b, h * each.shape[1] // heads].double() for each in (key, value))
    scores = q @ k.T * (scale if scale is not None else (q.shape[-1] ** -0.5 if q.shape[-1] else 1.0))
    if mask is not None:
        own = mask[b % mask.shape[0], h % mask.shape[1]]
        own = own.index_select(0, rows) if own.shape[0] > 1 else own
        scores = scores.masked_fill(~own, -math.inf) if own.dtype == torch.bool else scores + own.double()
    elif causal in (MaskKind.CAUSAL_UPPER_LEFT, MaskKind.CAUSAL_LOWER_RIGHT):
        shift = k.shape[0] - query.shape[-2] if causal is MaskKind.CAUSAL_LOWER_RIGHT else 0
        keys = torch.arange(k.shape[0], device=k.device)
        scores = scores.masked_fill(keys > rows[:, None] + shift, -math.inf)
    weights = scores.softmax(-1)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    return torch.where(empty, 0.0, weights) @ v
