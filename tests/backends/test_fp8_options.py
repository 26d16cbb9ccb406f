"""The options of `_flash_3_fp8` on data with large channels and a large common key. The stand-in casts to fp8 as the kernel."""

import math

import pytest
import torch
from parity import attend, doubled, on_this_gpu, qkv, relative
from stand_ins import compiler

import attnrewrite

BOTH = "_flash_3_fp8[center=1,rotate=1]"


def channels(query, key, value):
    """A few channels of query and key are 12 times as large."""
    large = torch.ones(query.shape[-1], dtype=query.dtype, device=query.device)
    large[[3, 17, 42]] = 12.0
    return query * large / 4, key * large, value


def common_key(query, key, value):
    """All keys share a vector that is much larger than what tells them apart."""
    return query, key + 12 * torch.randn(1, key.shape[1], 1, key.shape[-1]).to(key), value


def plain(query, key, value):
    return query, key, value


def tensors(**sizes):
    torch.manual_seed(0)
    given = {"batch": 1, "heads": 3, "q_len": 70, "kv_len": 301, "dim": 128, "dtype": torch.bfloat16}
    return qkv(**given | sizes)


def error(name, given, inner="eager", **arguments):
    """The relative error against float64 of the site on the record for the wheel of PyPI."""
    (record,) = (each for each in attnrewrite.records_of(name) if "fa3-fwd" in each.requires)
    backend = compiler(record, inner)
    run = torch.compile(lambda *given: attend(*given, **arguments), backend=backend, fullgraph=True, dynamic=False)
    with torch.no_grad():
        output = run(*given)
    (site,) = backend.report.sites
    assert site.chosen == name, site.refusals
    return relative(output, attend(*map(doubled, given), **arguments))


@pytest.mark.parametrize(
    ("data", "without", "enough"),
    [(plain, 0.0, ""), (channels, 0.08, "rotate=1"), (common_key, 0.08, "center=1")],
    ids=lambda each: getattr(each, "__name__", None),
)
def test_errors_by_the_kind_of_data(stand_ins, data, without, enough):
    given = data(*tensors())
    assert error("_flash_3_fp8", given) > without
    for options in {f"[{enough}]" if enough else "", "[center=1,rotate=1]"}:
        torch.compiler.reset()
        assert error(f"_flash_3_fp8{options}", given) < 6e-2, options


@pytest.mark.parametrize("dim", [32, 64, 72, 96, 128, 192])
def test_head_dims(stand_ins, dim):
    """Matrices of 16 (72 is padded to 80), 32, 64 and 128, in blocks or whole, with a factor of 2 or without."""
    assert error(BOTH, tensors(dim=dim)) < 6e-2


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("kind", ["causal", "padding", "grouped"])
def test_masks_and_grouped_heads(stand_ins, kind, inner):
    """A row's keys lose the same vector, whatever the row sees."""
    sizes, arguments = {}, {}
    if kind == "causal":
        sizes, arguments = {"q_len": 93, "kv_len": 93}, {"is_causal": True}
    elif kind == "grouped":
        sizes, arguments = {"heads": 6, "kv_heads": 2}, {"enable_gqa": True}
    query, key, value = common_key(*tensors(batch=2, **sizes))
    if kind == "padding":
        lengths = torch.tensor([120, 301])
        valid = torch.arange(301)[None] < lengths[:, None]
        arguments = {"mask": valid[:, None, None, :]}
    assert error(BOTH, (query, key, value), inner, **arguments) < 6e-2


def test_a_scale_of_the_model(stand_ins):
    assert error(BOTH, tensors(dim=96), scale=0.3 / math.sqrt(96)) < 6e-2


@pytest.mark.gpu
@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("data", [plain, channels, common_key])
def test_fp8_options_on_a_gpu(data, inner):
    on_this_gpu(BOTH)
    given = [each.cuda() for each in data(*tensors(q_len=2048, kv_len=4096))]
    exact = attend(*map(doubled, given))
    found = {}
    for name in ("_flash_3_fp8", "_flash_3_fp8[rotate=1]", "_flash_3_fp8[center=1]", BOTH):
        torch.compiler.reset()
        backend = attnrewrite.with_backend(name, numerics="quantised", inner=inner, strict=True)
        with torch.no_grad():
            found[name] = relative(torch.compile(attend, backend=backend, fullgraph=True)(*given), exact)
    print(data.__name__, inner, *(f"{name} {each:.1e}" for name, each in found.items()))
    assert found[BOTH] < 6e-2
