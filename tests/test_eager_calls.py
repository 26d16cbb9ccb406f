"""Attention outside of every graph: counted, and named with its graph break. A kernel context is no break."""

import cProfile
import os
import sys
import warnings
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from parity import compiled, qkv, relative
from torch.nn.functional import scaled_dot_product_attention as attend

import attnrewrite
from attnrewrite.graphs.eager_calls import EagerCalls

HERE = __file__


@torch.compiler.disable
def hidden(query, key, value):
    return F.scaled_dot_product_attention(query, key, value)


def by_a_disabled_function(query, key, value):
    first = hidden(query * 2, key, value)
    return hidden(first * 2, key, value) + 1


def by_a_context(query, key, value):
    query = query * 2
    with open(os.devnull):  # Dynamo gives up the function
        query = attend(query, key, value)
    return query + 1


def in_a_graph(query, key, value):
    first = attend(query, key, value)
    torch._dynamo.graph_break()
    return attend(first, key, value)


class Model(torch.nn.Module):
    """Both of them in one module, and an attention in a graph."""

    def forward(self, query, key, value):
        return by_a_disabled_function(attend(query, key, value), key, value)


def explained(function):
    with torch.no_grad():
        return attnrewrite.explain(function, *qkv(), backend="_native_math")


def line_of(text):
    with open(HERE, encoding="utf-8") as file:
        return next(number for number, line in enumerate(file, 1) if line.strip().startswith(text))


def test_explain_names_each_call_with_its_graph_break():
    report = explained(by_a_disabled_function)
    assert report.sites == []
    (call,) = report.eager_calls
    assert (call.name, call.file, call.function, call.calls) == ("scaled_dot_product_attention", HERE, "hidden", 2)
    assert call.line == line_of("return F.scaled_dot_product_attention(query, key, value)")
    assert call.reason.startswith("graph break at line ")
    assert "disable" in call.reason
    text = " ".join(str(report).split())
    assert f"in no graph: 2 calls of scaled_dot_product_attention at {HERE}:{call.line} in hidden" in text


def test_a_function_that_dynamo_gives_up():
    report = explained(by_a_context)
    assert report.sites == []
    (call,) = report.eager_calls
    assert (call.line, call.function, call.calls) == (line_of("query = attend(query, key, value)"), "by_a_context", 1)
    assert call.reason.startswith(f"graph break at line {line_of('with open(os.devnull)')}: ")


class MismatchedMasks(torch.nn.Module):
    """PyTorch warns about these masks, and Dynamo gives up a function in which PyTorch warns."""

    def __init__(self):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(24, 3, batch_first=True)

    def forward(self, x, padding, bias):
        return self.attention(x, x, x, key_padding_mask=padding, attn_mask=bias, need_weights=False)[0]


@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
def test_a_break_inside_of_pytorch():
    x, padding = torch.randn(2, 7, 24), torch.zeros(2, 7, dtype=torch.bool)
    with torch.no_grad():
        report = attnrewrite.explain(MismatchedMasks(), x, padding, torch.randn(7, 7), backend="_native_math")
    (call,) = report.eager_calls
    assert call.reason.startswith(f"graph break at line {line_of('return self.attention(x, x, x')}: Dynamo ")
    assert "_canonical_mask at torch/nn/functional.py:" in call.reason
    with torch.no_grad():
        float_masks = x.new_zeros(2, 7).masked_fill(padding, -torch.inf), torch.randn(7, 7)
        report = attnrewrite.explain(MismatchedMasks(), x, *float_masks, backend="_native_math")
    assert [site.chosen for site in report.sites] == ["_native_math"]


def test_attention_in_graphs_is_not_counted():
    report = explained(in_a_graph)
    assert len(report.sites) == 2
    assert report.eager_calls == []
    run, backend = torch.compile(in_a_graph, backend=(by := attnrewrite.with_backend("native", inner="eager"))), by
    run(*qkv())  # the graphs run as Python code, with calls of SDPA
    assert backend.report.eager_calls == []


def test_check_and_json():
    with torch.no_grad():
        found = attnrewrite.check(Model(), *qkv(), backend="_native_math")
    (call,) = found.eager_calls
    assert (call.calls, call.function) == (2, "hidden")
    assert len(found.sites) == 1
    assert "in no graph: 2 calls of scaled_dot_product_attention" in str(found)
    assert '"function": "hidden"' in found.to_json()
    report = explained(Model())
    again = attnrewrite.Report.from_json(report.to_json())
    assert again.eager_calls == report.eager_calls != []
    assert str(again) == str(report)
    old = {name: value for name, value in report.to_dict().items() if name != "eager_calls"}
    assert attnrewrite.Report.from_dict(old).eager_calls == []


LIBRARY = """
def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    return flash_attn_varlen_func(q, k, v)

def flash_attn_varlen_func(q, k, v):
    return (q @ k.mT).softmax(-1) @ v
"""


