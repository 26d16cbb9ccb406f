"""What the tests of gradients train: small blocks, and a loss of them."""

import torch
import torch.nn.functional as F

WIDTH, HEADS, TEXT = 24, 4, 10
sdpa = F.scaled_dot_product_attention


class Block(torch.nn.Module):
    """A block of a diffusion transformer: modulation by the timestep, self attention with a learned bias, cross attention to
    text, an MLP. Learned positions are added to its tokens."""

    def __init__(self, length, heads=HEADS):
        super().__init__()
        self.heads = heads
        self.norms = torch.nn.ModuleList(
            [torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH), torch.nn.RMSNorm(WIDTH)]
        )
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


def loss_of(results):
    """Each element of each output counts otherwise."""
    results = results if isinstance(results, tuple) else (results,)
    return sum((each * torch.linspace(-1, 1, each.numel()).double().view_as(each)).sum() for each in results)


def gradients(model, call, inputs):
    """The gradients of all inputs (a list, or a dictionary of keyword arguments) and of all parameters."""
    named = inputs if isinstance(inputs, dict) else dict(enumerate(inputs))
    named = {
        name: each.detach().clone().requires_grad_() if each.is_floating_point() else each
        for name, each in named.items()
    }
    model.zero_grad()
    loss_of(call(**named) if isinstance(inputs, dict) else call(*named.values())).backward()
    found = {f"input {name}": each.grad for name, each in named.items() if each.requires_grad}
    return found | {name: each.grad for name, each in model.named_parameters()}


def worst(found, expected):
    """The largest relative error of a gradient, with its name. Both have a gradient for the same tensors, some of them not
    zero."""
    assert {name: grad is None for name, grad in found.items()} == {
        name: grad is None for name, grad in expected.items()
    }
    errors = {
        name: ((found[name] - grad).norm() / grad.norm()).item()
        for name, grad in expected.items()
        if grad is not None and grad.norm() > 1e-9
    }
    assert len(errors) > len(expected) / 2
    name = max(errors, key=errors.get)
    return errors[name], name
