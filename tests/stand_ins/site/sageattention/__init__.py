"""Stands in for SageAttention 2.2.0."""

from reference_attention import attention, half, packed, sequences


def _checked(q, k, v, causal):
    half(q, k, v)
    if q.shape[-1] > 128:
        raise ValueError(f"Unsupported head_dim: {q.shape[-1]}")
    assert q.shape[-1] == v.shape[-1]
    return "upper-left" if causal else None


def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
    assert tensor_layout == "NHD" and not return_lse and not kwargs
    assert not is_causal or q.shape[1] == k.shape[1], "causal is defined for qo_len == kv_len"
    return attention(q, k, v, sm_scale, _checked(q, k, v, is_causal))[0].to(q.dtype).contiguous()


sageattn_qk_int8_pv_fp16_cuda = sageattn_qk_int8_pv_fp16_triton = sageattn
sageattn_qk_int8_pv_fp8_cuda = sageattn_qk_int8_pv_fp8_cuda_sm90 = sageattn


def sageattn_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal=False, sm_scale=None, smooth_k=True,
    **kwargs,
):  # fmt: skip
    assert not kwargs
    causal = _checked(q, k, v, is_causal)
    places = sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return packed(q, k, v, places, sm_scale, causal)[0].to(q.dtype)


def sageattn3_blackwell(q, k, v, attn_mask=None, is_causal=False, per_block_mean=True, **kwargs):
    """Of the hub's sage-blackwell: heads first, a scale of its own, and it writes into its key."""
    assert attn_mask is None and not kwargs
    half(q, k, v)
    assert q.shape[1] == k.shape[1] and q.shape[-1] in (64, 128)
    given = [tensor.clone().transpose(1, 2) for tensor in (q, k, v)]
    k -= k.mean(dim=-2, keepdim=True)
    output = attention(*given, None, "upper-left" if is_causal else None)[0]
    return output.transpose(1, 2).to(q.dtype).contiguous()
