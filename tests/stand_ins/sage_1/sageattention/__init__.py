"""Stands in for SageAttention 1.0.6: it writes into its key and counts missing keys of its last block as zeros."""

import torch
from reference_attention import attention, packed, sequences


def _checked(q, k, v):
    assert q.dtype in (torch.float16, torch.bfloat16, torch.float32) and q.dtype == k.dtype == v.dtype
    assert q.shape[-1] in (64, 96, 128), "headdim should be in [64, 96, 128]."
    assert all(tensor.stride(-1) == 1 for tensor in (q, k, v)), "Last dim of qkv must be contiguous."


def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True, **kwargs):
    assert tensor_layout == "NHD" and not kwargs
    _checked(q, k, v)
    given = k.clone()
    k -= k.mean(dim=1, keepdim=True)
    missing = (0, 0, 0, 0, 0, -k.shape[1] % 64)
    given, v = (torch.nn.functional.pad(tensor, missing) for tensor in (given, v))
    return attention(q, given, v, sm_scale, "upper-left" if is_causal else None)[0].to(q.dtype).contiguous()


def sageattn_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal=False, sm_scale=None, smooth_k=True,
    **kwargs,
):  # fmt: skip
    assert not kwargs
    _checked(q, k, v)
    places = sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    output = packed(q, k.clone(), v, places, sm_scale, "upper-left" if is_causal else None)[0].to(q.dtype)
    k -= k.mean(dim=0, keepdim=True)
    return output
