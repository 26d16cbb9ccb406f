"""`check`: each site beside float64 on its own inputs, the whole beside the unchanged model, and the first that goes wrong."""

import json
import math
import re
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from model_zoo import MODELS
from parity import attend, qkv, relative

import attnrewrite
from attnrewrite import check, with_backend
from attnrewrite.commands.demo_model import Demo, inputs
from attnrewrite.kernels.calls import AttentionCall
from attnrewrite.measuring.accuracy import accuracy
from attnrewrite.measuring.capturing import undone
from attnrewrite.measuring.reference import Reference, reference

MATH = attnrewrite.records_of("_native_math")[0]


def kernel(change, name="changed", **limits):
    """A record whose kernel computes attention and then applies `change` to the output."""

    def op(query, key, value, prepared, *, call):
        return change(F.scaled_dot_product_attention(query, key, value, scale=call.scale))

    return replace(MATH, name=name, op=op, masks=frozenset({attnrewrite.MaskKind.NONE}), prepare=None, **limits)


class Stack(torch.nn.Module):
    """Three attentions in a row on tokens (batch, tokens, 24), 3 heads of 8."""

    def __init__(self, before=lambda tokens: tokens):
        super().__init__()
        self.layers = torch.nn.ModuleList(Attention() for _ in range(3))
        self.before = before

    def forward(self, tokens):
        tokens = self.before(tokens)
        for layer in self.layers:
            tokens = tokens + layer(tokens)
        return tokens


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(24, 72)

    def forward(self, tokens):
        query, key, value = (each.unflatten(-1, (3, 8)).transpose(1, 2) for each in self.qkv(tokens).chunk(3, -1))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def checked(model, *args, choices=("_native_flash",), **settings):
    with torch.no_grad():
        return check(model, *args, backend=with_backend(*choices, inner="eager", **settings))


@pytest.fixture(scope="module")
def stack():
    torch.manual_seed(0)
    return Stack().eval(), torch.randn(2, 11, 24)


# -- the numbers


def of(exact, output, rows=None, seen=None):
    rows = torch.arange(output.shape[-2]) if rows is None else rows
    return accuracy(Reference(rows, exact, seen, torch.ones(len(rows), dtype=torch.float64)), output)


def test_numbers_of_a_known_error():
    exact = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    found = of(exact, exact * 1.01)
    assert found.relative_error == pytest.approx(0.01, rel=1e-9)
    assert found.sqnr_db == pytest.approx(40, abs=1e-6)
    assert found.cosine == pytest.approx(1, abs=1e-12)
    assert (found.nan, found.inf, found.rows, found.all_rows) == (0, 0, 42, 42)
    turned = of(exact, -exact)
    assert (turned.relative_error, turned.cosine) == (pytest.approx(2), pytest.approx(-1))
    same = of(exact, exact)
    assert (same.relative_error, same.sqnr_db, same.worst_error) == (0, math.inf, 0)


