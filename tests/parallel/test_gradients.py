"""Gradients of shared graphs: those of all inputs and parameters are those of one process, on every rank."""

import pytest
import torch
import torch.nn.functional as F
from lockstep import Shared

from attnrewrite.parallel import plans

WIDTH, HEADS, TEXT = 24, 4, 10
sdpa = F.scaled_dot_product_attention


class Block(torch.nn.Module):
    """A block of a diffusion transformer: modulation by the timestep, self attention with a learned bias, cross attention to
    text, an MLP. Learned positions are added to its tokens."""

    def __init__(self, length, heads=HEADS):
        super().__init__()
        self.heads = heads
        self.norms = torch.nn.ModuleList([torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH), torch.nn.RMSNorm(WIDTH)])
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH)
        self.query = torch.nn.Linear(WIDTH, WIDTH)
        self.of_text = torch.nn.Linear(TEXT, 2 * WIDTH)
        self.out = torch.nn.ModuleList([torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2)])
        self.mlp = torch.nn.Sequential(torch.nn.Linear(WIDTH, 40), torch.nn.GELU(), torch.nn.Linear(40, WIDTH))
        self.modulation = torch.nn.Linear(5, 6 * WIDTH)
        self.positions = torch.nn.Parameter(torch.randn(1, length, WIDTH))
        self.bias = torch.nn.Parameter(torch.randn(heads, length, length))
        self.scale = torch.nn.Parameter(torch.randn(()))

    def split(self, tokens):
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, text, time, mask=None):
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(F.silu(time))[:, None].chunk(6, -1)
        x = x + self.positions
        query, key, value = map(self.split, self.qkv(self.norms[0](x) * (1 + scale) + shift).chunk(3, -1))
        bias = self.bias if mask is None else self.bias.masked_fill(~mask[:, None, None], -1e9)
        x = x + gate * self.out[0](sdpa(query, key, value, bias).transpose(1, 2).flatten(2))
        key, value = map(self.split, self.of_text(text).chunk(2, -1))
        query = self.split(self.query(self.norms[1](x)))
        x = x + self.out[1](sdpa(query, key, value).transpose(1, 2).flatten(2))
        return x + gate_mlp * self.mlp(self.norms[2](x) * (1 + scale_mlp) + shift_mlp) * self.scale


class Joint(torch.nn.Module):
    """Text and image tokens with weights of their own, joined for attention."""

    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.ModuleList([torch.nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2)])
        self.out = torch.nn.ModuleList([torch.nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        self.norm = torch.nn.RMSNorm(WIDTH // HEADS)
        self.modulation = torch.nn.Linear(5, 2 * WIDTH)

    def forward(self, text, image, time, mask=None):
        length = text.shape[1]
        scale, gate = self.modulation(time)[:, None].chunk(2, -1)
        both = [layer(each * (1 + scale)) for layer, each in zip(self.qkv, (text, image), strict=True)]
        query, key, value = (
            each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in torch.cat(both, 1).chunk(3, -1)
        )
        output = sdpa(self.norm(query), self.norm(key), value, mask).transpose(1, 2).flatten(2)
        text = text + self.out[0](output[:, :length])
        return text, image + gate * self.out[1](output[:, length:]) + text.mean(1, keepdim=True)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def gradients(model, call, inputs):
    """The gradients of all inputs and parameters, of a loss with another weight for each element of each output."""
    inputs = [each.detach().clone().requires_grad_() if each.is_floating_point() else each for each in inputs]
    model.zero_grad()
    results = call(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    sum((result * torch.linspace(-1, 1, result.numel()).double().view_as(result)).sum() for result in results).backward()
    found = {f"input {place}": each.grad for place, each in enumerate(inputs) if each.requires_grad}
    found |= {name: each.grad for name, each in model.named_parameters()}
    assert all(grad is not None and grad.norm() > 0 for grad in found.values())
    return found


def check(model, inputs, size, kind):
    model = model.double()
    backend = Shared(size, kind)
    expected = gradients(model, model, inputs)
    found = gradients(model, torch.compile(model, backend=backend, fullgraph=True, dynamic=False), inputs)
    for name, grad in expected.items():
        assert (found[name] - grad).norm() / grad.norm() < 1e-10, name
    (plan,) = backend.plans
    return plan, backend


KINDS = ("ulysses", "gather")


@pytest.mark.parametrize(("size", "length"), [(2, 12), (2, 13), (3, 13), (4, 9)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_block(size, length, kind, masked):
    torch.manual_seed(0)
    inputs = [randn(2, length, WIDTH), randn(2, 7, TEXT), randn(2, 5)]
    if masked:
        inputs.append(torch.arange(length) < torch.tensor([[length], [5]]))
    plan, backend = check(Block(length), inputs, size, kind)
    print(plan.lines(), backend.counts, backend.both_counts)
    assert plan.sites[0].exchange == (plans.KEYS_GATHERED if kind == "gather" or size == 3 else plans.ALL_TO_ALL)
    assert plan.sites[1].exchange == plans.KEYS_WHOLE
