"""Stands in for SpargeAttn 0.1.0 (bfd980b), with every block attended."""

from reference_attention import attention, half


def spas_sage2_attn_meansim_cuda(
    q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, smooth_k=True, simthreshd1=0.6, cdfthreshd=0.98,
    pvthreshd=50, attention_sink=False, tensor_layout="HND", output_dtype=None, return_sparsity=False,
):  # fmt: skip
    assert 0 < cdfthreshd <= 1
    assert -1 <= simthreshd1 <= 1
    return _attended(q, k, v, is_causal, scale, tensor_layout)


def spas_sage2_attn_meansim_topk_cuda(
    q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, smooth_k=True, simthreshd1=-0.1, cdfthreshd=None,
    topk=0.5, pvthreshd=50, attention_sink=False, tensor_layout="HND", output_dtype=None, return_sparsity=False,
):  # fmt: skip
    assert (simthreshd1, cdfthreshd) == (-0.1, None)
    assert 0 < topk <= 1
    return _attended(q, k, v, is_causal, scale, tensor_layout)


def _attended(q, k, v, is_causal, scale, layout):
    half(q, k, v)
    assert (is_causal, layout) == (False, "HND")
    assert q.shape == k.shape == v.shape
    assert q.shape[-2] >= 128 and q.shape[-1] in (64, 128)
    output, _ = attention(*(tensor.transpose(1, 2) for tensor in (q, k, v)), scale)
    return output.to(q.dtype).transpose(1, 2).contiguous()