@pytest.mark.parametrize(("module", "calls"), [("flash_attn.flash_attn_interface", [2]), ("somebody.elses", [])])
def test_functions_of_libraries_are_counted_too(module, calls):
    library = {"__name__": module}
    exec(LIBRARY, library)  # its functions know their module by this name
    attention = torch.compiler.disable(library["flash_attn_func"])

    def function(query, key, value):
        return attention(attention(query * 2, key, value), key, value)

    report = explained(function)
    assert [call.calls for call in report.eager_calls] == calls
    for call in report.eager_calls:
        assert (call.name, call.file, call.function) == ("flash_attn's flash_attn_func", HERE, "function")
        assert "disable" in call.reason


def test_strict_says_where_the_attention_is():
    with torch.no_grad(), pytest.raises(attnrewrite.AttentionRefusedError, match=r"no graph: 2 calls .* in hidden"):
        attnrewrite.explain(
            by_a_disabled_function, *qkv(), backend=attnrewrite.with_backend("_native_math", strict=True)
        )


def test_a_compiled_model_warns_once():
    backend = attnrewrite.with_backend("_native_math", inner="eager")
    run = torch.compile(Model(), backend=backend)
    tensors = qkv()
    with pytest.warns(
        UserWarning, match=r"attention in no graph.*2 calls of scaled_dot_product_attention .* in hidden"
    ) as told:
        output = run(*tensors)
    assert len(told) == 1
    assert sys.getprofile() is None
    exact = [each.double() for each in tensors]
    assert relative(output, Model()(*exact)) < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(*tensors)
        run(*(each[:, :2] for each in tensors))  # compiled again
    assert [(call.function, call.calls) for call in backend.report.eager_calls] == [("hidden", 2)]
    assert backend.report.swapped > 0


def test_a_model_in_one_graph_is_not_watched(monkeypatch):
    monkeypatch.setattr(sys, "setprofile", lambda hook: pytest.fail("the profile hook was set"))
    run, backend = compiled(attend, "_native_math")
    run(*qkv())
    assert backend.report.swapped == 1


def test_the_hook_goes_where_the_model_fails():
    @torch.compiler.disable
    def fail(x):
        raise KeyError("the model's own")

    def model(query, key, value):
        return fail(hidden(query * 2, key, value))

    run = torch.compile(model, backend=attnrewrite.with_backend("_native_math", inner="eager"))
    with pytest.raises(KeyError, match="the model's own"), pytest.warns(UserWarning, match="in no graph"):
        run(*qkv())
    assert sys.getprofile() is None


def test_another_profiler_keeps_the_hook():
    run = torch.compile(by_a_disabled_function, backend=attnrewrite.with_backend("_native_math", inner="eager"))
    profiler = cProfile.Profile()
    profiler.enable()
    try:
        run(*qkv())
        assert sys.getprofile() is profiler
    finally:
        profiler.disable()


# -- a kernel context is no break

Config = namedtuple("Config", ["enable_flash", "enable_math", "enable_mem_efficient"])


class InAContext(torch.nn.Module):
    """As lucidrains' packages and stable-audio-tools write it."""

    config = Config(False, True, False)

    def forward(self, query, key, value):
        with torch.backends.cuda.sdp_kernel(**self.config._asdict()):
            output = F.scaled_dot_product_attention(query, key, value)
        return output * 2


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.filterwarnings("ignore:.*sdp_kernel.*:FutureWarning")
def test_the_older_kernel_context_is_traced(again):
    if again:  # what init_process_group does
        torch._dynamo.trace_rules.clear_lru_cache()
    tensors = qkv()
    run, backend = compiled(InAContext(), "_native_flash")  # fullgraph=True
    exact = InAContext()(*(each.double() for each in tensors))
    assert relative(run(*tensors), exact) < 1e-5
    (site,) = backend.report.sites
    assert site.chosen == "_native_flash"
    assert backend.report.eager_calls == []


@pytest.mark.filterwarnings("ignore:.*sdp_kernel.*:FutureWarning")
def test_native_keeps_the_kernel_context():
    graphs = []

    def inner(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module

    tensors = qkv()
    run, _ = compiled(InAContext(), attnrewrite.with_backend("native", inner=inner))
    assert relative(run(*tensors), InAContext()(*(each.double() for each in tensors))) < 1e-5
    targets = [node.target for node in graphs[0].graph.nodes]
    place = targets.index(torch._C._nn.scaled_dot_product_attention)
    assert torch.nn.attention._sdpa_kernel in targets[:place]
    assert torch.nn.attention._sdpa_kernel in targets[place:]


def test_counting_ends_with_a_call_that_returns_while_dynamo_compiles():
    """torch.compiler.reset() inside a compilation drops the callback that tells of its end."""

    def watched():
        calls = EagerCalls(sys._getframe(), compiling=True)
        calls.start()
        return calls

    calls = watched()
    torch.compiler.reset()
    with calls.held():  # the next compilation
        pass
    attend(*qkv())
    assert sys.getprofile() is None
    assert calls.found == []
