"""Operators of libraries that a model calls itself: each is swapped like SDPA, or stands in the report with a reason.

The libraries' kernels run on GPUs. Here their operators are defined with the libraries' own schemas and computed in float64."""

import math

import pytest
import torch
from parity import relative

import attnrewrite

FLASH_2 = (
    "flash_attn",
    "_flash_attn_forward",
    "(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal, SymInt window_size_left, "
    "SymInt window_size_right, float softcap, Tensor? alibi_slopes, bool return_softmax) -> (Tensor, Tensor, Tensor, Tensor)",
)  # flash_attn 2.8.3
FLASH_3 = (
    "flash_attn_3",
    "_flash_attn_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? v_new=None, Tensor? qv=None, Tensor? cu_seqlens_q=None, "
    "float? softmax_scale=None, bool causal=False, int window_size_left=-1, int window_size_right=-1, "
    "int attention_chunk=0, float softcap=0.0, bool rotary_interleaved=True, int num_splits=1, bool? pack_gqa=None, "
    "int sm_margin=0) -> (Tensor, Tensor, Tensor, Tensor)",
)  # some of hopper/flash_attn_interface.py
XFORMERS = (
    "xformers_flash",
    "flash_fwd",
    "(Tensor query, Tensor key, Tensor value, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float p, float softmax_scale, bool is_causal, SymInt window_left, "
    "SymInt window_right, bool return_softmax, Tensor? block_tables) -> (Tensor, Tensor, Tensor)",
)  # xformers 0.0.35
XFORMERS_ANY = (
    "xformer",
    "memory_efficient_attention_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor? b = None, float? p = 0.0, float? scale = None) -> Tensor",
)  # xformers 0.0.35


def attention(query, key, value, scale, causal=False, left=-1, right=-1, bias=None, upper=False):
    """Attention of (batch, length, heads, dim) as the libraries define it, and the log-sum-exp of the scores."""
    q, k, v = (each.double().transpose(1, 2) for each in (query, key, value))
    k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], 1) for each in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    distance = (
        torch.arange(k.shape[-2]) - torch.arange(q.shape[-2])[:, None] - (0 if upper else k.shape[-2] - q.shape[-2])
    )
    right = 0 if causal else right
    hidden = ((distance > right) if right >= 0 else False) | ((distance < -left) if left >= 0 else torch.tensor(False))
    weights = torch.nan_to_num(scores.masked_fill(hidden, -math.inf).softmax(-1))
    return (weights @ v).transpose(1, 2).to(query.dtype), scores.logsumexp(-1).float()


def several(found, count):
    output, sums = found
    return (output, sums, *(output.new_empty(0) for _ in range(count - 2)))


def flash_2(q, k, v, dropout, scale, causal, left, right, softcap, slopes, softmax):
    return several(attention(q, k, v, scale, causal, left, right), 4)


def flash_3(
    q, k, v, new_k=None, new_v=None, qv=None, starts=None, scale=None, causal=False, left=-1, right=-1, *_, **__
):
    return several(attention(q, k, v, scale, causal, left, right), 4)


def xformers(q, k, v, starts_q, starts_k, used, most_q, most_k, p, scale, causal, left, right, softmax, tables):
    return several(attention(q, k, v, scale, causal, left, right), 3)


def xformers_any(q, k, v, b=None, p=0.0, scale=None):
    return attention(q, k, v, scale, bias=b)[0]


def shapes(count):
    """The results of such an operator for fake tensors."""

    def fake(q, k, v, *_, **__):
        output = q.new_empty(*q.shape[:-1], v.shape[-1])
        sums = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
        return output if count == 1 else several((output, sums), count)

    return fake


LIBRARIES = []
for (space, name, schema), real, count in (
    (FLASH_2, flash_2, 4), (FLASH_3, flash_3, 4), (XFORMERS, xformers, 3), (XFORMERS_ANY, xformers_any, 1)
):  # fmt: skip
    if not hasattr(getattr(torch.ops, space), name):  # the library is not installed
        LIBRARIES.append(torch.library.Library(space, "FRAGMENT"))
        LIBRARIES[-1].define(name + schema)
        LIBRARIES[-1].impl(name, real, "CPU")
        torch.library.register_fake(f"{space}::{name}", shapes(count), lib=LIBRARIES[-1])
ops = torch.ops


