"""Stands in for torch_xla 2.9.0: flash_attention as JAX's Pallas kernel computes it (jax 0.7.1, seen in interpret mode)."""

import torch

MASKED = -0.7 * torch.finfo(torch.float32).max


def flash_attention(
    q,
    k,
    v,
    causal=False,
    q_segment_ids=None,
    kv_segment_ids=None,
    sm_scale=1.0,
    *,
    ab=None,
    partition_spec=None,
    mesh=None,
):
    kv_len = k.shape[2]
    assert q.shape[:2] == k.shape[:2] and k.shape == v.shape and q.shape[-1] == k.shape[-1]
    assert q.dtype in (torch.float32, torch.bfloat16, torch.float16)
    assert kv_len <= 512 or q.shape[-1] <= 128 or q.shape[-1] % 128 == 0
    assert (q_segment_ids is None) == (kv_segment_ids is None)
    if q_segment_ids is None:
        if kv_len > 512 and ab is None:  # the last block is filled up with zeros, and nothing masks them
            k, v = (torch.nn.functional.pad(tensor, (0, 0, 0, -kv_len % 512)) for tensor in (k, v))
    else:
        assert q_segment_ids.dtype == kv_segment_ids.dtype == torch.int32
        assert q_segment_ids.shape == (q.shape[0], q.shape[2]) and kv_segment_ids.shape == (k.shape[0], kv_len)
        assert kv_len % (512 if kv_len > 512 else 128) == 0, "kv block size must be a multiple of 128"
    scores = q.float() @ k.float().transpose(-2, -1)
    if ab is not None:
        assert ab.shape == scores.shape, "out of bounds"
        scores = scores + ab.float()
    scores = scores * sm_scale
    hidden = torch.zeros(scores.shape[-2:], dtype=torch.bool)
    if causal:
        hidden = torch.ones_like(hidden).triu(1)  # col <= row
    if q_segment_ids is not None:
        hidden = hidden | (q_segment_ids[:, None, :, None] != kv_segment_ids[:, None, None, :])
    scores = scores + torch.where(hidden, MASKED, 0.0)  # a row without keys: all scores equal, the mean of the values
    return (scores.softmax(-1) @ v.float()).to(q.dtype).contiguous()
