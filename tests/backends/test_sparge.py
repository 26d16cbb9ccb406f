"""SpargeAttn: on a stand-in that attends every block, and the library itself on a GPU."""

import pytest
import torch
from parity import attend, compiled, on_this_gpu, qkv
from test_sol import local, on_cpu, refused_on_cpu, right_on_a_stand_in, run

import attnrewrite
from attnrewrite import Code

VARIANTS = ("sparge", "sparge[cdf=0.9,similarity=0.3]", "sparge_topk", "sparge_topk[ratio=0.2]")


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("name", VARIANTS)
def test_arguments_on_a_stand_in(stand_ins, name, inner):
    right_on_a_stand_in(name, inner, length=128)


@pytest.mark.parametrize("name", VARIANTS)
def test_options_reach_the_library(stand_ins, monkeypatch, name):
    import spas_sage_attn

    given = {}
    for function in ("spas_sage2_attn_meansim_cuda", "spas_sage2_attn_meansim_topk_cuda"):
        inner = getattr(spas_sage_attn, function)
        monkeypatch.setattr(
            spas_sage_attn,
            function,
            lambda *tensors, inner=inner, **rest: given.update(rest) or inner(*tensors, **rest),
        )
    run(on_cpu(name), qkv(q_len=130, kv_len=130, dim=64, dtype=torch.bfloat16))
    assert {key: value for key, value in given.items() if key != "scale"} == {
        "sparge": {"cdfthreshd": 0.98, "simthreshd1": 0.6},
        "sparge[cdf=0.9,similarity=0.3]": {"cdfthreshd": 0.9, "simthreshd1": 0.3},
        "sparge_topk": {"topk": 0.5},
        "sparge_topk[ratio=0.2]": {"topk": 0.2},
    }[name]


@pytest.mark.parametrize(
    ("code", "sizes", "arguments"),
    [
        (Code.LENGTH, {"q_len": 127, "kv_len": 127}, {}),
        (Code.LENGTH, {"kv_len": 140}, {}),
        (Code.HEAD_DIM, {"dim": 136}, {}),
        (Code.GQA, {"heads": 4, "kv_heads": 2}, {"enable_gqa": True}),
        (Code.MASK, {}, {"is_causal": True}),
        (Code.DTYPE, {"dtype": torch.float32}, {}),
    ],
)
def test_calls_that_it_does_not_take(stand_ins, code, sizes, arguments):
    sizes = {"q_len": 130, "kv_len": 130, "dim": 128, "dtype": torch.bfloat16} | sizes
    refused_on_cpu("sparge", code, qkv(**sizes), **arguments)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("whole", "sparse"),
    [
        ("sparge[cdf=1.0]", "sparge[cdf=0.5,similarity=-0.5]"),
        ("sparge_topk[ratio=1.0]", "sparge_topk[ratio=0.1]"),
    ],
)
def test_sparge_on_a_gpu(whole, sparse, dtype):
    """With all blocks it is right to its quantisation, with fewer it is not on data without structure."""
    record = on_this_gpu(whole)
    for length, dim, inner in ((4096, 128, "eager"), (4001, 64, "inductor"), (4032, 72, "eager")):
        tensors, errors = qkv(q_len=length, kv_len=length, dim=dim, dtype=dtype, device="cuda"), []
        for name in (whole, sparse):
            torch.compiler.reset()
            site, _, error = run(attnrewrite.with_backend(name, numerics="sparse", inner=inner), tensors)
            assert site.chosen == name, site.refusals
            errors.append(error)
        assert errors[0] < record.tolerance.error, (length, dim)
        assert errors[1] > 0.2, (length, dim)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_current_device_stays():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    on_this_gpu("sparge")
    function, _ = compiled(attend, attnrewrite.with_backend("sparge", numerics="sparse", inner="eager"))
    with torch.no_grad(), torch.cuda.device(0):
        function(*(tensor.to("cuda:1") for tensor in local(device="cuda")))
        assert torch.cuda.current_device() == 0
