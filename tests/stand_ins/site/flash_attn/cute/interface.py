import torch
from reference_attention import attention, gradients, half


def flash_attn_func(
    q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
    learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
    score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
    block_sparse_tensors_bwd=None, return_lse=False, gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
):  # fmt: skip
    assert (qv, gather_kv_indices, window_size, learnable_sink, softcap) == (None, None, (None, None), None, 0.0)
    half(q, k, v)
    assert 8 <= q.shape[-1] <= 256 and q.shape[-1] % 8 == 0 and v.shape[-1] % 8 == 0
    assert q.shape[2] % k.shape[2] == 0
    output, logsumexp = attention(q, k, v, softmax_scale, "lower-right" if causal else None)
    return output.to(q.dtype).contiguous(), logsumexp if return_lse else None


def _flash_attn_bwd(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
    window_size_right=None, *, deterministic=False, dq=None, dk=None, dv=None,
):  # fmt: skip
    assert deterministic is torch.are_deterministic_algorithms_enabled()
    causal = "lower-right" if causal else None
    torch.testing.assert_close(lse, attention(q, k, v, softmax_scale, causal)[1])
    for into, found in zip((dq, dk, dv), gradients(dout, q, k, v, softmax_scale, causal), strict=True):
        into.copy_(found)
    return dq, dk, dv
