"""`Accuracy`: how far an attention's output lies from float64, in the numbers that people compare."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .reference import Reference


@dataclass(frozen=True)
class Accuracy:
    """relative_error: |output - exact| / |exact| (2-norms) over the rows compared; sqnr_db: the same as a ratio of signal to
    error, -20 log10; cosine: of the two as vectors. NaN where one of those rows is not finite.

    worst_row: (batch, head, query) of the row whose own relative error is the largest, and worst_error that error. A row that
        is exactly zero is measured by the mean norm of all.
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

    @property
    def finite(self) -> bool:
        return not self.nan and not self.inf

    def to_dict(self) -> dict[str, Any]:
        """Numbers that are not finite as text: JSON has none."""
        return {
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }


def accuracy(exact: Reference, output: Tensor) -> Accuracy:
    """Of `output` (batch, heads, q_len, value_dim), on the rows of the reference. Of a row without any key nothing is asked."""
    values = exact.values
    found = output[:, :, exact.rows].double()
    if exact.seen is not None:
        found = torch.where(exact.seen[..., None], found, 0.0)
    apart, norm = (found - values).norm(dim=-1), values.norm(dim=-1)
    error = _ratio(apart.norm().item(), norm.norm().item())
    by_row = torch.where(apart == 0, 0.0, apart / torch.where(norm > 0, norm, norm.mean())).flatten()
    # NaN counts as the largest. Without any row there is none that is worst.
    place = int(by_row.nan_to_num(nan=math.inf).argmax()) if by_row.numel() else 0
    batch, heads, count = norm.shape
    head, row = divmod(place, max(count, 1))
    return Accuracy(
        relative_error=error,
        sqnr_db=math.inf if error == 0 else math.nan if math.isnan(error) else -20 * math.log10(error),
        cosine=_cosine(found, values),
        worst_row=(head // max(heads, 1), head % max(heads, 1), int(exact.rows[row])) if by_row.numel() else (0, 0, 0),
        worst_error=by_row[place].item() if by_row.numel() else 0.0,
        nan=int(output.isnan().sum()),
        inf=int(output.isinf().sum()),
        rows=by_row.numel(),
        all_rows=batch * heads * output.shape[-2],
    )


def relative_error(output: Tensor, exact: Tensor) -> float:
    """|output - exact| / |exact| (2-norms); 0 for two that are all zeros, NaN where one of them is not finite."""
    return _ratio((output.double() - exact.double()).norm().item(), exact.double().norm().item())


def _ratio(one: float, other: float) -> float:
    if not (math.isfinite(one) and math.isfinite(other)):
        return math.nan
    if other == 0:
        return 0.0 if one == 0 else math.inf
    return one / other


def _cosine(one: Tensor, other: Tensor) -> float:
    norms = (one.norm() * other.norm()).item()
    if norms == 0:  # of two zeros it is 1, of a zero and something 0
        return 1.0 if one.norm().item() == other.norm().item() else 0.0
    return float((one * other).sum().item() / norms)
