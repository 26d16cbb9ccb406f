"""Gradients of shared graphs: those of all inputs and parameters are those of one process, on every rank. The ranks run in
lock step; test_ranks.py has processes."""

import pytest
import torch
import torch.nn.functional as F
from lockstep import Shared
from trained import WIDTH, Block, Joint, gradients, randn, worst

from attnrewrite.parallel import plans, rewriting

TEXT = 10


def check(model, inputs, size, kind):
    model = model.double()
    backend = Shared(size, kind)
    expected = gradients(model, model, inputs)
    torch.compiler.reset()
    found = gradients(model, torch.compile(model, backend=backend, fullgraph=True, dynamic=False), inputs)
    error, name = worst(found, expected)
    assert error < 1e-10, name
    (plan,) = backend.plans
    assert plan.begins
    return plan, backend


@pytest.mark.parametrize(("size", "kind", "length"), [(2, "ulysses", 13), (3, "gather", 12)])
def test_a_block(size, kind, length):
    torch.manual_seed(0)
    inputs = [
        randn(2, length, WIDTH),
        randn(2, 7, TEXT),
        randn(2, 5),
        torch.arange(length) < torch.tensor([[length], [5]]),
    ]
    plan, backend = check(Block(length), inputs, size, kind)
    assert [site.exchange for site in plan.sites] == [
        plans.ALL_TO_ALL if kind == "ulysses" else plans.KEYS_GATHERED,
        plans.KEYS_WHOLE,
    ]
    assert plan.added == 16
    forward = {"all_to_all_single": 2, "all_gather_into_tensor": 1} if size == 2 else {"all_gather_into_tensor": 2}
    assert backend.counts == forward
    # Gathered: the gradients of tokens, positions, bias. Added up: of six parts of the modulation, of keys and values of text.
    backward = {"all_reduce": 8, "all_reduce_coalesced": 1}
    if size == 2:
        assert backend.backward_counts == {**backward, "all_to_all_single": 2, "all_gather_into_tensor": 3}
    else:
        assert backend.backward_counts == {**backward, "reduce_scatter_tensor": 1, "all_gather_into_tensor": 3}


@pytest.mark.parametrize(("size", "kind", "batch"), [(4, "ulysses", 1), (2, "auto", 2)])
def test_a_joint_block(size, kind, batch):
    torch.manual_seed(0)
    plan, _ = check(Joint(), [randn(batch, 7, WIDTH), randn(batch, 13, WIDTH), randn(batch, 5)], size, kind)
    assert plan.sites[0].exchange == (plans.BATCH if kind == "auto" else plans.ALL_TO_ALL)


class Layer(torch.nn.Module):
    """Attention, and what `more` does to its weights and tokens."""

    def __init__(self, more=lambda self, x: x):
        super().__init__()
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.more = more

    def forward(self, x):
        x = self.norm(x)
        query, key, value = (each.unflatten(-1, (4, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        return self.more(self, F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2) + x)


def without_gradient(layer, x):
    """What was gathered, and the weights that were used, where autograd is off, are used again where it is on."""
    with torch.no_grad():
        shift = layer.norm(x) + x.cumsum(1)
    return layer.norm(x) + x.cumsum(1) * shift + x.detach()


MORE = {
    "a region without a gradient": without_gradient,
    "weights on parts and on the whole": lambda layer, x: x * layer.norm.weight + layer.norm.weight.sum(),
    "a sum over tokens": lambda layer, x: x * x.mean(1, keepdim=True) + layer.norm(x.sum(1, keepdim=True)),
    "written in place": lambda layer, x: (x * 2).add_(layer.norm.bias).cumsum(1),
    "a product of all pairs": lambda layer, x: x @ (x.transpose(1, 2) @ x),
    "a loss": lambda layer, x: F.mse_loss(x, x.detach().roll(1, 1) * 2),
}


@pytest.mark.parametrize("name", MORE)
def test_what_uses_weights_and_tokens(name):
    torch.manual_seed(0)
    check(Layer(MORE[name]), [randn(1, 8, WIDTH)], 2, "ulysses")


def test_a_gradient_that_nothing_needs_is_none():
    """As the optimizer expects of a weight that has no part in the loss."""

    def first_only(layer, x):
        with torch.no_grad():
            unused = F.linear(x, layer.unused)
        return x + unused

    layer = Layer(first_only)
    layer.unused = torch.nn.Parameter(randn(WIDTH, WIDTH))
    layer, x = layer.double(), randn(1, 8, WIDTH)
    gradients(layer, torch.compile(layer, backend=Shared(2, "ulysses")), [x])
    assert layer.unused.grad is None or layer.unused.grad.norm() == 0


def test_no_gradient_no_op_for_it():
    layer, x, backend = Layer().double(), randn(1, 8, WIDTH), Shared(2, "ulysses")
    with torch.no_grad():
        torch.compile(layer, backend=backend)(x)
    (run,) = backend.runs
    assert not backend.backwards
    names = [str(node.target) for rank in run.ranks for node in rank.module.graph.nodes]
    assert not any("attnrewrite" in name for name in names)


@pytest.mark.parametrize("kind", ["ulysses", "ring"])
def test_autograd_that_is_turned_on_inside(kind):
    """Ranks take their parts of the input outside of that region: nothing led from the loss to the input."""
    weights = randn(3 * WIDTH, WIDTH)

    def loss(x):
        query, key, value = (each.unflatten(-1, (4, -1)).transpose(1, 2) for each in F.linear(x, weights).chunk(3, -1))
        return F.scaled_dot_product_attention(query, key, value).square().sum()

    def guided(x):
        with torch.enable_grad():
            return loss(x)

    x = randn(2, 12, WIDTH).requires_grad_()
    backend = Shared(2, kind)
    with torch.no_grad():
        result = torch.compile(guided, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(torch.autograd.grad(result, x), torch.autograd.grad(loss(x), x))
    (plan,) = backend.plans
    assert plan.refused.startswith(
        "it turns autograd on, which is off around it: compile what stands inside of torch.enable"
    )


def always_summed(part, shard, ranks, for_parts=False):
    return WHOLE(part, shard, ranks, for_parts=True)


ALL_USED, WHOLE = rewriting.all_used_for_parts, rewriting.whole
WRONG = {
    "one weight is not added up": ("all_used_for_parts", lambda each, ranks: [each[0], *ALL_USED(each[1:], ranks)]),
    "the weights are added up twice": (
        "all_used_for_parts",
        lambda each, ranks: ALL_USED(ALL_USED(each, ranks), ranks),
    ),
    "the loss counts on each rank": ("whole", always_summed),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_would_be_seen(name, monkeypatch):
    place, wrong = WRONG[name]
    monkeypatch.setattr(rewriting, place, wrong)
    with pytest.raises(AssertionError):
        check(Layer(), [randn(1, 8, WIDTH)], 2, "ulysses")
