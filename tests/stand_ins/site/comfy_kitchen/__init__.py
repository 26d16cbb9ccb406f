"""Stands in for comfy-kitchen 0.2.40: Sol-Attn with every block exact, and int8 attention without int8."""

import torch
from reference_attention import attention, half


def sol_attn(
    q, k, v, tau=1.0, scale=None, sink_blocks=None, sink_q=None, key_bias=None, topk_ratio=0.0, tail=True, block_len=None,
    coarse_gate=None, token_aug=0,
):  # fmt: skip
    assert (tail, block_len, coarse_gate, token_aug) == (True, None, None, 0)
    half(q, k, v, dtypes=(torch.bfloat16, torch.float16))
    assert q.shape == k.shape == v.shape
    assert q.shape[-1] == 128
    assert 0.0 <= topk_ratio < 1.0
    blocks = -(-q.shape[1] // 64)
    assert all(0 <= start <= end <= blocks for start, end in (sink_blocks, sink_q))
    for tensor in (q, k, v):
        assert tensor.stride(-1) == 1
        assert tensor.data_ptr() % 16 == 0
        assert all(
            stride % 8 == 0 for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True) if size > 1
        )
    bias = None
    if key_bias is not None:
        assert key_bias.dtype is torch.float32
        assert key_bias.shape in ((q.shape[1],), (1, q.shape[1]), (q.shape[0], q.shape[1]))
        first, end = (64 * block for block in sink_blocks)
        assert not key_bias[..., :first].any(), "the bias of a block that is no sink counts in no pooled term"
        assert not key_bias[..., end:].any(), "the bias of a block that is no sink counts in no pooled term"
        bias = key_bias.reshape(-1, 1, 1, q.shape[1])
    return attention(q, k, v, scale, bias=bias)[0].to(q.dtype).contiguous()


def int8_attention(q, k, v, *, scale=None, attn_mask=None):
    """Tensors are (batch, heads, length, dim). The mask of a row without keys gives the mean of all values."""
    half(q, k, v, dtypes=(torch.bfloat16, torch.float16))
    assert v.shape == k.shape
    assert q.shape[1] % k.shape[1] == 0
    assert q.shape[-1] == k.shape[-1] <= 256
    bias = None
    if attn_mask is not None:
        assert attn_mask.dtype is torch.bool
        whole = torch.broadcast_to(attn_mask, (*q.shape[:3], k.shape[2]))
        bias = torch.zeros(whole.shape, dtype=torch.float64).masked_fill(~whole, -1e30)
    output, _ = attention(*(tensor.transpose(1, 2) for tensor in (q, k, v)), scale, bias=bias)
    return output.to(q.dtype).transpose(1, 2).contiguous()
