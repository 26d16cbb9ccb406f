"""Gradients of attention that is written in tensor operations, whatever hides its keys, also of rows that have no key left.

A fill passes no gradient to the score that it replaces, a bias does. A row that is hidden as a whole by a number has weights in
eager mode, and so gradients: those that a kernel cannot give are refused.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from parity import relative
from stand_ins import RECORDS, compiler
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnrewrite
from attnrewrite import Code

BATCH, HEADS, Q_LEN, KV_LEN, DIM = 2, 4, 5, 7, 8
LOWEST = torch.finfo(torch.float64).min / 4
KERNELS = ("_native_math", "native", "_native_flash")


def by_rows():
    """A mask (batch, 1, q_len, kv_len) with rows that see no key, one key, and all keys."""
    keep = torch.rand(BATCH, 1, Q_LEN, KV_LEN) > 0.4
    keep[:, :, 0], keep[0, :, 2:4], keep[1, :, 4, 1:] = True, False, False
    return keep


def by_keys():
    """Key padding, with no key left in the last batch element."""
    keep = torch.rand(BATCH, 1, 1, KV_LEN) > 0.4
    keep[0, ..., 0], keep[-1] = True, False
    return keep


def causal():
    return torch.ones(Q_LEN, KV_LEN, dtype=torch.bool).tril()


# Each: (scores, keep, bias, number) -> masked scores.
FILLS = {
    "masked_fill": lambda s, keep, bias, number: s.masked_fill(~keep, number),
    "masked_fill_": lambda s, keep, bias, number: s.masked_fill_(~keep, number),
    "where": lambda s, keep, bias, number: torch.where(keep, s, torch.tensor(number, dtype=s.dtype)),
    "where, inverted": lambda s, keep, bias, number: torch.where(~keep, torch.full_like(s, number), s),
    "two fills": lambda s, keep, bias, number: s.masked_fill(~keep, number).masked_fill(~causal(), number),
    "one by -inf": lambda s, keep, bias, number: s.masked_fill(~keep, number).masked_fill(~causal(), -math.inf),
    "a bias before": lambda s, keep, bias, number: (s + bias).masked_fill(~keep, number),
    "a bias behind": lambda s, keep, bias, number: s.masked_fill(~keep, number) + bias,
    "between biases": lambda s, keep, bias, number: (s + bias).masked_fill(~keep, number) - 2 * bias,
    "scaled behind": lambda s, keep, bias, number: s.masked_fill(~keep, number * 2) * 0.5,
    "another number": lambda s, keep, bias, number: s.masked_fill(~keep, number).masked_fill(~causal(), -2e4),
    "over the other number": lambda s, keep, bias, number: s.masked_fill(~causal(), -2e4).masked_fill(~keep, number),
}
ADDED = {
    "where": lambda s, keep, bias, number: s + torch.where(keep, torch.zeros((), dtype=s.dtype), number),
    "masked_fill": lambda s, keep, bias, number: s + torch.zeros_like(keep, dtype=s.dtype).masked_fill(~keep, number),
    "times": lambda s, keep, bias, number: s + (1 - keep.to(s.dtype)) * number,
    "and scaled": lambda s, keep, bias, number: (s + (1 - keep.to(s.dtype)) * number) * 0.5,
    "and causal": lambda s, keep, bias, number: s + torch.where(keep & causal(), s.new_zeros(()), number),
    "causal before": lambda s, keep, bias, number: (
        s.masked_fill(~causal(), -math.inf) + (1 - keep.to(s.dtype)) * number
    ),
}


def written_out(masked, number):
    """All spellings, each with both masks, as one function of (query, key, value, bias, masks)."""

    def step(q, k, v, bias, masks):
        return [each(q @ k.mT * 0.3, keep, bias, number).softmax(-1) @ v for each in masked.values() for keep in masks]

    return step


def tensors(dtype=torch.float64):
    torch.manual_seed(0)
    shapes = ((BATCH, HEADS, Q_LEN, DIM), *[(BATCH, HEADS, KV_LEN, DIM)] * 2, (1, HEADS, Q_LEN, KV_LEN))
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def gradients(outputs, given):
    """For each output, the output and its gradients."""
    found = []
    for output in outputs:
        weights = torch.arange(output.numel(), dtype=torch.float64).cos().view(output.shape)
        of = torch.autograd.grad((output.double() * weights).sum(), given, retain_graph=True, allow_unused=True)
        found.append([output.detach(), *of])
    return found


def each_kernel(function, kernels, given, *more, inner="eager"):
    """(kernel, sites, outputs with gradients), of one trace for all kernels; first those of eager mode in float64."""
    exact = [each.detach().double().requires_grad_(each.requires_grad) for each in given]
    learned = [each for each in exact if each.requires_grad]
    yield None, None, gradients(function(*exact, *more), learned)
    backends = {name: attnrewrite.with_backend(name, inner=inner) for name in kernels}
    now = []

    def backend(graph_module, example_inputs):
        runs = {name: each(copy.deepcopy(graph_module), example_inputs) for name, each in backends.items()}
        return lambda *inputs: runs[now[-1]](*inputs)

    run = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)
    for name, each in backends.items():
        now.append(name)
        found = gradients(run(*given, *more), [each for each in given if each.requires_grad])
        yield name, each.report.sites, found


def agree(found, exact, tolerance):
    for one, other in zip(found, exact, strict=True):
        assert (one is None) == (other is None)
        assert one is None or relative(one, other) < tolerance


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("number", [LOWEST, -1e9, -1e4])
def test_fills(number, learned):
    """All kernels are right, and none is refused, but those that give a learned bias no gradient."""
    given = tensors()
    for each in given[: 3 + learned]:
        each.requires_grad_()
    results = each_kernel(written_out(FILLS, number), KERNELS, given, (by_rows(), by_keys()))
    _, _, exact = next(results)
    names = [f"{name}, {mask}" for name in FILLS for mask in ("rows", "keys")]
    for kernel, sites, found in results:
        for name, site, one, other in zip(names, sites, found, exact, strict=True):
            assert site.call.needs_grad
            agree(one, other, 1e-6 if number == -1e9 else 1e-9)  # float64 itself rounds a score beside -1e9
            no_gradient = kernel == "_native_flash" and site.call.mask.needs_grad
            assert site.chosen == (None if no_gradient else kernel), (name, site.refusals)


@pytest.mark.parametrize("number", [LOWEST, -1e9, -1e4])
def test_numbers_that_are_added(number):
    """A row that is hidden as a whole: -1e9 shifts its scores, and beside the lowest number they vanish, but have gradients."""
    given = tensors()
    for each in given[:3]:
        each.requires_grad_()
    results = each_kernel(written_out(ADDED, number), KERNELS, given, (by_rows(), by_keys()))
    _, _, exact = next(results)
    names = [name for name in ADDED for _ in range(2)]
    for kernel, sites, found in results:
        for name, site, one, other in zip(names, sites, found, exact, strict=True):
            agree(one, other, 1e-6 if number == -1e9 else 1e-9)
            if kernel != "_native_math" and (number == LOWEST or name == "causal before"):
                assert site.chosen is None
                assert [refused.code for _, refused in site.refusals] == [Code.GRAD]
                assert "_native_math" in site.refusals[0][1].fix
            else:
                assert site.chosen == kernel, (name, site.refusals)


def folded(q, k, v, bias, masks):
    """Heads in the batch, keys of two heads shared, products by baddbmm and bmm."""
    keep = masks[0].expand(-1, HEADS, -1, -1).flatten(0, 1)
    k, v = (each[:, ::2].repeat_interleave(2, dim=1) for each in (k, v))
    q, k, v = (each.flatten(0, 1) for each in (q, k, v))
    weights = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.mT, beta=0, alpha=0.3).masked_fill(~keep, -1e6).softmax(-1)
    return [torch.bmm(weights, v).unflatten(0, (BATCH, HEADS))]


def multiplied(q, k, v, bias, masks):
    """Scores of hidden keys become 0 before they get their number, as in GPT-2's first code."""
    there = masks[1].to(q.dtype)
    return [((q @ k.mT * 0.3) * there - 1e4 * (1 - there)).softmax(-1) @ v]


