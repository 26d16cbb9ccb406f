"""Attention in tensor operations has all derivatives, and keeps them where the swapped graph runs under plain autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F
from parity import relative
from stand_ins import RECORDS, compiler
from torch.autograd import forward_ad

import attnrewrite
from attnrewrite.kernels.machines import satisfies

BATCH, HEADS, Q_LEN, KV_LEN, DIM = 2, 4, 5, 7, 8
KERNELS = ("native", "_native_flash", "_native_math")


def mask():
    keep = torch.rand(BATCH, 1, Q_LEN, KV_LEN, generator=torch.Generator().manual_seed(1)) > 0.4
    keep[..., 0], keep[0, :, 2] = True, False  # a row without a key
    return keep


def plain(q, k, v, keep, bias):
    return (q @ k.mT * 0.35).softmax(-1) @ v


def filled(q, k, v, keep, bias):
    return (q @ k.mT * 0.35).masked_fill(~keep, -1e9).softmax(-1) @ v


def biased(q, k, v, keep, bias):
    return (q @ k.mT * 0.35 + bias).softmax(-1) @ v


def causal(q, k, v, keep, bias):
    hidden = torch.ones(Q_LEN, KV_LEN, dtype=torch.bool).triu(1)
    return (q @ k.mT * 0.35).masked_fill(hidden, float("-inf")).softmax(-1) @ v


def lower_right(q, k, v, keep, bias):
    hidden = torch.ones(Q_LEN, KV_LEN, dtype=torch.bool).triu(1 + KV_LEN - Q_LEN)
    return (q @ k.mT * 0.35).masked_fill(hidden, float("-inf")).softmax(-1) @ v


def grouped(q, k, v, keep, bias):
    k, v = (each[:, ::2].repeat_interleave(2, dim=1) for each in (k, v))
    q, k, v = (each.flatten(0, 1) for each in (q, k, v))
    return torch.bmm(torch.bmm(q, k.mT).mul(0.35).softmax(-1), v).unflatten(0, (BATCH, HEADS))


def of_one_tensor(q, k, v, keep, bias):
    return (k @ k.mT * 0.35).softmax(-1) @ k


def written_into(q, k, v, keep, bias):
    output = (q @ k.mT * 0.35).softmax(-1) @ v
    output += 1.0
    return output.mul_(2.0)


FORMS = (plain, filled, biased, causal, lower_right, grouped, of_one_tensor, written_into)


def tensors(dtype=torch.float64):
    torch.manual_seed(0)
    shapes = ((BATCH, HEADS, Q_LEN, DIM), *[(BATCH, HEADS, KV_LEN, DIM)] * 2)
    tensors = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    return tensors, mask(), torch.randn(1, HEADS, Q_LEN, KV_LEN, dtype=torch.float64).to(dtype)


def twice(function, tensors, *more):
    """Gradients of the gradients' norm, and the gradients."""
    given = [each.clone().requires_grad_() for each in tensors]
    first = torch.autograd.grad(function(*given, *more).sin().sum(), given, create_graph=True, allow_unused=True)
    norm = sum(each.square().sum() for each in first if each is not None)
    return [*first, *torch.autograd.grad(norm, given, allow_unused=True)]


def forward(function, tensors, *more):
    """The derivative in one direction, by dual tensors, of a model with a parameter."""
    with forward_ad.dual_level():
        given = [forward_ad.make_dual(each.clone(), each.cos()) for each in tensors]
        return [forward_ad.unpack_dual(function(*given, *more)).tangent]


def with_parameter(form):
    parameter = torch.ones((), dtype=torch.float64, requires_grad=True)
    return lambda q, *rest: form(q * parameter, *rest)


