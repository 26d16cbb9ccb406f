"""`Comparison`: the errors of kernels at one captured attention, against float64. `too_inexact`: the limits of errors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.calls import AttentionCall
from ..kernels.records import Backend
from ..kernels.shapes import output_rank4
from .capturing import Captured
from .reference import Reference, reference

WRONG = 10.0  # above this multiple of native's error: more than rounding


class Comparison:
    """Compares the outputs of kernels at one captured attention: some rows with float64, which is computed once, at the first
    output, and all rows with the output of the captured attention itself, which tells what stands between these rows."""

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.nothing = _not_finite(captured)  # why nothing can be compared; "" if something can
        self._reference: Reference | None = None
        heads = int(captured.call.heads)
        self._usual = None if captured.output is None else output_rank4(captured.output, heads)
        self._of_usual = 0.0  # its error

    def error(self, output: Tensor) -> float | None:
        """Returns the relative error, None under dropout, NaN if nothing can be compared. Raises `ValueError` for another
        shape, NaN or infinity.

        output: of a `SiteGraph`."""
        captured, call = self.captured, self.captured.call
        batch, heads, q_len, value_dim = (int(each) for each in (call.batch, call.heads, call.q_len, call.value_dim))
        wanted = (batch, q_len, heads * value_dim) if captured.query.dim() == 4 else None
        if wanted is not None and tuple(output.shape) != wanted:
            raise ValueError(f"returns {tuple(output.shape)} where SDPA gives {wanted}")
        whole = output.unflatten(2, (heads, value_dim)).transpose(1, 2) if wanted else output_rank4(output, heads)
        if self._reference is None:
            self._reference = reference(call, captured.query, captured.key, captured.value, captured.mask)
            self.nothing = self.nothing or ("" if self._reference.compared else "no row of it sees a key")
            if self._usual is not None:
                self._of_usual = self._reference.error(self._usual)
        exact, usual = self._reference, self._usual
        if self.nothing:
            return None if call.dropout else math.nan
        wrong = ~torch.isfinite(whole).all(-1)
        if bool(wrong.any()) and not (
            exact.seen is not None  # of a row that sees no key, SDPA itself may give NaN
            and bool(torch.isfinite(exact.taken(whole)).all())
            and (usual is None or not bool((wrong & torch.isfinite(usual).all(-1)).any()))
        ):
            raise ValueError(f"returns NaN or infinity in {int(wrong.sum())} of {wrong.numel()} rows")
        if call.dropout:
            return None
        error = exact.error(whole)
        # Both outputs stand within their errors around float64.
        return error if usual is None else max(error, _apart(whole, usual) - self._of_usual)


def _apart(one: Tensor, other: Tensor) -> float:
    """|one - other| / |other| over the rows in which `other` is finite, with the float64 copies of one head in memory."""
    apart, size = (torch.zeros((), dtype=torch.float64, device=one.device) for _ in range(2))
    for left, right in zip(one.unbind(1), other.unbind(1), strict=True):
        left, right = left.double(), right.double()
        finite = torch.isfinite(right).all(-1, keepdim=True)
        apart += torch.where(finite, left - right, 0.0).square().sum()
        size += torch.where(finite, right, 0.0).square().sum()
    return float((apart / size).sqrt()) if float(size) else float(apart) and math.inf


def _not_finite(captured: Captured) -> str:
    tensors = {"query": captured.query, "key": captured.key, "value": captured.value}
    bad = [name for name, each in tensors.items() if not bool(each.isfinite().all())]
    return f"values that are not finite come in by its {', '.join(bad)}" if bad else ""


def limit_of(record: Backend, max_error: float | None) -> float:
    """The largest error of a quantised or sparse kernel: `max_error`, or twice its stated error."""
    return 2 * record.tolerance.error if max_error is None else max_error


def too_inexact(
    error: float | None,
    record: Backend,
    call: AttentionCall,
    max_error: float | None,
    of_native: float | None,
    nothing: str,
) -> str | None:
    """Why an error is not known or above the limit, or None. The limit: `max_error`; without it `WRONG` times native's error,
    and for a quantised or sparse kernel twice its stated error.

    max_error: the limit; None: the usual ones. of_native: native's error. nothing: why nothing could be compared.
    """
    if error is not None and math.isnan(error):
        return None if record.name == "native" else f"nothing was compared: {nothing or 'float64 gives NaN there too'}"
    if error is None and record.numerics.is_inexact:
        return "nothing was compared: it has dropout"
    limit, why = max_error, "max_error"
    if limit is None:
        if record.numerics.is_inexact:
            limit, why = limit_of(record, None), "twice its stated error"
        elif of_native is not None and record.name != "native":
            last_bits = 2 * torch.finfo(getattr(torch, call.dtype)).eps  # native's error may be 0, as for one key
            limit, why = max(WRONG * of_native, last_bits), f"{WRONG:g} times native's"
    if limit is None or error is None or error <= limit:
        return None
    return f"its error is above {limit:.1e}, {why}"
