"""Functions that stand in Dynamo's graph as one node: those of einops and einx are opened, a user's are named in the report."""

import pytest
import torch
import torch.nn.functional as F
from parity import compiled, relative
from torch.compiler import allow_in_graph

HEADS, DIM = 3, 8
MASK = torch.arange(9) < torch.tensor([5, 9])[:, None]  # (batch, keys); True: the key takes part


def of_library(function):
    """Makes a function look like one of einx, which calls `allow_in_graph` for its functions as einops does before 0.8.2."""
    function.__module__ = "einx.stand_in"
    return allow_in_graph(function)


@of_library
def split_heads(x, pattern, **sizes):
    """rearrange(x, "b n (c h d) -> c b h n d", c=3, h=h)"""
    return x.reshape(*x.shape[:2], sizes["c"], sizes["h"], -1).permute(2, 0, 3, 1, 4)


@of_library
def join_heads(x, pattern):
    """rearrange(x, "b h n d -> b n (h d)")"""
    return x.permute(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


@of_library
def einsum(*tensors_and_pattern):
    *tensors, pattern = tensors_and_pattern
    return torch.einsum(pattern, *tensors)


@of_library
def where(pattern, mask, scores, value):
    return torch.where(mask[:, None, None, :], scores, torch.asarray(value, device=scores.device).reshape(1, 1, 1, 1))


@of_library
def unchanged(x, pattern):
    return x


def of_libraries(x, heads=HEADS):
    query, key, value = split_heads(x, "b n (c h d) -> c b h n d", c=3, h=heads)
    scores = einsum(query, unchanged(key, "b h n d -> b h n d"), "bhid,bhjd->bhij") * DIM**-0.5
    scores = where("b j, b h i j, -> b h i j", MASK, scores, -1e9)
    return join_heads(einsum(scores.softmax(-1), value, "bhij,bhjd->bhid"), "b h n d -> b n (h d)")


def plain(x):
    query, key, value = x.view(2, 9, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(query, key, value, MASK[:, None, None]).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_functions_of_einops_and_einx_are_opened(inner):
    x = torch.randn(2, 9, 3 * HEADS * DIM, requires_grad=True)
    run, backend = compiled(of_libraries, "_native_math", inner)
    output = run(x)
    exact = x.detach().double().requires_grad_()
    reference = plain(exact)
    assert relative(output, reference) < 1e-5
    output.sin().sum().backward()
    reference.sin().sum().backward()
    assert relative(x.grad, exact.grad) < 1e-5
    (site,) = backend.report.sites
    assert (site.chosen, site.call.heads, site.call.written_as) == ("_native_math", HEADS, "operations")


def test_symbolic_sizes():
    run, backend = compiled(of_libraries, "_native_math", dynamic=True)
    with torch.no_grad():
        x = torch.randn(2, 9, 3 * HEADS * DIM)
        assert relative(run(x), plain(x.double())) < 1e-5
        wide = torch.randn(
            2, 9, 6 * HEADS * DIM
        )  # heads of twice the width: DIM is not their scale, and the mask stays
        assert relative(run(wide), of_libraries(wide.double())) < 1e-5
    assert {site.chosen for site in backend.report.sites} == {"_native_math"}


def test_autocast():
    x = torch.randn(2, 9, 3 * HEADS * DIM)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        run, backend = compiled(of_libraries, "_native_math", "aot_eager")
        output = run(x)
        assert output.dtype == of_libraries(x).dtype == torch.bfloat16
    assert relative(output, plain(x.double())) < 1.2e-2
    (site,) = backend.report.sites
    assert (site.chosen, site.call.dtype) == ("_native_math", "bfloat16")


def test_real_einops():
    einops = pytest.importorskip("einops")
    from einops import einsum, rearrange, repeat

    def attend(x):
        query, key, value = rearrange(x, "b n (c h d) -> c b h n d", c=3, h=HEADS)
        key, value = (repeat(each, "b h n d -> b h (r n) d", r=2) for each in (key, value))
        scores = einsum(query, key, "b h i d, b h j d -> b h i j") * DIM**-0.5
        scores = scores.masked_fill(~repeat(MASK, "b j -> b 1 1 (r j)", r=2), -1e9)
        return rearrange(einsum(scores.softmax(-1), value, "b h i j, b h j d -> b h i d"), "b h n d -> b n (h d)")

    x = torch.randn(2, 9, 3 * HEADS * DIM)
    with torch.no_grad():
        run, backend = compiled(attend, "_native_math")
        assert relative(run(x), plain(x.double())) < 1e-5  # keys twice are the same as keys once
    assert backend.report.swapped == 1, einops.__version__


# -- functions of a user: what they do is not known


@allow_in_graph
def change(x):
    return x * 2


@allow_in_graph
def change_in_place(x):
    return x.mul_(2)


@allow_in_graph
def multiply(query, key):
    return query @ key.mT


@allow_in_graph
def apply(weights, value):
    return weights @ value


@allow_in_graph
def attend(query, key, value):
    return F.scaled_dot_product_attention(query, key, value)


@allow_in_graph
def attend_twice(query, key, value):
    first = (query @ key.mT * DIM**-0.5).softmax(-1) @ value
    return F.scaled_dot_product_attention(first, key, value)


STAY = {
    "scores": (lambda q, k, v: change(q @ k.mT).softmax(-1) @ v, "scores are computed by the function change,"),
    "scores in place": (lambda q, k, v: change_in_place(q @ k.mT).softmax(-1) @ v, "computed by the function change_in_place"),
    "weights": (lambda q, k, v: change((q @ k.mT).softmax(-1)) @ v, "weights are computed by the function change,"),
    "all": (attend, "inside the function attend,"),
}  # fmt: skip
MISSED = {
    "first product": (lambda q, k, v: multiply(q, k).softmax(-1) @ v, "scores are computed by the function multiply,"),
    "last product": (lambda q, k, v: apply((q @ k.mT).softmax(-1), v), "weights are computed by the function apply,"),
}


def operands():
    return [torch.randn(2, HEADS, length, DIM) for length in (7, 9, 9)]


@pytest.mark.parametrize("name", STAY)
def test_an_attention_that_a_function_hides_stays(name):
    function, reason = STAY[name]
    tensors = operands()
    run, backend = compiled(lambda *given: function(*given), "_native_math")
    assert relative(run(*tensors), function(*(each.double() for each in tensors))) < 1e-5
    (site,) = backend.report.sites
    call = site.call
    assert (site.chosen, call.batch, call.heads, call.q_len, call.kv_len, call.head_dim) == (None, 2, HEADS, 7, 9, DIM)
    assert reason in site.refusals[0][1].detail
    assert "allow_in_graph" in site.refusals[0][1].detail
    assert backend.report.near_misses == []


@pytest.mark.parametrize("name", MISSED)
def test_a_product_that_a_function_hides_is_a_near_miss(name):
    function, reason = MISSED[name]
    tensors = operands()
    run, backend = compiled(lambda *given: function(*given), "_native_math")
    assert relative(run(*tensors), function(*(each.double() for each in tensors))) < 1e-5
    assert backend.report.sites == []
    (near,) = backend.report.near_misses
    assert reason in near.reason


def test_each_attention_of_a_function_is_named_at_each_call():
    def twice(query, key, value):
        return attend_twice(attend_twice(query, key, value), key, value)

    tensors = operands()
    run, backend = compiled(twice, "_native_math")
    assert relative(run(*tensors), twice(*(each.double() for each in tensors))) < 1e-5
    assert [(site.name, site.chosen) for site in backend.report.sites] == [
        ("twice", None), ("twice#2", None), ("twice#3", None), ("twice#4", None)
    ]  # fmt: skip


def test_a_swap_beside_a_function():
    """A function that reads the query does not keep the attention."""
    tensors = operands()
    run, backend = compiled(lambda q, k, v: F.scaled_dot_product_attention(change(q), k, v), "_native_math")
    exact = [each.double() for each in tensors]
    assert relative(run(*tensors), F.scaled_dot_product_attention(exact[0] * 2, *exact[1:])) < 1e-5
    assert backend.report.swapped == 1


@allow_in_graph
def gate(x):
    return x.softmax(-1) * x


def test_a_function_without_an_attention_is_not_named():
    run, backend = compiled(lambda x: gate(x @ x.mT) @ x, "_native_math")
    run(torch.randn(2, 9, DIM))
    assert (backend.report.sites, backend.report.near_misses) == ([], [])