@pytest.mark.parametrize("derivative", [twice, forward])
@pytest.mark.parametrize("form", FORMS)
def test_derivatives(form, derivative):
    given, keep, bias = tensors()
    more = (keep, bias)
    function = form if derivative is twice else with_parameter(form)
    exact = derivative(function, given, *more)
    backends = {name: attnrewrite.with_backend(name, inner="eager") for name in KERNELS}
    now = []

    def every(graph_module, example_inputs):
        runs = {name: each(copy.deepcopy(graph_module), example_inputs) for name, each in backends.items()}
        return lambda *inputs: runs[now[-1]](*inputs)

    run = torch.compile(function, backend=every, fullgraph=True, dynamic=False)
    if derivative is forward and satisfies(torch.__version__, ">=2.14"):
        with pytest.raises(torch._dynamo.exc.Unsupported, match="dual tensor"):  # Dynamo leaves it to eager code
            derivative(run, given, *more)
        return
    for name, backend in backends.items():
        now.append(name)
        found = derivative(run, given, *more)
        (site,) = backend.report.sites
        assert site.chosen == name or (form is lower_right and name == "native"), site.refusals
        for one, other in zip(found, exact, strict=True):
            assert (one is None) == (other is None)
            assert one is None or relative(one.detach(), other.detach()) < 1e-9, name


def test_a_learned_bias_too():
    given, keep, bias = tensors()
    for name in ("native", "_native_math"):
        torch.compiler.reset()
        backend = attnrewrite.with_backend(name, inner="eager")
        run = torch.compile(lambda q, k, v, bias: biased(q, k, v, keep, bias), backend=backend, fullgraph=True)
        found = twice(run, [*given, bias])
        exact = twice(lambda q, k, v, bias: biased(q, k, v, keep, bias), [*given, bias])
        assert backend.report.sites[0].chosen == name
        assert all(relative(one.detach(), other.detach()) < 1e-9 for one, other in zip(found, exact, strict=True))


def trainable():
    (record,) = (each for each in RECORDS if each.name == "flash" and each.backward)
    return record


def test_a_kernel_of_a_library(stand_ins):
    """Its own backward gives the first derivative, the model's operations the second."""
    given, keep, bias = tensors(torch.bfloat16)
    exact = twice(plain, [each.double() for each in given], keep, bias)
    backend = compiler(stand_ins(trainable()))
    found = twice(torch.compile(plain, backend=backend, fullgraph=True), given, keep, bias)
    assert backend.report.sites[0].chosen == "flash"
    for one, other in zip(found, exact, strict=True):
        assert relative(one.detach(), other.detach()) < 4e-2


def test_a_library_s_kernel_in_a_single_call_says_that_it_has_no_second_derivative(stand_ins):
    given, _, _ = tensors(torch.bfloat16)
    backend = compiler(stand_ins(trainable()))
    run = torch.compile(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), backend=backend, fullgraph=True)
    given = [each.requires_grad_() for each in given]
    first = torch.autograd.grad(run(*given).sum(), given, create_graph=True)  # nothing is wrong yet
    with pytest.raises(RuntimeError, match="flash has no second derivative"):
        torch.autograd.grad(sum(each.square().sum() for each in first), given)


@pytest.mark.parametrize("inner", ["aot_eager", "eager"])
def test_only_where_they_may_be_asked_for(inner):
    """A compiler that traces the backward gets a graph of operators; a call without a gradient one call."""
    given, keep, bias = tensors()
    names = []

    def seen(graph_module):
        names.append({getattr(node.target, "__name__", "") for node in graph_module.graph.nodes})

    backend = attnrewrite.with_backend("native", inner=inner)

    def watched(graph_module, example_inputs):
        run = backend(graph_module, example_inputs)
        seen(graph_module)
        return run

    run = torch.compile(plain, backend=watched, fullgraph=True, dynamic=False)
    with torch.no_grad():
        run(*given, keep, bias)
    run(*(each.requires_grad_() for each in given), keep, bias).sum().backward()
    assert [("differentiable" in each) for each in names] == [False, inner == "eager"]
