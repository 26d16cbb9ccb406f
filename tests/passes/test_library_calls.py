"""Operators of libraries that a model calls itself stand in the report, with a reason."""

import pytest
import torch

import attnrewrite

LIBRARY = torch.library.Library("flash_attn", "FRAGMENT")
if not hasattr(torch.ops.flash_attn, "_flash_attn_forward"):  # as flash_attn 2.8.3 defines it, with fewer arguments
    LIBRARY.define(
        "_flash_attn_forward(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal) -> Tensor"
    )
    LIBRARY.impl("_flash_attn_forward", lambda q, k, v, *_: torch.empty_like(q), "CompositeExplicitAutograd")


def site_of(function, *inputs):
    """The one site. The graph does not run: the kernels are for GPUs."""
    backend = attnrewrite.with_backend("_native_math", inner=lambda module, _: lambda *given: (inputs[0],))
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    (site,) = backend.report.sites
    return site


def test_a_dense_operator_is_named():
    query, key = torch.randn(2, 5, 6, 8), torch.randn(2, 7, 3, 8)
    site = site_of(lambda q, k: torch.ops.flash_attn._flash_attn_forward(q, k, k, 0.0, 0.35, True), query, key)
    call = site.call
    assert site.chosen is None
    assert (call.batch, call.heads, call.kv_heads, call.q_len, call.kv_len, call.head_dim) == (2, 6, 3, 5, 7, 8)
    assert call.obstacle.startswith("the model calls the operator flash_attn._flash_attn_forward itself")


def test_packed_sequences_are_named():
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch >= 2.10")
    tokens = torch.randn(20, 4, 16, dtype=torch.bfloat16)
    starts = torch.tensor([0, 8, 20], dtype=torch.int32)
    site = site_of(lambda q, starts: varlen.varlen_attn(q, q, q, starts, starts, 12, 12), tokens, starts)
    assert (site.chosen, site.call.heads, site.call.q_len, site.call.written_as) == (None, 4, 20, "function")
    assert site.call.obstacle == (
        "the model calls the operator torch_attn._varlen_attn itself: its sequences are packed into one"
    )


def test_another_operator_is_none():
    backend = attnrewrite.with_backend("_native_math", inner="eager")
    torch.compile(lambda q: torch.ops.aten.convolution(q, q, None, [1], [0], [1], False, [0], 1), backend=backend)(
        torch.randn(3, 3, 3)
    )
    assert not backend.report.sites