def stable(q, k, v, bias, masks):
    scores = (q @ k.mT * 0.3).masked_fill(~masks[0], -3e38)
    return [(scores - scores.amax(-1, keepdim=True).detach()).softmax(-1) @ v]


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("function", [folded, multiplied, stable])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_other_ways_to_write_it(function, dtype, inner):
    given = tensors(dtype)
    for each in given[:3]:
        each.requires_grad_()
    results = each_kernel(function, KERNELS, given, (by_rows(), by_keys()), inner=inner)
    _, _, (exact,) = next(results)
    for kernel, (site,), (found,) in results:
        agree(found, exact, 1e-9 if dtype == torch.float64 else 1e-5)
        assert site.chosen == kernel, site.refusals


@pytest.mark.parametrize("number", [LOWEST, -1e9, -1e4])
def test_numbers_of_a_single_call(number):
    """SDPA with an additive mask, beside PyTorch's own products and softmax in float64. `native` leaves the call to PyTorch."""

    def step(q, k, v, bias, masks):
        return [F.scaled_dot_product_attention(q, k, v, (1 - keep.to(q.dtype)) * number) for keep in masks]

    given = tensors()
    for each in given[:3]:
        each.requires_grad_()
    results = each_kernel(step, ("_native_math", "native", "_native_flash"), given, (by_rows(), by_keys()))
    with sdpa_kernel(SDPBackend.MATH):
        _, _, exact = next(results)
    for kernel, sites, found in results:
        assert [site.chosen for site in sites] == [
            None if kernel == "_native_flash" and number == LOWEST else kernel
        ] * 2
        for one, other in zip(found, exact, strict=True):
            if sites[0].chosen not in (None, "native"):
                agree(one, other, 1e-6 if number == -1e9 else 1e-9)


