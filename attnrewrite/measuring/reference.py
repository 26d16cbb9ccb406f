"""Attention in float64 on some query rows: the reference for every error."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.calls import AttentionCall, MaskKind
from ..kernels.shapes import lead_sizes, mask_rank4, rank4

FEWEST = 16  # query rows, if there are as many
# Most query rows, and most scores: seconds on two cores. The error of a sparse kernel is uneven, in a video largest where a
# block of 64 queries spans two frames, so that a few rows tell little of it. A GPU has the time for more.
MOST = {"cpu": (256, 1 << 26), "cuda": (1024, 1 << 32)}
AT_ONCE = 256  # query rows of a head whose scores are in memory
# The share that the first and the last row have in an error at least. A kernel that loses the end of a sequence has an error of
# 0.03 and more by it; one whose last block is a little worse, as of a sparse kernel, is as good as all of its rows.
EDGE = 1 / 1000


@dataclass(frozen=True)
class Reference:
    """Attention in float64 on some query rows."""

    rows: Tensor  # indices of the query rows, int64
    values: Tensor  # (batch, heads, rows, value_dim), float64
    seen: Tensor | None  # (batch, heads, rows) boolean, False for a row that sees no key; None: every row sees a key
    weights: Tensor  # (rows,), float64: how many rows of the output each row stands for

    @property
    def compared(self) -> int:
        """Number of rows that can be compared: those that see a key."""
        if not self.values.numel():
            return 0
        return self.values[..., 0].numel() if self.seen is None else int(self.seen.sum())

    def error(self, output: Tensor) -> float:
        """Returns |output - values| / |values| (2-norms, each row as often as it has weight) for an output (batch, heads,
        q_len, value_dim). Rows that see no key are left out; NaN in any other of the rows gives NaN, and so does an output
        without any other row."""
        if not self.compared:
            return math.nan
        size = float(self.weighted(self.values).norm())
        apart = float(self.weighted(self.taken(output) - self.values).norm())
        return apart / size if size else apart and math.inf

    def taken(self, output: Tensor) -> Tensor:
        """The compared rows of an output (batch, heads, q_len, value_dim), float64, with zeros for rows that see no key."""
        rows = output[:, :, self.rows].double()
        return rows if self.seen is None else torch.where(self.seen[..., None], rows, 0.0)

    def weighted(self, values: Tensor) -> Tensor:
        """Values (batch, heads, rows, value_dim), so that a sum of their squares counts each row as often as it has weight."""
        return values * self.weights.sqrt()[:, None]


def reference(call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Reference:
    """Computes attention in float64, without dropout, with the scores of `AT_ONCE` rows of one head in memory. The query rows
    are all, or the first, the last, and the middles of equal parts of the others, which they stand for.

    call: its sizes are numbers.
    query, key, value: SDPA's form (..., heads, length, dim).
    mask: the model's own, broadcasts to (..., heads, q_len, kv_len).
    """
    batch, heads, kv_heads = int(call.batch), int(call.heads), int(call.kv_heads)
    q_len, kv_len = int(call.q_len), int(call.kv_len)
    lead, rank = lead_sizes(query, key, value), query.dim()
    most, products = MOST.get(query.device.type, MOST["cpu"])
    count = min(q_len, max(FEWEST, min(most, products // max(1, batch * heads * kv_len))))
    rows, weights = _rows(q_len, count, query.device)
    query, key, value = rank4(query, lead, heads), rank4(key, lead, kv_heads), rank4(value, lead, kv_heads)
    mask = None if mask is None else mask_rank4(mask, lead, rank)
    parts = [_attended(call, query, key, value, mask, some) for some in rows.split(AT_ONCE)]
    values, seen = (torch.cat(each, 2) for each in zip(*parts, strict=True))
    return Reference(rows, values, None if bool(seen.all()) else seen, weights)


def _attended(
    call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """The output of some query rows, (batch, heads, rows, value_dim), and whether they see a key."""
    heads, kv_heads = query.shape[1], key.shape[1]
    query = query[:, :, rows]
    if mask is not None and mask.shape[-2] != 1:
        mask = mask[:, :, rows]
    scale = 1 / math.sqrt(int(call.head_dim)) if call.scale is None else call.scale
    hidden = _causal(call, rows)
    outputs, seen = [], []
    for head in range(heads):
        of_keys = head * kv_heads // heads
        scores = query[:, head].double() @ key[:, of_keys].double().transpose(-1, -2) * scale
        keep = None if hidden is None else ~hidden
        if mask is not None:
            part = mask[:, min(head, mask.shape[1] - 1)]
            if part.dtype == torch.bool:
                keep = part if keep is None else part & keep
            else:
                scores = scores + part.double()
        if keep is not None:
            scores = scores.masked_fill(~keep, -math.inf)
        some = ~(scores == -math.inf).all(-1)  # a score of NaN belongs to a key that is seen
        probabilities = torch.where(some[..., None], scores, 0.0).softmax(-1)
        outputs.append(torch.where(some[..., None], probabilities @ value[:, of_keys].double(), 0.0))
        seen.append(some)
    if not heads:
        return query.new_empty(*query.shape[:3], value.shape[-1]).double(), query.new_empty(query.shape[:3]).bool()
    return torch.stack(outputs, 1), torch.stack(seen, 1)


def _rows(q_len: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rows, and how many rows each stands for."""
    weights = torch.ones(count, dtype=torch.float64, device=device)
    if count == q_len:
        return torch.arange(q_len, device=device), weights
    part = (q_len - 2) / (count - 2)
    middles = 1 + part * (torch.arange(count - 2, dtype=torch.float64, device=device) + 0.5)
    edges = torch.tensor([0, q_len - 1], device=device)
    weights[1:-1] = part
    weights[[0, -1]] = max(1.0, EDGE * q_len)
    return torch.cat([edges[:1], middles.long(), edges[1:]]), weights


def _causal(call: AttentionCall, rows: Tensor) -> Tensor | None:
    """True where a causal mask without a tensor hides a key; None for other masks."""
    if call.mask.dtype is not None or not call.mask.is_causal:
        return None
    lower_right = call.mask.kind is MaskKind.CAUSAL_LOWER_RIGHT
    shift = int(call.kv_len) - int(call.q_len) if lower_right else 0
    return torch.arange(int(call.kv_len), device=rows.device)[None, :] > rows[:, None] + shift
