"""The real torch_xla on its CPU device. It needs an environment of its own: docs/xla-and-npu.md.

Its `flash_attention` hands a Pallas kernel to a TPU. Where there is none, JAX interprets that very kernel on the CPU.
"""

import contextlib
import os

import pytest
import torch
from parity import attend, doubled, qkv, relative

import attnrewrite
from attnrewrite import AttentionCompiler, Code, Machine, make_policy, records_of

os.environ.setdefault("PJRT_DEVICE", "CPU")
torch_xla = pytest.importorskip("torch_xla", reason="needs torch_xla in an environment of its own: docs/xla-and-npu.md")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
TPU = Machine("tpu", packages={name: "9999" for name in records_of("_native_xla")[0].requires})


def run(backend, *tensors, **arguments):
    """The relative error against float64, and the one site."""
    function = torch.compile(lambda *given: attend(*given, **arguments), backend=backend, fullgraph=True, dynamic=False)
    with torch.no_grad():
        output = function(*(tensor.to(torch_xla.device()) for tensor in tensors)).cpu()
    (site,) = backend.report.sites
    return relative(output, attend(*map(doubled, tensors), **arguments)), site


def masks(kv_len):
    keep = torch.rand(2, 1, 1, kv_len) > 0.4
    keep[..., 0] = True
    return {
        "none": None,
        "key padding": keep,
        "boolean": torch.rand(2, 1, 7, kv_len) > 0.4,
        "additive": torch.randn(7, kv_len),
    }


@pytest.mark.parametrize("mask", masks(11))
@pytest.mark.parametrize("name", ["native", "_native_math"])
def test_openxla(name, mask):
    """Through `inner="openxla"`: the graph is compiled and run by XLA."""
    given = [each for each in (*qkv(dim=20), masks(11)[mask]) if each is not None]
    error, site = run(attnrewrite.with_backend(name, inner="openxla"), *given, scale=0.3)
    assert site.chosen == name
    assert error < 1e-5


def test_causal_through_openxla():
    error, site = run(
        attnrewrite.with_backend("_native_math", inner="openxla"), *qkv(q_len=7, kv_len=11), is_causal=True
    )
    assert site.chosen == "_native_math"
    assert error < 1e-5


def test_the_kernel_for_tpus_is_refused_elsewhere():
    error, site = run(attnrewrite.with_backend("_native_xla", inner="openxla"), *qkv())
    assert site.chosen is None
    ((_, refused),) = site.refusals
    assert (refused.code, refused.detail) == (Code.DEVICE, "_native_xla runs on tpu, the call is on xla")
    assert error < 1e-5


@pytest.fixture
def interpreted(monkeypatch):
    """torch_xla's flash_attention, with the Pallas kernel that it would send to the TPU interpreted."""
    import jax
    from jax.experimental.pallas import tpu
    from torch_xla.experimental import custom_kernel

    traced = {}

    def trace(kernel, q, k, v, bias, segment_ids, *static, **_):
        traced["static"] = (kernel, bias is not None, segment_ids, static)
        return "payload", None

    def call(args, payload, shapes, dtypes):
        kernel, has_bias, segment_ids, static = traced.pop("static")
        q, k, v, *rest = (jax.numpy.asarray(tensor.cpu().float().numpy()) for tensor in args)
        bias = rest.pop(0) if has_bias else None
        if segment_ids is not None:  # torch_xla has spread them over lanes and sublanes
            segment_ids = type(segment_ids)(*(ids.astype("int32") for ids in (rest[0][..., 0], rest[1][:, 0])))
        with tpu.force_tpu_interpret_mode():
            output = kernel(q, k, v, bias, segment_ids, *static)
        output = output[0] if isinstance(output, list | tuple) else output
        return [torch.from_numpy(jax.device_get(output).copy()).to(args[0].device, dtypes[0])]

    monkeypatch.setattr(custom_kernel, "trace_pallas", trace)
    monkeypatch.setattr(torch_xla._XLAC, "_xla_tpu_custom_call", call)
    with contextlib.ExitStack() as stack:
        stack.callback(jax.clear_caches)
        yield


def on_a_tpu():
    return AttentionCompiler(make_policy(["_native_xla"]), "eager", TPU)


@pytest.mark.parametrize("kv_len", [1, 11, 130, 512, 600])
@pytest.mark.parametrize("mask", masks(1))
def test_parity(interpreted, mask, kv_len):
    """Lengths on both sides of the kernel's blocks of 128 and 512; a scale of its own; a batch that its blocks of 2 do not
    divide."""
    if mask == "additive":
        bias = torch.randn(3, 1, 7, kv_len)
        bias[0, :, 2, : kv_len // 2] = float("-inf")
        given = [bias]
    else:
        keep = torch.rand(3, 1, 7 if mask == "boolean" else 1, kv_len) > 0.4
        keep[0] = False  # rows without any key
        given = [] if mask == "none" else [keep]
    error, site = run(on_a_tpu(), *qkv(batch=3, kv_len=kv_len, dim=20), *given, scale=0.3)
    assert site.chosen == "_native_xla", site.refusals
    assert error < 1e-5


@pytest.mark.parametrize("scale", [None, -0.3, 0.0])
def test_a_mask_that_hides_whole_blocks(interpreted, scale):
    """As a sliding window does: the first keys a row reads are all hidden. Whatever the sign of the scale."""
    mask = torch.zeros(2, 1, 7, 1100)
    mask[0, :, :, :600] = mask[:, :, 3, :512] = mask[1, :, 5] = float("-inf")
    error, site = run(on_a_tpu(), *qkv(kv_len=1100, dim=20), mask, scale=scale)
    assert site.chosen == "_native_xla", site.refusals
    assert error < 1e-5


@pytest.mark.parametrize("lengths", [(7, 11), (11, 7), (600, 600), (9, 1030)])
def test_causal(interpreted, lengths):
    error, site = run(on_a_tpu(), *qkv(q_len=lengths[0], kv_len=lengths[1], heads=2, dim=20), is_causal=True)
    assert site.chosen == "_native_xla", site.refusals
    assert error < 1e-5


@pytest.mark.parametrize("dim", [1, 64, 72, 128, 256])
def test_head_dims(interpreted, dim):
    error, site = run(on_a_tpu(), *qkv(kv_len=600, dim=dim))
    assert site.chosen == "_native_xla", site.refusals
    assert error < 1e-5


def test_a_head_dim_that_long_sequences_do_not_take(interpreted):
    error, site = run(on_a_tpu(), *qkv(kv_len=600, dim=136))
    assert site.refusals[0][1].code is Code.HEAD_DIM
    assert error < 1e-5


def test_half_precision(interpreted):
    error, site = run(on_a_tpu(), *qkv(dtype=torch.bfloat16, dim=64))
    assert site.chosen == "_native_xla"
    assert error < 1.2e-2
