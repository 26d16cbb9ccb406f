"""`ops.register`: what it makes of each library's function, on stand-ins; and its errors."""

import random

import pytest
import torch
from parity import attend, qkv, recorded
from stand_ins import KERNELS, compiler, fewest_keys, name_of
from torch._dynamo.utils import counters
from torch.testing._internal.optests import OpCheckError
from torch.utils.flop_counter import FlopCounterMode

import attnrewrite
from attnrewrite.kernels import ops, sources
from attnrewrite.kernels.machines import satisfies

REGISTERED = [record for record in KERNELS if record.family != "Ascend"]  # its op is torch_npu's own


def calls_of(record, needs_grad=False):
    """The calls of ops that one attention becomes: batch 3, 6 heads, of which 3 share a key head where the kernel can."""
    calls = []
    grouped = record.gqa and not (needs_grad and record.name == "xformers")  # there: forward only
    tensors = qkv(
        batch=3, heads=6, kv_heads=2 if grouped else 6, q_len=7, kv_len=kv_len(record), dim=64, dtype=torch.bfloat16
    )
    tensors = [tensor.requires_grad_(needs_grad) for tensor in tensors]
    run = torch.compile(
        lambda *given: attend(*given, enable_gqa=grouped), backend=compiler(record, recorded(calls)), fullgraph=True
    )
    with torch.set_grad_enabled(needs_grad):
        run(*tensors)
    return calls


def kv_len(record):
    return max(11, fewest_keys(record))


@pytest.fixture(params=REGISTERED, ids=name_of)
def record(request, stand_ins):
    return stand_ins(request.param)


