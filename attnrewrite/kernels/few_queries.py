"""Exact attention of a few queries to many keys, as of a text's tokens to a video's, for use inside of an op.

Few queries are little work side by side: 256 queries of 24 heads are 48 blocks of a kernel, for the 132 processors of an H200.
So the keys are cut into parts that are attended side by side, and the parts are averaged by their log-sum-exps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .logsumexp import WITH_LOGSUMEXP

PARTS = 8
FEW = 1024  # queries: the output of each part is as large as the whole output
MULTIPLE = 64  # keys of a part


def attend_few(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, near: tuple[int, int]
) -> Tensor:
    """softmax(query @ key * scale) @ value, in the tensors' dtype.

    query: (batch, queries, heads, head_dim). key, value: (batch, keys, heads, head_dim). mask: (batch or 1, keys), bool, True
    where a key takes part, and for each batch somewhere. near: the first of those keys that the mask may hide, and the first
    behind them; they are the first or the last keys. Returns (batch, queries, heads, head_dim).
    """
    keys = key.shape[1]
    first, end = near
    # One more key than the mask may hide is near, so that the near ones are never all hidden.
    size = (keys - (end - first) - 1) // PARTS // MULTIPLE * MULTIPLE
    if query.shape[0] > 1 or query.shape[1] > FEW or size == 0:
        return attend(query, key, value, mask, scale)
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    cut = PARTS * size if first > 0 else keys - PARTS * size
    far, near_by = (slice(cut), slice(cut, None)) if first > 0 else (slice(cut, None), slice(cut))
    parts = [each[0, :, far].unflatten(1, (PARTS, size)).transpose(0, 1) for each in (key, value)]
    outputs, sums = WITH_LOGSUMEXP(query.expand(PARTS, -1, -1, -1), *parts, None, False, scale, "")
    bias = None if mask is None else mask[:, None, None, near_by]
    output, sum_ = WITH_LOGSUMEXP(query, key[:, :, near_by], value[:, :, near_by], bias, False, scale, "")
    weights = torch.cat([sums, sum_]).softmax(0)[..., None]
    averaged = (torch.cat([outputs, output]) * weights).sum(0, keepdim=True)
    return averaged.to(query.dtype).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """The same for any number of queries and any keys that are hidden, by PyTorch's SDPA."""
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    bias = None if mask is None else mask[:, None, None]
    return F.scaled_dot_product_attention(query, key, value, bias, scale=scale).transpose(1, 2)
