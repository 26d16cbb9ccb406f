import torch
from reference_attention import alike, attention, gradients, half, packed, seen, sequences


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    assert q.dim() == 4 and dropout_p == 0 and softcap == 0 and alibi_slopes is None
    half(q, k, v)
    alike(q, k, v, 256, 8)
    output, logsumexp = attention(q, k, v, softmax_scale, seen(causal, window_size))
    output = torch.empty_like(q).copy_(output)  # as the C++ allocates it
    return (output, logsumexp, None) if return_attn_probs else output


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    assert q.dim() == 3 and dropout_p == 0 and softcap == 0 and alibi_slopes is None
    half(q, k, v)
    alike(q, k, v, 256, 8)
    places = sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    output, logsumexp = packed(q, k, v, places, softmax_scale, seen(causal, window_size))
    output = torch.empty_like(q).copy_(output)
    return (output, logsumexp, None) if return_attn_probs else output


def _flash_attn_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
    softcap, alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    assert (dropout_p, softcap, alibi_slopes) == (0.0, 0.0, None)
    visible = seen(causal, (window_size_left, window_size_right))
    assert isinstance(softmax_scale, float) and deterministic is torch.are_deterministic_algorithms_enabled()
    expected = attention(q, k, v, softmax_scale, visible)[1]
    torch.testing.assert_close(softmax_lse, expected)  # saved by the forward
    for into, found in zip((dq, dk, dv), gradients(dout, q, k, v, softmax_scale, visible), strict=True):
        into.copy_(found)
    return softmax_lse


def _flash_attn_varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
    softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    zero_tensors=False,
):  # fmt: skip
    assert (dropout_p, softcap, alibi_slopes) == (0.0, 0.0, None)
    visible = seen(causal, (window_size_left, window_size_right))
    assert deterministic is torch.are_deterministic_algorithms_enabled()
    for q_, k_ in sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        given = (dout[None, q_], q[None, q_], k[None, k_], v[None, k_])
        for into, found in zip((dq[q_], dk[k_], dv[k_]), gradients(*given, softmax_scale, visible), strict=True):
            into.copy_(found[0])
    return softmax_lse
