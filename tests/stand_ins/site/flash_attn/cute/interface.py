from types import SimpleNamespace

import torch
from reference_attention import attention, gradients, half, in_front, seen

from .block_sparsity import listed


def flash_attn_func(
    q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
    learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
    score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
    block_sparse_tensors_bwd=None, return_lse=False, gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
):  # fmt: skip
    assert (qv, gather_kv_indices, learnable_sink, softcap) == (None, None, None, 0.0)
    sizes(q, k, v)
    bias = None
    if mask_mod is not None:
        assert (causal, window_size, pack_gqa) == (False, (None, None), False) and q.shape[-1] <= 128
        bias = torch.where(left(q, k, mask_mod, aux_tensors, block_sparse_tensors), 0.0, -torch.inf)
    output, logsumexp = attention(q, k, v, softmax_scale, seen(causal, window_size), bias)
    return output.to(q.dtype).contiguous(), logsumexp if return_lse else None


def left(q, k, mask_mod, aux_tensors, lists):
    """Which scores (batch, heads, queries, keys) the kernel computes and keeps. It asks `mask_mod` in the blocks that are seen
    in part, also for queries and keys behind the last."""
    lengths = (q.shape[1], k.shape[1])
    axes = (range(q.shape[0]), range(q.shape[2]), *(range(-(-length // 128) * 128) for length in lengths))
    at = (axis[None] for axis in torch.meshgrid(*(torch.tensor(axis) for axis in axes), indexing="ij"))
    (kept,) = mask_mod(*at, SimpleNamespace(seqlen_q=lengths[0], seqlen_k=lengths[1]), aux_tensors)
    partly, whole = (
        listed(*each, lists.block_size, lengths) for each in (lists[:2], (lists.full_block_cnt, lists.full_block_idx))
    )
    assert not (partly & whole).any()
    return whole | (partly & kept[:, :, : lengths[0], : lengths[1]])


def flash_attn_varlen_func(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
    seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, return_lse=False,
):  # fmt: skip
    assert (qv, cu_seqlens_q, cu_seqlens_k, seqused_q, window_size, softcap) == (None,) * 4 + ((None, None), 0.0)
    sizes(q, k, v)
    output, logsumexp = in_front(q, k, v, seqused_k, softmax_scale, "lower-right" if causal else None)
    return output.to(q.dtype).contiguous(), logsumexp if return_lse else None


def sizes(q, k, v):
    half(q, k, v)
    assert 8 <= q.shape[-1] <= 256 and q.shape[-1] % 8 == 0 and v.shape[-1] % 8 == 0
    assert q.shape[2] % k.shape[2] == 0


def _flash_attn_bwd(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
    window_size_right=None, *, seqused_k=None, deterministic=False, dq=None, dk=None, dv=None,
):  # fmt: skip
    assert deterministic is torch.are_deterministic_algorithms_enabled()
    causal = seen(causal, (window_size_left, window_size_right))
    if seqused_k is not None:  # what is written of keys that are not in use is nothing
        for row, used in enumerate(seqused_k.tolist()):
            only, keys = slice(row, row + 1), slice(used)
            found = gradients(dout[only], q[only], k[only, keys], v[only, keys], softmax_scale, causal)
            for into, grad in zip((dq[only], dk[only, keys], dv[only, keys]), found, strict=True):
                into.copy_(grad)
        return dq, dk, dv
    torch.testing.assert_close(lse, attention(q, k, v, softmax_scale, causal)[1])
    for into, found in zip((dq, dk, dv), gradients(dout, q, k, v, softmax_scale, causal), strict=True):
        into.copy_(found)
    return dq, dk, dv