@pytest.mark.filterwarnings("ignore:.*test_.*:UserWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own access, 2.15
@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck(record, needs_grad):
    """PyTorch's own checks: schema (no input is written to, none returned), fake against real to the stride, autograd,
    AOTAutograd with static and dynamic sizes."""
    if needs_grad and not record.backward:
        pytest.skip("no backward: refused with GRAD")
    ((op, args, kwargs),) = calls_of(record, needs_grad)
    if args[0].dtype is torch.float8_e4m3fn:  # the check of the schema multiplies tensors, which fp8 cannot
        torch.library.opcheck(op, args, kwargs, test_utils=("test_faketensor", "test_autograd_registration"))
        return
    assert op._schema.name.endswith("_autograd") == needs_grad
    torch.library.opcheck(op, args, kwargs)


def test_log_sum_exp_is_float32_and_right(record):
    if not record.backward:
        pytest.skip("returns none")
    ((op, args, kwargs),) = calls_of(record, needs_grad=True)
    with torch.no_grad():
        _, found = op(*args, **kwargs)
    query, key = args[:2]
    group = query.shape[-2] // key.shape[-2]
    if query.dim() == 3:  # packed: three sequences of 7 queries and 11 keys
        query, key = query.unflatten(0, (3, -1)), key.unflatten(0, (3, -1))
    query, key = (tensor.detach().double().transpose(1, 2) for tensor in (query, key))
    scores = query @ key.repeat_interleave(group, 1).transpose(-2, -1) * query.shape[-1] ** -0.5
    expected = scores.logsumexp(-1)
    assert found.dtype is torch.float32
    if found.dim() == 2:
        expected = expected.transpose(0, 1).flatten(1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_products_are_counted(record):
    """4 * batch * heads * q_len * kv_len * head_dim, as for SDPA: torch.utils.flop_counter knows the op."""
    ((op, args, kwargs),) = calls_of(record)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        op(*args, **kwargs)
    assert counter.get_total_flops() == 4 * 3 * 6 * 7 * kv_len(record) * 64


def test_products_of_the_backward_are_counted(record):
    if not record.backward:
        pytest.skip("no backward")
    ((op, args, kwargs),) = calls_of(record, needs_grad=True)
    with FlopCounterMode(display=False) as counter:
        output, _ = op(*args, **kwargs)
        forward = counter.get_total_flops()
        output.sum().backward()
    assert counter.get_total_flops() == forward * 3.5  # two products forward, five backward


def test_strings_name_the_call(record):
    ((_, _, kwargs),) = calls_of(record)
    assert set(kwargs) == {"backend", "source", "site"}
    assert kwargs["backend"] == record.name
    assert str(record.source).split("@")[0] in kwargs["source"]
    assert kwargs["site"] == "attend"


def test_a_kernel_that_raises_is_named(record):
    """Site, backend, library, shapes and the remedy; the library's own error is the cause."""
    ((op, args, kwargs),) = calls_of(record)
    args = [args[0][..., :63], *args[1:]]  # no library takes it
    with pytest.raises(RuntimeError) as caught, torch.no_grad():
        op(*args, **{**kwargs, "site": "blocks.3.attn1"})
    said = str(caught.value)
    assert said.startswith(f"{record.name} ({kwargs['source']}) failed at attention site 'blocks.3.attn1' on tensors (")
    assert f"{tuple(args[0].shape)} {str(args[0].dtype).removeprefix('torch.')}" in said
    assert "rules={'blocks.3.attn1': 'native'}" in said
    assert isinstance(caught.value.__cause__, Exception)


def test_a_kernel_that_raises_in_a_compiled_model(stand_ins, monkeypatch):
    """The user's own view of it: the message comes out whole."""
    import flash_attn

    def fails(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(flash_attn, "flash_attn_func", fails)
    (record,) = attnrewrite.records_of("flash")
    for inner in ("eager", "inductor"):
        torch.compiler.reset()
        with (
            torch.no_grad(),
            pytest.raises(RuntimeError, match=r"flash \(flash-attn 2\.8\.3\) failed at attention site 'attend'"),
        ):
            torch.compile(attend, backend=compiler(record, inner), fullgraph=True)(*qkv(dim=64, dtype=torch.bfloat16))


def test_versions_do_not_share_compiled_code(stand_ins, monkeypatch, tmp_path):
    """The library's version is a constant of the graph: PyTorch's caches on disk, which know an op by its name, see it."""
    (record,) = attnrewrite.records_of("flash")
    scale = random.random()  # a graph that no earlier run has left in the cache
    hits = []
    for number, version in enumerate(("2.8.3", "2.8.3", "2.8.4")):
        about = tmp_path / str(number) / f"flash_attn-{version}.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {version}\n")
        monkeypatch.syspath_prepend(about.parent)  # before the stand-in's own
        torch.compiler.reset()
        counters.clear()
        sources._TEXTS.clear()
        with torch.no_grad():
            run = torch.compile(
                lambda *given: attend(*given, scale=scale), backend=compiler(record, "inductor"), fullgraph=True
            )
            run(*qkv(dim=64, dtype=torch.bfloat16))
        assert f"flash-attn {version}" in sources._LIBRARIES
        hits.append(counters["aot_autograd"]["autograd_cache_hit"])
    assert hits == [0, 1, 0]


def wrong_strides(query, key, value):
    return torch.empty_like(query)


def wrong_dtype(query, key, value):
    return query.new_empty(query.shape, dtype=torch.float64)


@pytest.mark.parametrize("fake", [wrong_strides, wrong_dtype])
def test_a_wrong_fake_would_be_seen(fake, monkeypatch):
    """opcheck above can fail. (Strides it compares from torch 2.13 on; Inductor's code asserts them in every version.)"""
    if fake is wrong_strides and not satisfies(torch.__version__, ">=2.13"):
        pytest.skip("opcheck compares strides from torch 2.13 on")
    op = ops.register(
        f"test_{fake.__name__}",
        "(Tensor query, Tensor key, Tensor value) -> Tensor",
        lambda library, query, key, value: query.clone(memory_format=torch.contiguous_format),
        fake,
        flops=ops.products,
    )
    query = torch.randn(2, 5, 3, 8).transpose(1, 2)
    monkeypatch.setitem(sources._LIBRARIES, "torch 0", torch)
    kwargs = {"backend": "toy", "source": "torch 0", "site": "here"}
    with pytest.raises(OpCheckError):
        torch.library.opcheck(op.forward, (query, query, query), kwargs)