def test_worst_row():
    exact = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    exact[0, 2, 4] *= 1e-3  # small, and off by a tenth: the largest relative error of all rows
    output = exact * 1.001
    output[0, 2, 4] *= 1.1
    found = of(exact, output)
    assert found.worst_row == (0, 2, 4)
    assert found.worst_error == pytest.approx(0.1011, rel=1e-3)
    assert found.relative_error == pytest.approx(0.001, rel=1e-2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite(value):
    exact = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    output = exact.clone()
    output[1, 1, 3, 2] = value
    found = of(exact, output)
    assert found.worst_row == (1, 1, 3)
    assert math.isnan(found.relative_error)
    assert (found.nan, found.inf) == ((1, 0) if math.isnan(value) else (0, 1))
    assert not found.finite
    assert found.to_dict()["relative_error"] == "nan"


def test_rows_are_those_of_the_reference():
    """Counts are over the whole output, errors over the rows compared."""
    exact = torch.randn(1, 2, 3, 5, dtype=torch.float64)
    rows = torch.tensor([0, 4, 9])
    output = torch.full((1, 2, 10, 5), math.nan, dtype=torch.float64)
    output[:, :, rows] = exact
    found = of(exact, output, rows)
    assert (found.relative_error, found.nan, found.rows, found.all_rows) == (0, 70, 6, 20)
    output[:, :, 9] += 1
    assert of(exact, output, rows).worst_row[2] == 9


def test_zero_rows():
    exact = torch.zeros(1, 1, 2, 4, dtype=torch.float64)
    exact[0, 0, 0] = 2
    output = exact.clone()
    output[0, 0, 1] = 1  # beside the mean norm of all rows, 2
    assert of(exact, output).worst_row == (0, 0, 1)
    assert of(exact, output).worst_error == pytest.approx(1)
    assert of(exact * 0, output * 0).relative_error == 0
    hidden = of(exact, output, seen=torch.tensor([[[True, False]]]))  # a row without any key
    assert hidden.rows == 1
    assert hidden.relative_error == 0


def heads(*given):
    return F.scaled_dot_product_attention(*given)


def emptied(kind):
    query, key, value = qkv(batch=2, heads=3, q_len=5, kv_len=7)
    hidden = torch.zeros(5, 7, dtype=torch.bool)
    return {
        "no batch": (query[:0], key[:0], value[:0]),
        "no query": (query[:, :, :0], key, value),
        "no key": (query, key[:, :, :0], value[:, :, :0]),
        "all hidden": (query, key, value, hidden),
        "all hidden, additive": (query, key, value, torch.full((5, 7), -math.inf)),
    }[kind]


@pytest.mark.parametrize("kind", ["no batch", "no query", "no key", "all hidden", "all hidden, additive"])
def test_a_site_with_nothing_to_compare_is_neither_right_nor_wrong(kind):
    found = checked(heads, *emptied(kind), choices=["_native_math"])
    (site,) = found.sites
    of = site.accuracy
    assert all(math.isnan(each) for each in (of.relative_error, of.sqnr_db, of.cosine, of.worst_error))
    assert (of.rows, site.wrong, found.ok) == (0, "", True)
    assert "nothing to compare, no row sees a key: heads" in str(found)
    assert json.loads(found.to_json())["sites"][0]["accuracy"]["relative_error"] == "nan"


def test_nan_inputs_are_no_error_of_zero():
    query, key, value = qkv()
    found = checked(attend, query * math.nan, key * math.nan, value * math.nan, choices=["_native_flash"])
    (site,) = found.sites
    assert math.isnan(site.accuracy.relative_error)
    assert math.isnan(site.accuracy.sqnr_db)
    assert "values that are not finite come in" in str(found)
    assert not found.ok
    assert math.isnan(
        checked(lambda *given: attend(*given).argmax(-1), query, key, value, choices=["native"]).output.relative_error
    )


def test_outputs_in_the_form_of_the_node():
    """Heads folded into the batch, and transposed: what spelled-out attention gives."""
    tensor = torch.randn(2, 3, 5, 4)
    views = (("transpose", (1, 2)), ("flatten", (0, 1)), ("unsqueeze", (0,)))
    folded = tensor.transpose(1, 2).flatten(0, 1)[None]
    assert torch.equal(undone(folded, views, (2, 3, 5, 4)), tensor)


# -- through models


def test_right_kernels_are_right():
    """Six sites: causal, padded, spelled out, positions; each in the order in which they run."""
    torch.manual_seed(0)
    found = checked(Demo().eval(), *inputs(), choices=("_native_flash", "native"))
    names = ["causal", "prompt", "spelled_out", "joint", "outer", "positions"]
    assert [site.name for site in found.sites] == names
    assert {site.kernel for site in found.sites} == {"_native_flash"}
    assert all(1e-9 < site.accuracy.relative_error < 1e-6 for site in found.sites)
    assert found.output.relative_error < 1e-6
    assert found.ok
    assert found.first_wrong is None
    assert found.missing == ()
    assert found.output.psnr_db is None  # tokens are no image
    assert "6 attention sites, none of them wrong" in str(found)
    assert "prompt, spelled_out (2)" in str(found)


def test_errors_are_to_float64_on_the_sites_own_inputs(stack):
    """A kernel that is 1 % off at every site: each has 1 %, however far the inputs have moved by then."""
    model, tokens = stack
    found = checked(model, tokens, choices=(kernel(lambda output: output * 1.01),))
    assert [site.accuracy.relative_error for site in found.sites] == pytest.approx([0.01] * 3, rel=1e-4)
    with torch.no_grad():
        run = torch.compile(model, backend=with_backend(kernel(lambda output: output * 1.01), inner="eager"))
        assert found.output.relative_error == pytest.approx(relative(run(tokens), model(tokens)), rel=1e-6)
    assert found.first_wrong is found.sites[0]
    assert found.first_wrong.wrong == "relative error 1.0e-02, where rounding to float32 explains 1.0e-05"
    assert "first site that goes wrong: layers.0 (changed): relative error 1.0e-02" in str(found)


def test_the_first_site_that_goes_wrong(stack):
    """Black images: one kernel gives NaN in the middle of the model."""
    model, tokens = stack
    broken = kernel(lambda output: torch.cat([output[..., :-1], output[..., -1:] * math.nan], -1))
    found = checked(model, tokens, choices=("_native_flash",), rules={"layers.1": broken})
    assert found.first_wrong.name == "layers.1"
    assert found.first_wrong.wrong == "its output is not finite, its inputs are: 66 NaN, 0 infinite"
    assert [bool(site.wrong) for site in found.sites] == [False, True, True]
    assert "The cause lies before this attention" in found.sites[2].wrong
    assert (found.output.bad, found.output.bad_before) == (tokens.numel(), 0)
    assert not found.ok
    text = str(found)
    assert "first site that goes wrong: layers.1 (changed)" in text
    assert "2 of them wrong" in text


def test_what_is_wrong_before_any_attention():
    torch.manual_seed(0)
    model = Stack(before=lambda tokens: tokens.sub(tokens.max()).mul(-1).log()).eval()  # log(0) at one place
    found = checked(model, torch.randn(2, 11, 24))
    assert found.first_wrong.name == "layers.0"
    assert found.first_wrong.bad_inputs.keys() == {"query", "key", "value"}
    assert found.output.bad_before == found.output.bad > 0


def miscompiles(operator, factor):
    """An inner compiler that runs the graph, and multiplies what nodes with `operator` in their name give by `factor`."""

    class Changed(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):
            found = super().call_function(target, args, kwargs)
            if operator not in str(target):
                return found
            return (found[0] * factor, *found[1:]) if isinstance(found, tuple) else found * factor

    return lambda graph_module, example_inputs: lambda *inputs: Changed(graph_module).run(*inputs)


def test_an_output_that_is_wrong_though_no_site_is(stack):
    """A compiler that makes something else of a kernel in the whole model."""
    backend = with_backend("_native_math", inner=miscompiles("_scaled_dot_product_attention_math", 1.5))
    with torch.no_grad():
        found = check(*stack, backend=backend)
    assert found.first_wrong is None
    assert found.output.relative_error > 0.01
    assert found.output.limit < 2e-4
    assert not found.ok
    text = str(found)
    assert "3 attention sites, none of them wrong by itself, but the output is" in text
    assert re.search(
        r"the output is wrong: relative error \S+, where rounding and the kernels explain 1\.\de-04\.", text
    )
    assert "Give some sites another kernel (rules=) to see which one it is" in " ".join(text.split())
    assert strict_json(found.to_json())["output"]["wrong"].startswith("relative error")


def test_what_the_compiler_does_to_everything_is_no_fault_of_a_kernel(stack):
    """Rounding of the compiler that is as large with PyTorch's own kernels."""
    with torch.no_grad():
        found = check(*stack, backend=with_backend("_native_math", inner=miscompiles("linear", 1.01)))
    assert found.output.relative_error > 1e-3
    assert found.output.limit > found.output.relative_error
    assert found.ok
    assert "none of them wrong\n" in str(found)


def test_long_sequences_are_sampled():
    calls = AttentionCall("site", 1, 2, 2, 700, 700, 8, 8, "float32")
    query, key, value = (torch.randn(1, 2, 700, 8) for _ in range(3))
    exact = reference(calls, query, key, value, None)
    rows = exact.rows.tolist()
    assert len(rows) == 256
    assert (rows[0], rows[-1]) == (0, 699)
    found = checked(F.scaled_dot_product_attention, query, key, value)
    assert (found.sites[0].accuracy.rows, found.sites[0].accuracy.all_rows) == (512, 1400)
    assert found.ok


@pytest.mark.parametrize("length", [300, 4001, 75_600])
def test_a_sample_of_rows_estimates_the_error_of_the_whole(length):
    """A sparse kernel may be worse in its last block of a few tokens, which hardly counts; one that loses the last token is
    wrong."""
    call = AttentionCall("site", 1, 1, 1, length, 50, 8, 8, "float32")
    query, key, value = (torch.randn(1, 1, size, 8) for size in (length, 50, 50))
    exact = reference(call, query, key, value, None)
    right = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    assert exact.weights.sum() == pytest.approx(length, rel=3e-3)
    uneven = torch.full((length, 1), 1e-2, dtype=torch.float64)
    uneven[-16:] = 0.2
    output = right + right * uneven * torch.randn(right.shape).sign()
    true = ((output - right).norm() / right.norm()).item()
    assert exact.error(output) == pytest.approx(true, rel=0.25)
    assert accuracy(exact, output).relative_error == pytest.approx(exact.error(output))
    lost = right.clone()
    lost[:, :, -1] = -lost[:, :, -1]
    assert exact.error(lost) > 1.2e-2


FORMS = {
    "grouped": (qkv(heads=6, kv_heads=2), {"enable_gqa": True}),
    "causal": (qkv(q_len=7, kv_len=7), {"is_causal": True}),
    "scale": (qkv(), {"scale": 0.7}),
    "rank 3": ([each[:, 0] for each in qkv()], {}),
    "rank 5": ([each.unflatten(0, (2, 1)) for each in qkv()], {}),
    "value_dim": (qkv(value_dim=24), {}),
    "mask of rank 2": (qkv(), {"attn_mask": torch.arange(77).view(7, 11) % 3 != 1}),
    "additive": (qkv(), {"attn_mask": torch.linspace(-3, 3, 77).view(1, 1, 7, 11)}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_call(form):
    tensors, arguments = FORMS[form]
    found = checked(
        lambda *given: F.scaled_dot_product_attention(*given, **arguments), *tensors, choices=("_native_math",)
    )
    (site,) = found.sites
    assert site.kernel == "_native_math"
    assert site.accuracy.relative_error < 1e-6
    assert site.accuracy.rows == site.accuracy.all_rows > 0


def test_a_model_of_diffusers():
    model, kwargs = MODELS["pixart"]()
    with torch.no_grad():
        found = check(model, **kwargs, backend=with_backend("_native_math", inner="eager"))
    assert found.ok, str(found)
    assert {site.kernel for site in found.sites} == {"_native_math"}
    assert found.output.psnr_db > 100


def test_sites_that_stay_are_looked_at_too(stack):
    model, tokens = stack
    found = checked(model, tokens, choices=("_native_cudnn",))
    assert [site.kernel for site in found.sites] == ["(unchanged)"] * 3
    assert found.ok


def test_a_module_that_runs_twice():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Attention()

        def forward(self, tokens):
            for _ in range(2):
                tokens = self.attention(tokens)
                torch._dynamo.graph_break()
            return tokens

    found = checked(Twice(), torch.randn(2, 11, 24))
    assert len({site.name for site in found.sites}) == len(found.sites) == 2


def test_a_kernel_that_inductor_makes_runs_by_itself(stack):
    """flex is other code until it is compiled: the inner compiler gets it alone, on the site's tensors."""
    model, tokens = stack
    seen = []

    def inner(graph_module, example_inputs):
        ops = [node for node in graph_module.graph.nodes if "flex" in str(node.target)]
        seen.append((len(ops), len(example_inputs)))
        return graph_module.forward

    with torch.no_grad():
        found = check(model, tokens, backend=with_backend("flex", inner=inner))
    assert [site.kernel for site in found.sites] == ["flex"] * 3
    assert all(site.accuracy.relative_error < 1e-6 for site in found.sites)
    alone = [each for each in seen if each[0] == 1]
    assert len(alone) == 3  # once a site; the whole model has three in one graph
    assert {each[0] for each in seen} == {1, 3}


def test_the_run_goes_on_with_native_there(stack):
    """Uncompiled, such a kernel may keep all scores in memory, or compute something else."""
    nan = kernel(lambda output: output * math.nan, compiled=True)
    found = checked(*stack, choices=(nan,))
    assert [site.accuracy.nan for site in found.sites] == [528] * 3
    assert [site.bad_inputs for site in found.sites] == [{}] * 3


def test_attention_that_is_spelled_out_with_another_order_of_axes():
    """What it gives is (batch, q_len, heads, dim): not SDPA's form."""

    def spelled_out(query, key, value):
        weights = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1)
        return torch.einsum("bhqk,bhkd->bqhd", weights, value)

    (site,) = checked(spelled_out, *qkv()).sites
    assert (site.kernel, site.call.written_as) == ("_native_flash", "operations")
    assert site.accuracy.relative_error < 1e-6


def test_fused_layers_are_named():
    layer = torch.nn.MultiheadAttention(24, 3, batch_first=True).eval()  # it returns its weights too
    found = checked(layer, *[torch.randn(2, 7, 24)] * 3)
    assert found.sites == ()
    assert len(found.missing) == 1
    assert f"not looked at: {found.missing[0]}" in str(found)


def test_no_attention_at_all():
    found = checked(torch.nn.Linear(3, 4), torch.randn(2, 3))
    assert "no attention was found" in str(found)
    assert found.ok


# -- limits


@pytest.mark.parametrize(
    ("dtype", "limits", "limit"),
    [
        ("float64", {}, 1e-12),
        ("float32", {}, 1e-5),
        ("bfloat16", {}, 1.2e-2),
        (
            "float32",
            {"numerics": attnrewrite.Numerics.QUANTISED, "tolerance": attnrewrite.Tolerance(0.04, "int8")},
            0.04,
        ),
        (
            "float32",
            {"numerics": attnrewrite.Numerics.SPARSE, "tolerance": attnrewrite.Tolerance(0.03, "far keys by one term")},
            0.03,
        ),
    ],
)
def test_limits_by_the_class_of_numerics(dtype, limits, limit):
    tensors = qkv(dtype=getattr(torch, dtype))
    record = kernel(lambda output: output, dtypes=frozenset({dtype}), **limits)
    found = checked(F.scaled_dot_product_attention, *tensors, choices=(record,), numerics="sparse")
    word = f" ({record.numerics.word})" if limits else ""
    assert found.sites[0].kernel == f"changed{word}"
    assert f"changed{word}" in str(found)
    assert found.sites[0].limit == limit
    assert found.ok
    off = kernel(lambda output: output * (1 + 2 * limit), dtypes=frozenset({dtype}), **limits)
    wrong = checked(F.scaled_dot_product_attention, *tensors, choices=(off,), numerics="sparse")
    assert not wrong.ok


def test_a_cast_has_the_limit_of_what_it_is_cast_to(stack):
    record = kernel(lambda output: output, dtypes=frozenset({"bfloat16"}))
    found = checked(*stack, choices=(record,), cast="bfloat16")
    assert found.sites[0].limit == attnrewrite.Tolerance().error
    assert 1e-4 < found.sites[0].accuracy.relative_error < 1.2e-2
    assert found.ok


# -- what it leaves alone, and what it refuses


def test_strict_raises_at_the_end(stack):
    """With every refused site, and inside a context too."""
    model, tokens = stack
    with pytest.raises(attnrewrite.AttentionRefusedError, match="DEVICE: _native_cudnn runs on cuda"):
        checked(model, tokens, choices=("_native_cudnn",), strict=True)
    with (
        pytest.raises(attnrewrite.AttentionRefusedError, match="DEVICE"),
        attnrewrite.attention_backend("_native_cudnn", strict=True),
    ):
        checked(model, tokens, choices=("native",))
    assert checked(model, tokens, choices=("_native_cudnn",)).sites[0].kernel == "(unchanged)"


def test_progress(stack, capsys):
    with torch.no_grad():
        check(*stack, backend=with_backend("native", inner="eager"))
        assert capsys.readouterr().err.splitlines() == [
            "attnrewrite.check: 1/3: the unchanged model",
            "attnrewrite.check: 2/3: each attention beside float64",
            "attnrewrite.check: 3/3: the compiled model",
        ]
        check(*stack, backend=with_backend("native", inner="eager"), progress=False)
    assert capsys.readouterr().err == ""
    with pytest.raises(TypeError, match=r"progress is 0 \(int\): give True or False"):
        check(*stack, backend="native", progress=0)


def test_checks_do_not_raise(stack):
    model, tokens = stack
    found = checked(model, tokens * math.nan, checks=True)
    assert found.sites[0].bad_inputs


def test_the_model_and_random_numbers_stay_as_they_were():
    class Noisy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.calls = Attention(), 0

        def forward(self, tokens):
            self.calls += 1
            return self.attention(tokens + torch.rand_like(tokens))

    model = Noisy()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    found = checked(model, torch.randn(2, 11, 24, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.rand(4), expected)
    assert model.calls == 0
    assert found.output.relative_error < 1e-6  # all three runs drew the same noise


def test_a_compiled_model_is_checked_uncompiled(stack):
    model, tokens = stack
    ran = []

    def theirs(graph_module, example_inputs):
        ran.append(graph_module)
        return graph_module.forward

    assert len(checked(torch.compile(model, backend=theirs), tokens).sites) == 3
    assert ran == []


def test_parts_that_are_compiled_already_run_as_they_are():
    """A model whose blocks were set before: what it is compared with must not be swapped itself."""
    torch.manual_seed(0)
    model, tokens = Stack().eval(), torch.randn(2, 11, 24)
    backend = with_backend(kernel(lambda output: output * 1.01), inner="eager")
    with torch.no_grad():
        expected = check(model, tokens, backend=backend).output.relative_error
        for layer in model.layers:
            layer.compile(backend=backend)
        model(tokens)
        found = check(model, tokens, backend=backend)
    assert len(found.sites) == 3
    assert expected > 1e-3
    assert found.output.relative_error == pytest.approx(expected)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"model": 3, "backend": "native"}, TypeError, r"model is 3 \(int\): give a torch.nn.Module"),
        ({"backend": "flesh"}, ValueError, "no attention backend is called 'flesh'"),
        ({"backend": []}, ValueError, "choices is empty"),
        ({"backend": 3}, TypeError, "choices holds 3"),
        (
            {"backend": "native", "tokens": torch.zeros(2, 3, device="meta")},
            ValueError,
            r"tensor \(2, 3\) without values",
        ),
    ],
)
def test_bad_input(stack, given, error, said):
    model, tokens = stack
    with pytest.raises(error, match=said):
        check(given.get("model", model), given.get("tokens", tokens), backend=given["backend"])


