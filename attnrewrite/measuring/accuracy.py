"""`Accuracy`: the error of an attention's output against float64, in several measures."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .reference import Reference


@dataclass(frozen=True)
class Accuracy:
    """The error of an attention's output against the same attention in float64 (`exact`).

    The first three numbers are taken over all rows compared, each as often as it stands for rows of the output, and are NaN if
    one of these rows is not finite, or if there is no row to compare. The error of a row whose exact value is zero is relative
    to the mean norm of all rows compared.
    """

    relative_error: float  # |output - exact| / |exact| (2-norms)
    sqnr_db: float  # the same as a ratio of signal to error: -20 log10(relative_error)
    cosine: float  # of the angle between output and exact, taken as vectors
    worst_row: tuple[int, int, int]  # (batch, head, query) of the row with the largest relative error of its own
    worst_error: float  # the relative error of that row
    nan: int  # NaN values in the whole output
    inf: int  # infinite values in the whole output
    rows: int  # number of rows compared: those of the reference that see a key
    all_rows: int  # number of rows in the output

    @property
    def finite(self) -> bool:
        return not self.nan and not self.inf

    def to_dict(self) -> dict[str, Any]:
        """Numbers that are not finite become text, since JSON has none."""
        return {
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }


def accuracy(exact: Reference, output: Tensor) -> Accuracy:
    """Compares `output` (batch, heads, q_len, value_dim) with the reference's rows. A row that sees no key counts as right."""
    values, found = exact.values, exact.taken(output)
    apart, norm = (found - values).norm(dim=-1), values.norm(dim=-1)
    wide, size = exact.weighted(found - values).norm().item(), exact.weighted(values).norm().item()
    error = _ratio(wide, size) if exact.compared else math.nan
    by_row = torch.where(apart == 0, 0.0, apart / torch.where(norm > 0, norm, norm.mean())).flatten()
    # NaN counts as the largest error. An empty output has no worst row.
    place = int(by_row.nan_to_num(nan=math.inf).argmax()) if by_row.numel() else 0
    batch, heads, count = norm.shape
    head, row = divmod(place, max(count, 1))
    return Accuracy(
        relative_error=error,
        sqnr_db=math.inf if error == 0 else math.nan if math.isnan(error) else -20 * math.log10(error),
        cosine=_cosine(exact.weighted(found), exact.weighted(values)) if exact.compared else math.nan,
        worst_row=(head // max(heads, 1), head % max(heads, 1), int(exact.rows[row])) if by_row.numel() else (0, 0, 0),
        worst_error=by_row[place].item() if exact.compared else math.nan,
        nan=int(output.isnan().sum()),
        inf=int(output.isinf().sum()),
        rows=exact.compared,
        all_rows=batch * heads * output.shape[-2],
    )


def relative_error(output: Tensor, exact: Tensor) -> float:
    """Returns |output - exact| / |exact| (2-norms): 0 if both are all zeros, NaN if one of them is not finite or both are
    empty."""
    if not exact.numel():
        return math.nan
    return _ratio((output.double() - exact.double()).norm().item(), exact.double().norm().item())


def _ratio(one: float, other: float) -> float:
    if not (math.isfinite(one) and math.isfinite(other)):
        return math.nan
    if other == 0:
        return 0.0 if one == 0 else math.inf
    return one / other


def _cosine(one: Tensor, other: Tensor) -> float:
    norms = (one.norm() * other.norm()).item()
    if norms == 0:  # two zero vectors: 1; one zero vector: 0
        return 1.0 if one.norm().item() == other.norm().item() else 0.0
    return float((one * other).sum().item() / norms)