def fused(q_len, kv_len, heads=4, kv_heads=4, value_dim=None, batch=3):
    """Query, key and value (batch, length, heads, dim) as parts of one projection, with a query of its own length."""
    both = torch.randn(batch, max(q_len, kv_len), heads * 8 + kv_heads * (8 + (value_dim or 8)))
    q, k, v = both.split([heads * 8, kv_heads * 8, kv_heads * (value_dim or 8)], -1)
    return q[:, :q_len].unflatten(-1, (heads, 8)), *(each[:, :kv_len].unflatten(-1, (kv_heads, -1)) for each in (k, v))


def f2(q, k, v, scale=0.3, causal=False, left=-1, right=-1, softcap=0.0, slopes=None):
    return ops.flash_attn._flash_attn_forward(q, k, v, 0.0, scale, causal, left, right, softcap, slopes, False)[0]


CASES = {
    "flash 2": (f2, fused(5, 7), "none"),
    "flash 2, grouped": (f2, fused(5, 7, 6, 2), "none"),
    "flash 2, causal": (lambda q, k, v: f2(q, k, v, causal=True), fused(5, 7), "causal lower-right"),
    "flash 2, causal, rows without keys": (lambda q, k, v: f2(q, k, v, causal=True), fused(9, 5), "causal lower-right"),
    "flash 2, window": (lambda q, k, v: f2(q, k, v, left=2, right=1), fused(9, 9), "sliding window (2, 1)"),
    "flash 2, window of other lengths": (lambda q, k, v: f2(q, k, v, left=2, right=1), fused(6, 9), "boolean (6, 9)"),
    "flash 2, causal window": (lambda q, k, v: f2(q, k, v, 0.3, True, 2, 4), fused(9, 9), "sliding window (2, 0)"),
    "flash 3": (
        lambda q, k, v: ops.flash_attn_3._flash_attn_forward(q, k, v, softmax_scale=0.2, causal=True, num_splits=2)[0],
        fused(5, 7, 6, 3),
        "causal lower-right",
    ),
    "flash 3, own scale": (lambda q, k, v: ops.flash_attn_3._flash_attn_forward(q, k, v)[0], fused(5, 7, value_dim=16), "none"),
    "xformers flash": (
        lambda q, k, v: ops.xformers_flash.flash_fwd(
            q, k, v, None, None, None, q.shape[1], k.shape[1], 0.0, 0.4, False, -1, -1, False, None
        )[0],
        fused(5, 7),
        "none",
    ),
    "xformers, bias": (
        lambda q, k, v: ops.xformer.memory_efficient_attention_forward(q, k, v, q[..., :7].transpose(1, 2) * 2),
        fused(5, 7),
        "additive (3, 4, 5, 7)",
    ),
}  # fmt: skip


LOWERED = ("flash 2, grouped", "flash 3", "xformers, bias")  # by AOTAutograd too


