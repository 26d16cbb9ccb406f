"""`checks=True`: values around every swapped attention are looked at while the graph runs, and nothing is there without it."""

from dataclasses import replace

import pytest
import torch
from parity import TOLERANCE, attend, doubled, qkv, relative
from test_context import FLASH, MATH, Layer

import attnrewrite
from attnrewrite import AttentionCheckError, attention_backend, with_backend

INNERS = ["eager", "aot_eager"]


def compiled(*choices, function=attend, inner="eager", checks=True, **options):
    return torch.compile(function, backend=with_backend(*(choices or [FLASH]), inner=inner, checks=checks), **options)


@pytest.mark.parametrize("inner", [*INNERS, "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_good_values_pass(inner, dynamic):
    run, given = compiled(inner=inner, fullgraph=True, dynamic=dynamic), qkv()
    mask = torch.randn(2, 1, 7, 11)
    assert relative(run(*given, mask), attend(*map(doubled, (*given, mask)))) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite(inner, place, value):
    run, given = compiled(inner=inner, fullgraph=True), qkv()
    given[place][1, 2, 5, 3] = value
    name = ("query", "key", "value")[place]
    where = "batch 1, head 2, position 5, channel 3, 1 of"
    said = rf"the {name} of attention site 'attend' \(_native_flash\) is not finite: {value} at {where}"
    with pytest.raises(AttentionCheckError, match=said):
        run(*given)


def hidden_row(mask):
    mask[1, 0, 4] = float("-inf") if mask.is_floating_point() else False
    return mask


def far_below(mask):
    mask[1, 0, 4] = torch.finfo(mask.dtype).min
    return mask


HIDDEN = {
    "additive": lambda: hidden_row(torch.randn(2, 1, 7, 11)),
    "boolean": lambda: hidden_row(torch.rand(2, 1, 7, 11) > -1),
    "finite": lambda: far_below(torch.zeros(2, 1, 7, 11)),
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_a_row_without_a_key(kind):
    mask = HIDDEN[kind]()
    said = (
        r"the mask of attention site 'attend' \(_native_flash\) leaves no key to batch 1, head 0, query 4, 1 of 14 rows"
    )
    with pytest.raises(AttentionCheckError, match=said):
        compiled(fullgraph=True)(*qkv(), mask)
    with pytest.raises(AttentionCheckError, match="leaves no key to query 4, 1 of 7 rows"):
        compiled()(*qkv(), mask[1, 0])


def test_a_mask_that_is_not_a_number():
    mask = torch.zeros(7, 11)
    mask[3, 2] = float("nan")
    with pytest.raises(AttentionCheckError, match="is nan at query 3, key 2"):
        compiled()(*qkv(), mask)


def broken(query, key, value, prepared, *, call):
    """A kernel that writes one value too large."""
    output = torch.softmax(query @ key.transpose(-2, -1), -1) @ value
    return torch.nn.functional.pad(output[..., 1:], (1, 0), value=float("inf"))


def test_an_output_that_is_not_finite():
    record = replace(attnrewrite.records_of(MATH)[0], name="broken", op=broken)
    run = compiled(record, fullgraph=True)
    where = "batch 0, head 0, position 0, channel 0, 56 of 896"
    said = rf"the output of attention site 'attend' \(broken\) is not finite: inf at {where}"
    with pytest.raises(AttentionCheckError, match=said):
        run(*qkv())


def test_under_inductor_and_fullgraph():
    run, given = compiled(inner="inductor", fullgraph=True), qkv()
    run(*given)
    given[1][0, 0, 0, 0] = float("nan")
    with pytest.raises(AttentionCheckError, match="the key of attention site 'attend'"):
        run(*given)


@pytest.mark.parametrize("form", ["keywords", "one tensor", "rank 3"])
def test_every_form_of_call(form):
    def keywords(query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(query=query, key=key, value=value)

    def one(query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(query, query, query)

    given = qkv() if form != "rank 3" else [tensor[:, 0] for tensor in qkv()]
    function = {"keywords": keywords, "one tensor": one, "rank 3": keywords}[form]
    run = compiled(function=function, fullgraph=True)
    assert relative(run(*given), function(*map(doubled, given))) < 1e-5
    given[0][1, 1, 1] = float("nan")
    with pytest.raises(AttentionCheckError, match="the query of"):
        run(*given)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_training(inner):
    layer, x = Layer().requires_grad_(True), torch.randn(2, 7, 24)

    def gradient(model):
        layer.zero_grad()
        model(x).square().sum().backward()
        return layer.projection.weight.grad.clone()

    expected = gradient(layer)
    assert relative(gradient(compiled(function=layer, inner=inner)), expected) < 1e-5


def graphs_with(**settings):
    texts = []

    def inner(graph_module, example_inputs):
        texts.append(graph_module.code)
        return graph_module.forward

    torch.compile(attend, backend=with_backend(FLASH, inner=inner, **settings))(*qkv())
    return texts


def test_off_there_is_nothing():
    on, off = graphs_with(checks=True), graphs_with(checks=False)
    assert "check_inputs" in on[0]
    assert "check_output" in on[0]
    torch.compiler.reset()
    assert graphs_with() == off
    assert "check" not in off[0]


def test_calls_that_stay_are_not_checked():
    given = qkv()
    given[0][0] = float("nan")
    for choice in ("native", "_native_cudnn"):
        compiled(choice)(*given)


@pytest.mark.parametrize("said", ["yes", "1", "true"])
def test_by_the_environment(said, monkeypatch):
    monkeypatch.setenv("ATTNREWRITE_CHECKS", said)
    assert with_backend(FLASH).policy.checks
    assert not with_backend(FLASH, checks=False).policy.checks
    monkeypatch.setenv("ATTNREWRITE_CHECKS", "no")
    assert not with_backend(FLASH).policy.checks


def test_turned_on_for_a_while():
    run, given = compiled(checks=False), qkv()
    given[0][0, 0, 0, 0] = float("nan")
    run(*given)
    with pytest.raises(AttentionCheckError), attention_backend(FLASH, checks=True):
        run(*given)
    run(*given)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own access, 2.15
def test_ops_behave():
    query, key, value = qkv()
    for needs_grad in (False, True):
        given = [tensor.clone().requires_grad_(needs_grad) for tensor in (query, key, value)]
        torch.library.opcheck(torch.ops.attnrewrite.check_inputs.default, (*given, None), {"site": "a", "backend": "b"})
        torch.library.opcheck(torch.ops.attnrewrite.check_output.default, (given[0],), {"site": "a", "backend": "b"})
    assert attnrewrite.AttentionCheckError is AttentionCheckError