def test_packed_keys_of_fills(stand_ins):
    """The mean of all values for a batch element without a key, as a fill has it, so kernels for packed keys train."""
    (record,) = (each for each in RECORDS if each.name == "flash_varlen")

    def step(q, k, v, keep):
        return (q @ k.mT * 0.3).masked_fill(~keep, -1e9).softmax(-1) @ v

    given = [each.requires_grad_() for each in tensors(torch.bfloat16)[:3]]
    exact = [each.detach().double().requires_grad_() for each in given]
    backend, keep = compiler(stand_ins(record)), by_keys()
    run = torch.compile(step, backend=backend, fullgraph=True)
    (found,), (wanted,) = gradients([run(*given, keep)], given), gradients([step(*exact, keep)], exact)
    assert [site.chosen for site in backend.report.sites] == ["flash_varlen"]
    agree(found, wanted, 2e-2)


def test_inference_has_no_more_operations():
    graphs = []

    def inner(graph_module, example_inputs):
        graphs.append(str(graph_module.graph))
        return graph_module.forward

    step, given, masks = written_out({"fill": FILLS["masked_fill"]}, -1e9), tensors(), (by_rows(),)
    backend = attnrewrite.with_backend("_native_math", inner=inner)
    with torch.no_grad():
        (output,) = torch.compile(step, backend=backend, fullgraph=True)(*given, masks)
        assert relative(output, step(*given, masks)[0]) < 1e-6
    assert str(backend.report.sites[0].call.mask) == "additive (2, 1, 5, 7)"
    assert "any" not in graphs[0]


@pytest.mark.parametrize("number", [-1e9, -1e4])
def test_rows_of_nothing_but_several_fills(number):
    """Without gradients: the weights of such a row are those of its highest fills, and of biases that were added to them."""
    results = written_out(FILLS, number)
    given, masks = tensors(), (by_rows(), by_keys())
    for kernel in KERNELS:
        torch.compiler.reset()
        backend = attnrewrite.with_backend(kernel, inner="eager")
        with torch.no_grad():
            found = torch.compile(results, backend=backend, fullgraph=True)(*given, masks)
        assert {site.chosen for site in backend.report.sites} == {kernel}
        for one, other in zip(found, results(*given, masks), strict=True):
            assert relative(one, other) < (1e-6 if number == -1e9 else 1e-9)
