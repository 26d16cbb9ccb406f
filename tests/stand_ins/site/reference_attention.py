"""What every stand-in computes: attention in float64, on tensors (batch, length, heads, dim)."""

import torch


def attention(query, key, value, scale=None, causal=None, bias=None):
    """The output, float64, and the log-sum-exp, float32 (batch, heads, length). causal: "upper-left" or "lower-right", or a
    window (left, right).

    A row without any key gives zeros, as the kernels do.
    """
    *_, v, weights, logsumexp = _weights(query, key, value, scale, causal, bias)
    return (weights @ v).transpose(1, 2), logsumexp.float()


def seen(causal, window):
    """What FlashAttention's two arguments say, as `attention` takes it. A window has -1 or None for no end."""
    window = tuple(-1 if end is None else end for end in window)
    if window == (-1, -1):
        return "lower-right" if causal else None
    assert not causal
    return window


def gradients(grad, query, key, value, scale, causal, bias=None):
    """Of query, key and value, float64. By hand: a kernel is called where autograd is off."""
    q, k, v, weights, _ = _weights(query, key, value, scale, causal, bias)
    grad = grad.double().transpose(1, 2)
    of_weights = grad @ v.transpose(-2, -1)
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True))
    of_scores = of_scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    wide = (of_scores @ k, of_scores.transpose(-2, -1) @ q, weights.transpose(-2, -1) @ grad)
    return tuple(
        found.unflatten(1, (like.shape[2], -1)).sum(2).transpose(1, 2)
        for found, like in zip(wide, (query, key, value), strict=True)
    )


def _weights(query, key, value, scale, causal, bias):
    """Query, key and value as (batch, heads, length, dim) in float64, the softmax and the log-sum-exp of the scores."""
    group = query.shape[2] // key.shape[2]
    q, k, v = (tensor.double().transpose(1, 2) for tensor in (query, key, value))
    k, v = (tensor.repeat_interleave(group, dim=1) for tensor in (k, v))
    scores = q @ k.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias.double()
    if isinstance(causal, tuple):
        left, right = causal
        distance = torch.arange(key.shape[1])[None, :] - torch.arange(query.shape[1])[:, None]
        hidden = ((left >= 0) & (distance < -left)) | ((right >= 0) & (distance > right))
        scores = scores.masked_fill(hidden, float("-inf"))
    elif causal is not None:
        offset = 0 if causal == "upper-left" else key.shape[1] - query.shape[1]
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + offset)
        scores = scores.masked_fill(hidden, float("-inf"))
    logsumexp = scores.logsumexp(-1)
    weights = scores.softmax(-1).masked_fill(logsumexp[..., None] == float("-inf"), 0)
    return q, k, v, weights, logsumexp


def sequences(cu_q, cu_k, max_q, max_k):
    """The slices of each sequence in packed queries and keys."""
    for cu, longest in ((cu_q, max_q), (cu_k, max_k)):
        assert cu.dtype is torch.int32 and cu.is_contiguous() and int(cu.diff().max()) <= longest
    bounds = zip(cu_q.tolist(), cu_q[1:].tolist(), cu_k.tolist(), cu_k[1:].tolist(), strict=False)
    return [(slice(a, b), slice(c, d)) for a, b, c, d in bounds]


def packed(query, key, value, places, scale, causal):
    """As `attention`, on packed tensors: keys that belong to no sequence must not matter."""
    output = torch.zeros(*query.shape[:-1], value.shape[-1], dtype=torch.float64)
    logsumexp = torch.zeros(query.shape[1], query.shape[0])
    for q, k in places:
        one, lse = attention(query[None, q], key[None, k], value[None, k], scale, causal)
        output[q], logsumexp[:, q] = one[0], lse[0]
    return output, logsumexp


def in_front(query, key, value, seqused_k, scale, causal):
    """As `attention`, of the first `seqused_k` (batch,) keys of each batch element: the others must not matter."""
    assert seqused_k.dtype is torch.int32 and seqused_k.is_contiguous() and seqused_k.shape == query.shape[:1]
    found = [
        attention(query[row, None], key[row, None, :used], value[row, None, :used], scale, causal)
        for row, used in enumerate(seqused_k.tolist())
    ]
    outputs, logsumexps = zip(*found, strict=True)
    return torch.cat(outputs), torch.cat(logsumexps)


def half(*tensors, dtypes=(torch.float16, torch.bfloat16)):
    assert len({tensor.dtype for tensor in tensors}) == 1 and tensors[0].dtype in dtypes, tensors[0].dtype
    assert all(tensor.stride(-1) == 1 for tensor in tensors), "last dimension must be dense"


def alike(query, key, value, widest, multiple, pairs=()):
    """What FlashAttention checks of sizes. pairs: head_dim and value_dim that may differ."""
    assert query.shape[-1] == key.shape[-1] <= widest
    assert query.shape[-1] == value.shape[-1] or (query.shape[-1], value.shape[-1]) in pairs
    assert query.shape[-1] % multiple == 0
    assert key.shape[:-1] == value.shape[:-1]
    assert query.shape[-2] % key.shape[-2] == 0
