"""A small model with every kind of attention that attnrewrite distinguishes. `attnrewrite explain` without a file plans it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TEXT, IMAGE, WIDTH, HEADS = 12, 40, 64, 4


class Attention(nn.Module):
    """SDPA on projections of tokens (batch, tokens, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.to_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        given = (tokens, context, context)
        query, key, value = (
            project(each).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for project, each in zip(self.to_qkv, given, strict=True)
        )
        output: Tensor = self.to_out(self.attend(query, key, value, mask).transpose(1, 2).flatten(2))
        return output

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask)


class SpelledOut(Attention):
    """The same attention, written as matmul and softmax."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        weights: Tensor = (scores if mask is None else scores + mask).softmax(-1)
        return weights @ value


class Demo(nn.Module):
    """A layer of a text encoder and a layer of a denoiser.

    forward takes
    text: (batch, 12, 64)
    image: (batch, 40, 64)
    valid: (batch, 12) bool, True for the tokens of the prompt that are not padding
    bias: (4, 40, 40), a position bias
    """

    def __init__(self) -> None:
        super().__init__()
        self.causal, self.joint, self.outer, self.positions = (Attention() for _ in range(4))
        self.prompt, self.spelled_out = Attention(), SpelledOut()

    def forward(self, text: Tensor, image: Tensor, valid: Tensor, bias: Tensor) -> Tensor:
        triangle = torch.ones(TEXT, TEXT, dtype=torch.bool, device=text.device).tril()
        text = text + self.causal(text, text, triangle)
        image = image + self.prompt(image, text, valid[:, None, None, :])
        hidden = (1 - valid.to(text.dtype)) * -10000.0
        image = image + self.spelled_out(image, text, hidden[:, None, None, :])
        both = torch.cat([text, image], dim=1)
        there = torch.cat([valid, valid.new_ones(valid.shape[0], IMAGE)], dim=1)
        both = both + self.joint(both, both, there[:, None, None, :])
        both = both + self.outer(both, both, there[:, None, :, None] & there[:, None, None, :])
        image = both[:, TEXT:]
        output: Tensor = image + self.positions(image, image, bias)
        return output


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two prompts, one of them shorter."""
    valid = torch.arange(TEXT) < torch.tensor([[TEXT], [5]])
    return torch.randn(2, TEXT, WIDTH), torch.randn(2, IMAGE, WIDTH), valid, torch.randn(HEADS, IMAGE, IMAGE)
