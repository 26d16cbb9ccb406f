"""What lies in memory otherwise on a rank than in the whole graph: writes in place, views, and code behind the graph."""

import pytest
import torch
import torch.nn.functional as F
from lockstep import Shared

from attnrewrite.parallel import sharing
from attnrewrite.parallel.layouts import Ranks

WIDTH, HEADS = 24, 4


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def heads(tokens):
    weight = torch.linspace(-1, 1, WIDTH * WIDTH, dtype=torch.float64).sin().view(WIDTH, WIDTH)
    return F.linear(tokens, weight).unflatten(-1, (HEADS, -1)).transpose(1, 2)


def attend(tokens):
    query = heads(tokens)
    return F.scaled_dot_product_attention(query, query, query).transpose(1, 2).flatten(2)


@torch.library.custom_op("attnrewrite_tests::scale_", mutates_args={"tensor"})
def scale_(tensor: torch.Tensor, by: torch.Tensor) -> None:
    tensor.mul_(by)


@torch.library.custom_op("attnrewrite_tests::scaled_sum", mutates_args={"tensor"})
def scaled_sum(tensor: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    tensor.mul_(by)
    return tensor.sum()


@scaled_sum.register_fake
def _(tensor, by):
    return tensor.new_empty(())


def custom_operator(x):
    y = F.gelu(x + attend(x))
    torch.ops.attnrewrite_tests.scale_(y, x)
    return attend(y)


def custom_operator_with_a_result(x):
    y = F.gelu(x + attend(x))
    return torch.ops.attnrewrite_tests.scaled_sum(y, x) + attend(y)


def list_of_tensors(x):
    y = F.gelu(x + attend(x))
    torch._foreach_mul_([y], [x])
    return attend(y)


@pytest.mark.parametrize("model", [custom_operator, custom_operator_with_a_result, list_of_tensors])
@pytest.mark.parametrize("kind", ["auto", "ulysses", "ring"])
def test_a_write_of_an_operator_without_a_rule_is_not_lost(model, kind):
    x = randn(1, 8, WIDTH)
    backend = Shared(2, kind)
    torch.testing.assert_close(compiled(model, backend)(x), model(x))
    (plan,) = backend.plans
    assert "writes into a tensor of which each rank has a part, and needs it whole" in plan.refused


def test_a_part_of_a_whole_tensor_is_taken_anew_behind_a_write():
    def model(x):
        positions = torch.linspace(0, 1, 7, dtype=torch.float64).view(7, 1) * torch.ones(1, WIDTH, dtype=torch.float64)
        y = attend(x) * positions
        torch.ops.attnrewrite_tests.scale_(positions, positions)
        return y + attend(x) * positions

    x = randn(1, 7, WIDTH)  # a part with a copy of the last token is no view
    backend = Shared(2, "ulysses")
    torch.testing.assert_close(compiled(model, backend)(x), model(x))
    assert not backend.plans[0].refused


def compiled(model, backend, **options):
    run = torch.compile(model, backend=backend, **{"dynamic": False, **options})
    return torch.no_grad()(run)


def copy_of_a_residual(x):
    h = x.contiguous()
    h += 1.5
    return attend(h) + x


def copy_of_swapped_dimensions(x):
    t = x * 2
    h = t.transpose(0, 1).contiguous()
    h *= 2
    return attend(h) + t.transpose(0, 1)


def copy_of_an_attention(x):
    output = F.scaled_dot_product_attention(heads(x), heads(x), heads(x))
    h = output.contiguous()
    h *= 2
    return h + output


def copy_of_a_query(x):
    query = heads(x)
    turned = query.contiguous()
    turned[..., 0::2] *= -1
    return F.scaled_dot_product_attention(turned, query, query)


def flattened_and_written(x):
    y = attend(x)
    y *= 2
    return x + y


def flattened_copy_and_written(x):
    y = (heads(x).contiguous() * 2).transpose(1, 2).flatten(2)
    y *= 2
    return attend(x) + y


def strided(x):
    y = x + attend(x)
    return y.as_strided((2, 3, 4, WIDTH), (8 * WIDTH, 2 * WIDTH, WIDTH, 1))


def viewed(x):
    y = x + attend(x)
    return (y.view(-1, WIDTH) * 2).view(x.shape)


def other_dtype(x):
    return attend(x).view(torch.int64)


def keys_of_the_first_frame(x):
    query, key = (z.unflatten(-1, (HEADS, -1)).transpose(-2, -3) * 2 for z in (x, x[:, :1]))
    return F.scaled_dot_product_attention(query, key, key)


MODELS = {
    copy_of_a_residual: lambda: randn(2, WIDTH, 7).transpose(1, 2),
    copy_of_swapped_dimensions: lambda: randn(8, 2, WIDTH),
    copy_of_an_attention: lambda: randn(2, 8, WIDTH),
    copy_of_a_query: lambda: randn(1, 2, WIDTH),
    flattened_and_written: lambda: randn(2, 8, WIDTH),
    flattened_copy_and_written: lambda: randn(2, 8, WIDTH),
    strided: lambda: randn(2, 8, WIDTH),
    viewed: lambda: randn(2, 8, WIDTH),
    other_dtype: lambda: randn(2, 8, WIDTH),
    keys_of_the_first_frame: lambda: randn(2, 3, 8, WIDTH),
}


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
@pytest.mark.parametrize(("ranks", "kind"), [(2, "auto"), (2, "ulysses"), (2, "gather"), (4, "ulysses"), (3, "ring")])
def test_a_rank_computes_what_the_model_does(model, ranks, kind):
    x = MODELS[model]()
    backend = Shared(ranks, kind)
    found, wanted = compiled(model, backend)(x), model(x)
    torch.testing.assert_close(found.view(torch.float64), wanted.view(torch.float64))
    two_tokens = model is copy_of_a_query
    assert bool(backend.plans[0].refused) == (two_tokens and ranks > 2)
    assert strides(found) == strides(wanted), "code behind the graph may ask for a view"


def strides(tensor):
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def test_a_split_by_symbolic_lengths():
    def joint(x, text):
        both = attend(torch.cat([text, x], 1))
        return both.split([text.shape[1], x.shape[1]], 1)[1]

    x, text = randn(2, 8, WIDTH), randn(2, 4, WIDTH)
    for kind in ("ulysses", "gather", "ring"):
        torch.compiler.reset()
        backend = Shared(2, kind)
        torch.testing.assert_close(compiled(joint, backend, dynamic=True)(x, text), joint(x, text))
        assert not backend.plans[0].refused


def test_a_graph_that_no_rank_can_write_runs_whole(monkeypatch):
    """An operator may refuse what a rank has of a tensor, which nobody foresaw."""

    def raising(*_):
        raise RuntimeError("view size is not compatible\nand more")

    monkeypatch.setattr(sharing, "part_of_graph", raising)
    plans = []

    def backend(module, inputs):
        plans.append(sharing.share(module, Ranks(2, 0, "group")))
        return module.forward

    x = randn(1, 8, WIDTH)
    torch.testing.assert_close(compiled(viewed, backend)(x), viewed(x))
    (plan,) = plans
    assert plan.refused == "what a rank has of it cannot be computed (RuntimeError: view size is not compatible)"