@pytest.mark.parametrize(("kernel", "dynamic"), [("native", True), ("_native_math", False)])
@pytest.mark.parametrize("case", CASES)
def test_a_dense_call_is_swapped(case, kernel, dynamic):
    function, inputs, mask = CASES[case]
    backend = attnrewrite.with_backend(kernel, inner="aot_eager" if dynamic and case in LOWERED else "eager")
    with torch.no_grad():
        wanted = function(*(each.double() for each in inputs))
        found = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*inputs)
    (site,) = backend.report.sites
    assert (site.chosen, site.call.written_as) == (kernel, "function"), site.call.obstacle
    assert dynamic or str(site.call.mask) == mask
    assert relative(found, wanted) < 1e-5


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("name", ["flash", "efficient"])
def test_pytorchs_own_kernels_below_sdpa(name, kind):
    q, k, v = fused(5, 7)
    if name == "flash":
        kind *= kind != 1  # it has no upper-left

        def function(q, k, v):
            return ops.aten._flash_attention_forward(q, k, v, None, None, 5, 7, 0.0, kind == 2, False, scale=0.3)[0]
    else:

        def function(q, k, v):
            return ops.aten._efficient_attention_forward(q, k, v, None, None, None, None, None, 0.0, kind, scale=0.3)[0]

    backend = attnrewrite.with_backend("_native_math", inner="eager")
    with torch.no_grad():
        found = torch.compile(function, backend=backend, fullgraph=True)(q, k, v)
    assert str(backend.report.sites[0].call.mask) == ["none", "causal", "causal lower-right"][kind]
    assert relative(found, attention(q, k, v, 0.3, kind > 0, upper=kind == 1)[0].double()) < 1e-5


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda q, k, v: f2(q, k, v, softcap=30.0), "its softcap is set"),
        (lambda q, k, v: f2(q, k, v, slopes=q[0, 0, :, 0]), "its alibi_slopes is set"),
        (
            lambda q, k, v: ops.flash_attn_3._flash_attn_forward(q, k, v, attention_chunk=4)[0],
            "its attention_chunk is set",
        ),
        (
            lambda q, k, v: ops.flash_attn._flash_attn_forward(q, k, v, 0.0, 0.3, False, -1, -1, 0.0, None, False)[:2],
            "its kernel's other results are used",
        ),
        (lambda q, k, v: f2(q.to(torch.float8_e4m3fn), k, v), "of float8_e4m3fn"),
        (
            lambda q, k, v: ops.xformer.memory_efficient_attention_forward(q, k, v, q[:, :, :, :5].transpose(1, 2) > 0),
            "its bias is no tensor of floating-point numbers",
        ),
    ],
)
def test_what_sdpa_does_not_compute_stays(function, why):
    inputs = fused(5, 5)
    backend = attnrewrite.with_backend("_native_math", inner="aot_eager")
    with torch.no_grad():
        wanted = function(*inputs)
        found = torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    (site,) = backend.report.sites
    assert site.chosen is None
    assert why in site.call.obstacle
    assert site.call.obstacle.startswith("the model calls the operator ")
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kernel", ["native", "_native_math"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_sdpa_and_no_operator_of_a_library(dtype, kernel):
    """In float32 the model's call stays: SDPA in its place would be cast to bfloat16, and would return that."""

    def function(*given):
        with torch.autocast("cpu", torch.bfloat16):
            return f2(*given)

    inputs = [each.to(dtype) for each in fused(5, 7)]
    backend = attnrewrite.with_backend(kernel, inner="eager")
    with torch.no_grad():
        wanted, found = function(*inputs), torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    (site,) = backend.report.sites
    assert site.chosen == (None if dtype is torch.float32 else kernel)
    assert "autocast to bfloat16 is on around it" in (site.call.obstacle or "autocast to bfloat16 is on around it")
    assert found.dtype == dtype
    assert relative(found, wanted) < (1e-5 if dtype is torch.float32 else 1e-2)


def test_gradients():
    """The model has them from the library's autograd function; here the operator itself has none."""
    inputs = [each.detach().clone().requires_grad_() for each in fused(5, 7)]
    exact = [each.detach().double().requires_grad_() for each in inputs]
    backend = attnrewrite.with_backend("native", inner="aot_eager")
    torch.compile(lambda *given: f2(*given, left=3, right=2), backend=backend)(*inputs).square().sum().backward()
    attention(*exact, 0.3, left=3, right=2)[0].square().sum().backward()
    assert backend.report.sites[0].chosen == "native"
    for one, other in zip(inputs, exact, strict=True):
        assert relative(one.grad, other.grad) < 1e-5


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning")  # torch.export's own
def test_an_exported_program():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return f2(q, k, v, causal=True)

    inputs = fused(5, 7)
    length = {1: torch.export.Dim("length", min=2, max=64)}
    program = torch.export.export(Model(), inputs, dynamic_shapes=(None, length, length))
    made = attnrewrite.rewrite(program, "_native_math")
    assert attnrewrite.report_of(made).swapped == 1
    for q, k, v in (inputs, fused(5, 11)):
        assert relative(made.module()(q, k, v), attention(q, k, v, 0.3, causal=True)[0].double()) < 1e-5


def test_packed_sequences_are_named():
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch >= 2.10")
    tokens = torch.randn(20, 4, 16, dtype=torch.bfloat16)
    starts = torch.tensor([0, 8, 20], dtype=torch.int32)
    backend = attnrewrite.with_backend("_native_math", inner=lambda module, _: lambda *given: (tokens,))
    with torch.no_grad():  # the graph does not run: the kernel is for GPUs
        torch.compile(
            lambda q, starts: varlen.varlen_attn(q, q, q, starts, starts, 12, 12), backend=backend, fullgraph=True
        )(tokens, starts)
    (site,) = backend.report.sites
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
