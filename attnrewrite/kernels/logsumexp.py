"""An attention that also returns the log-sum-exp of its scores: a step of a ring (parallel/rings.py)."""

from __future__ import annotations

from typing import Any

import torch

from .ops import LIBRARY, NAMESPACE, TAGS

NAME = "attention_with_logsumexp"

# query: (batch, heads, q_len, head_dim). key, value: (batch, kv_heads, kv_len, ...), kv_heads a divisor of heads.
# mask: of rank 4, boolean (True: the key takes part) or added to the scaled scores; each row has a key.
# is_causal: q_len == kv_len, and no mask. scale: above 0; None for 1 / sqrt(head_dim). site: the attention's name in reports.
#
# Returns the output (batch, heads, q_len, value_dim) and the natural logarithm of the sum of the exponentials of each row's
# scaled scores (batch, heads, q_len), in float32, or float64 for float64. No gradient.
#
# backends/native.py decomposes it into the kernel that PyTorch would choose for SDPA; a plan may choose another.
LIBRARY.define(
    f"{NAME}(Tensor query, Tensor key, Tensor value, Tensor? mask, bool is_causal, float? scale, str site) -> (Tensor, Tensor)",
    tags=TAGS,
)
WITH_LOGSUMEXP: Any = getattr(getattr(torch.ops, NAMESPACE), NAME).default
