"""Stands in for fa3-fwd 0.0.3: FlashAttention 3 without float16, backward, local windows."""

import torch
from reference_attention import alike, attention, half, in_front, packed, seen, sequences

DTYPES = (torch.bfloat16,)
WINDOWS = False
PAIRS = ((192, 128), (64, 128))  # in fp8 the second is wrong


def flash_attn_func(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    return_attn_probs=False,
):  # fmt: skip
    assert (qv, attention_chunk, softcap) == (None, 0, 0.0)
    visible = _visible(causal, window_size)
    output, logsumexp = _batched(q, k, v, None, softmax_scale, visible, q_descale, k_descale, v_descale)
    return (output, logsumexp) if return_attn_probs else output


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
    max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None,
    causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
    scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False,
):  # fmt: skip
    assert (k, v, qv, cu_seqlens_q, window_size, attention_chunk, softcap) == (None,) * 4 + ((-1, -1), 0, 0.0)
    output, logsumexp = _batched(
        q,
        k_cache,
        v_cache,
        cache_seqlens,
        softmax_scale,
        _visible(causal, window_size),
        q_descale,
        k_descale,
        v_descale,
    )
    return (output, logsumexp) if return_softmax_lse else output


def _visible(causal, window):
    assert WINDOWS or window == (-1, -1)
    return seen(causal, window)


def _batched(q, k, v, seqused_k, softmax_scale, causal, q_descale, k_descale, v_descale):
    assert q.dim() == 4
    fp8 = q.dtype is torch.float8_e4m3fn
    half(q, k, v, dtypes=(torch.float8_e4m3fn,) if fp8 else DTYPES)
    alike(q, k, v, 256, 16 if fp8 else 8, PAIRS[:1] if fp8 else PAIRS)
    scales = (q_descale, k_descale, v_descale)
    if fp8:
        assert all(scale.shape == (q.shape[0], k.shape[2]) and scale.dtype is torch.float32 for scale in scales)
        wide = [
            scale.repeat_interleave(x.shape[2] // k.shape[2], 1) for scale, x in zip(scales, (q, k, v), strict=True)
        ]
        q, k, v = (x.float() * scale[:, None, :, None] for x, scale in zip((q, k, v), wide, strict=True))
    else:
        assert scales == (None, None, None)
    dtype = torch.bfloat16 if fp8 else q.dtype
    if seqused_k is None:
        output, logsumexp = attention(q, k, v, softmax_scale, causal)
    else:
        output, logsumexp = in_front(q, k, v, seqused_k, softmax_scale, causal)
    return output.to(dtype).contiguous(), logsumexp


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, softmax_scale=None,
    causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0,
    softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    assert q.dim() == 3
    assert (seqused_q, seqused_k, qv, q_descale, softcap) == (None, None, None, None, 0.0)
    half(q, k, v, dtypes=DTYPES)
    alike(q, k, v, 256, 8, PAIRS)
    places = sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    output, logsumexp = packed(q, k, v, places, softmax_scale, _visible(causal, window_size))
    output = output.to(q.dtype)
    return (output, logsumexp) if return_attn_probs else output