def test_no_backend_is_named(stack):
    with pytest.raises(TypeError, match="backend"):
        check(*stack)


# -- as JSON, as a picture


def strict_json(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def broken(stack):
    return checked(*stack, rules={"layers.1": kernel(lambda output: output * math.nan)})


def test_json(broken):
    data = strict_json(broken.to_json())
    assert data["version"] == 1
    assert data["first_wrong"] == "layers.1"
    assert data["output"]["relative_error"] == "nan"
    assert [site["accuracy"]["nan"] for site in data["sites"]] == [0, 528, 528]
    assert data["sites"][0]["layouts"][:2] == [[[2, 3, 11, 8], [792, 8, 72, 1], at] for at in (0, 24)]


class Picture(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, tokens):
        return self.attention(tokens).unflatten(1, (3, 4)).movedim(-1, 1)  # (batch, 24, 3, 4)


def test_psnr_is_that_of_the_range_of_the_unchanged_model():
    torch.manual_seed(0)
    model, tokens = Picture(), torch.randn(2, 12, 24)
    found = checked(model, tokens, choices=(kernel(lambda output: output * 1.01),))
    with torch.no_grad():
        before = model(tokens)
    span, error = before.max() - before.min(), (0.01 * before).square().mean().sqrt()
    assert found.output.psnr_db == pytest.approx(20 * math.log10(span / error), abs=1e-2)
    assert f"PSNR {found.output.psnr_db:.1f} dB" in str(found)
    assert [tuple(each.shape) for each in found.output.pictures] == [(3, 4, 3)] * 2


def test_plots(broken, tmp_path):
    broken.plot(tmp_path / "check.png")
    assert (tmp_path / "check.png").read_bytes().startswith(b"\x89PNG")
    torch.manual_seed(0)
    checked(Picture(), torch.randn(2, 12, 24)).plot(tmp_path / "check.svg")
    text = (tmp_path / "check.svg").read_text()
    assert text.count("<image") >= 3  # before, after, difference
    assert sorted(path.name for path in tmp_path.iterdir()) == ["check.png", "check.svg"]


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("check.txt", ValueError, "'.txt': a picture is one of .png, .svg, .pdf"),
        ("gone/check.png", FileNotFoundError, "gone is no folder"),
    ],
)
def test_pictures_that_cannot_be_made(broken, tmp_path, name, error, said):
    with pytest.raises(error, match=said):
        broken.plot(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib(broken, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'attnrewrite\[plot\]'"):
        broken.plot(tmp_path / "check.png")
    assert list(tmp_path.iterdir()) == []


# -- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["_native_flash", "_native_cudnn", "flex", "_flash_3", "flash", "sage"])
def test_kernels_of_a_gpu_keep_their_promise(name):
    tensors = [each.to("cuda", torch.bfloat16) for each in qkv(q_len=300, kv_len=270, dim=64)]
    with torch.no_grad():
        found = check(F.scaled_dot_product_attention, *tensors, backend=with_backend(name, numerics="quantised"))
    (site,) = found.sites
    if site.kernel != name:
        pytest.skip(str(site.site.refusals[0][1]))
    assert found.ok, str(found)
    assert 1e-4 < site.accuracy.relative_error < site.limit
    assert found.output.relative_error < 2 * site.limit


@pytest.mark.gpu
def test_float16_that_overflows():
    """The usual black image: scores are fine, the values are not."""
    query, key, value = (each.to("cuda", torch.float16) for each in qkv(dim=64))
    with torch.no_grad():
        found = check(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v * 1e5), query, key, value, backend="native"
        )
    assert found.first_wrong.bad_inputs.keys() == {"value"}
    assert found.output.bad == found.output.bad_before > 0
