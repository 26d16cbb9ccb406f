"""Stands in for xformers 0.0.35: memory_efficient_attention's parts."""

import torch
from reference_attention import attention, gradients


class LowerTriangularMask:
    """Aligned upper-left."""


def _given(query, key, value, attn_bias, p):
    assert p == 0.0
    assert query.dtype == key.dtype == value.dtype
    assert query.dtype in (torch.float16, torch.bfloat16, torch.float32)
    if query.dim() == 5:  # (batch, length, key heads, heads a key head, dim)
        assert query.shape[:1] + query.shape[2:] == key.shape[:1] + key.shape[2:], "xFormers does not broadcast"
        query, key, value = (tensor.flatten(2, 3) for tensor in (query, key, value))
    assert query.shape[2] == key.shape[2]
    if isinstance(attn_bias, torch.Tensor):
        assert attn_bias.dtype == query.dtype, "a bias of another dtype"
        assert attn_bias.shape == (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
        assert all(stride % 8 == 0 for stride in attn_bias.stride()[:-1]), "rows of the bias must be aligned"
        assert attn_bias.stride(-1) == 1, "rows of the bias must be dense"
        return (query, key, value), None, attn_bias
    return (query, key, value), "upper-left" if isinstance(attn_bias, LowerTriangularMask) else None, None


def memory_efficient_attention_forward(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
):
    given, causal, bias = _given(query, key, value, attn_bias, p)
    output = attention(*given, scale, causal, bias)[0].to(query.dtype)
    return output.reshape(*query.shape[:-1], value.shape[-1])


def memory_efficient_attention_forward_requires_grad(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
):
    assert query.dim() == 4, "shared key heads are forward only"
    given, causal, bias = _given(query, key, value, attn_bias, p)
    output, logsumexp = attention(*given, scale, causal, bias)
    padded = torch.nn.functional.pad(logsumexp, (0, -query.shape[1] % 32))  # as CUTLASS does
    return output.to(query.dtype), padded


def memory_efficient_attention_backward(
    grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None
):
    given, causal, bias = _given(query, key, value, attn_bias, p)
    torch.testing.assert_close(lse, attention(*given, scale, causal, bias)[1])
    return tuple(found.to(query.dtype) for found in gradients(grad, *given, scale, causal, bias))
