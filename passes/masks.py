"""Combines the terms of a mask: describes and builds the one tensor that they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..graphs.nodes import dtype_name, value_of, values_only
from ..graphs.sizes import always
from ..kernels.calls import Mask, MaskKind
from .found import MaskTerm, Operand, Operands

# A finite fill becomes at most this bias. Any score added to it is lost in float32, so that a row with nothing but fills has
# equal weights, as after the fill.
LOWEST = -1e30


def lowered(amount: float) -> float:
    """The bias that stands for a fill with `amount`."""
    return amount if amount == -math.inf else min(amount, LOWEST)


def one_fill(terms: Sequence[MaskTerm]) -> bool:
    """Whether a mask is nothing but fills with one finite number."""
    amounts = {term.amount if term.how != "add" else math.nan for term in terms}
    return len(amounts) == 1 and math.isfinite(*amounts)


def rows_matter(operands: Operands, needs_grad: bool) -> bool:
    """Whether no bias can stand for the fills of a row that has nothing but fills: a fill passes no gradient to the score that
    it replaces, a bias does; fills with several numbers and biases on top of fills decide the row's weights."""
    filled: set[float] = set()
    for term in operands.mask:
        if term.how != "add":
            filled |= {term.amount} - {-math.inf}
        elif filled and max(filled) > operands.vanishing:
            return True
    return len(filled) > 1 or (bool(filled) and needs_grad)


def mask_of(terms: Sequence[MaskTerm], dtype: torch.dtype, query: torch.Tensor, output: torch.Tensor) -> Mask:
    """The mask that all terms together make. dtype: that of the attention's products."""
    if not terms:
        return Mask()
    (first, *rest) = terms
    plain = not rest and first.how == "add" and first.amount == 1 and first.tensor.value.dtype == dtype
    with values_only(query):
        mask = first.tensor.value if plain else build_mask(terms, dtype, lambda operand: operand.value)
    assert mask is not None
    learned = any(term.how == "add" and value_of(term.tensor.node).requires_grad for term in terms)
    return tensor_mask(mask, mask.dtype, query, learned and output.requires_grad)


def tensor_mask(mask: torch.Tensor, dtype: torch.dtype, query: torch.Tensor, needs_grad: bool) -> Mask:
    """The mask that one tensor is, by its shape and dtype alone. dtype: the one in which the mask is added.

    needs_grad: the mask and the output both require a gradient. Under no_grad a parameter still does, but the output does not.
    """
    kind = MaskKind.ADDITIVE
    if mask.dtype == torch.bool:
        kind = MaskKind.KEY_PADDING if _is_key_padding(mask, query) else MaskKind.BOOLEAN
    return Mask(kind, dtype_name(dtype), tuple(mask.shape), needs_grad)


def _is_key_padding(mask: torch.Tensor, query: torch.Tensor) -> bool:
    """Whether a boolean mask is the same for every head and query by its shape and strides alone."""
    shared = (-2, -3) if query.dim() > 3 else (-2,)
    return all(always(mask.shape[dim] == 1) or always(mask.stride(dim) == 0) for dim in shared if -dim <= mask.dim())


def build_mask(
    terms: Sequence[MaskTerm], dtype: torch.dtype, tensor: Callable[[Operand], torch.Tensor]
) -> torch.Tensor | None:
    """One tensor as SDPA takes it: boolean (True: the key takes part) if every term fills with -inf, else additive.

    A fill with a finite number is additive too: in a row with nothing but fills all keys have equal weights, where SDPA's
    boolean mask would give zeros. A row without any key in a boolean mask is zeros in SDPA and NaN in a softmax.
    """
    if not terms:
        return None
    if all(term.how != "add" and term.amount == -math.inf for term in terms):
        kept = [tensor(term.tensor) if term.how == "keep" else ~tensor(term.tensor) for term in terms]
        result = kept[0]
        for each in kept[1:]:
            result = result & each
        return result
    wanted = _bias_dtype(terms, dtype)
    bias: Any = None
    for term in terms:
        given = tensor(term.tensor)
        if term.how == "add":
            given = given if given.dtype == wanted else given.to(wanted)
            given = given if term.amount == 1 else given * term.amount
            bias = given if bias is None else bias + given
        else:
            rest = torch.zeros((), dtype=wanted, device=given.device) if bias is None else bias
            bias = torch.where(given if term.how == "keep" else ~given, rest, lowered(term.amount))
    return bias  # type: ignore[no-any-return]


def build_rows(
    operands: Operands, dtype: torch.dtype, tensor: Callable[[Operand], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(an additive mask, False for each row that has nothing but fills), for a mask whose `rows_matter`.

    With a query of zeros, which passes no gradient either, the scores of such a row are the mask: the fills and what was added
    to them since, less a number for the whole row. In other rows a fill hides the key.
    """
    terms = operands.mask
    wanted = _bias_dtype(terms, dtype)
    amounts = {term.amount for term in terms if term.how != "add"} - {-math.inf}
    top = max(amounts)
    bias: Any = None
    live: Any = None  # False: filled
    deaf: Any = None  # True: filled with a number that a bias is lost in
    for term in terms:
        given = tensor(term.tensor)
        if term.how == "add":
            given = given.to(wanted) * term.amount
            if deaf is not None:  # lost as a number, not as a gradient
                given = torch.where(deaf, given - given.detach() if given.requires_grad else 0.0, given)
            bias = given if bias is None else bias + given
            continue
        keep = given if term.how == "keep" else ~given
        rest = torch.zeros((), dtype=wanted, device=given.device) if bias is None else bias
        bias = torch.where(keep, rest, -math.inf if term.amount == -math.inf else term.amount - top)
        live = keep if live is None else live & keep
        if term.amount <= operands.vanishing:
            deaf = ~keep if deaf is None else deaf | ~keep
        elif deaf is not None:
            deaf = deaf & keep
    alive = live.any(-1, keepdim=True)
    hidden = bias
    if len(amounts) > 1:
        level = bias.detach().amax(-1, keepdim=True)
        hidden = bias - torch.where(level == -math.inf, 0.0, level)
    return torch.where(alive, torch.where(live, bias, LOWEST), hidden), alive


def _bias_dtype(terms: Sequence[MaskTerm], dtype: torch.dtype) -> torch.dtype:
    """The dtype of an additive mask: the call's own. For float16 and bfloat16 it is float32 if a term is float32 or float64;
    for float16 also if a term fills with a finite number, which may be too low for float16."""
    half = dtype in (torch.float16, torch.bfloat16)
    wide = any(term.how == "add" and term.tensor.dtype in (torch.float32, torch.float64) for term in terms)
    low = dtype == torch.float16 and any(term.how != "add" and math.isfinite(term.amount) for term in terms)
    return torch.float32 if half and (wide or low) else dtype
