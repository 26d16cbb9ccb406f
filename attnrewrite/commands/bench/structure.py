"""Inputs and weights that give a model's attention the structure of a video.

Random weights make scores without structure: every key matters a little to every query, and a sparse kernel is worthless. In a
trained model of videos the scores follow position, and neighbours are alike. Here too:

* The latents are smooth: noise on a coarse grid, interpolated.
* Queries and keys of self attention are a vector that all tokens share, plus a random part from the hidden states, whose norm
  is `Place.loose` of the vector's. The shared vector comes in by the bias of the projections, before the model's own
  normalisation and rotary embedding, so that a score depends on how far apart two tokens are. It lies in those pairs of
  channels whose angle turns from frame to frame and from row to row, and by at most one radian within a block of 64 tokens.

This is the structure that sparse kernels are made for, the more so the smaller the random part is: a favourable case, not a
trained model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from .denoiser import Denoiser, Place

BLOCK = 64  # tokens of a block of a sparse kernel
PEAK = 14.0  # the score of a token with itself; scores of tokens far apart are about 0
COARSE = (4, 16, 16)  # frames, rows and columns of latents from one independent value to the next
# The standard deviation of what nn.Linear's own initial weights make of values with standard deviation 1.
UNIFORM = 3**-0.5


@dataclass(frozen=True)
class Rotary:
    """A rotary embedding of three axes, with its channels in pairs (2j, 2j + 1), the frames' first."""

    tokens: tuple[int, int, int]  # frames, rows, columns
    dims: tuple[int, int, int]  # channels of a head for each axis
    theta: float

    def angles(self) -> list[torch.Tensor]:
        """The radians that each pair of channels turns from token to token, by axis: (dim / 2,), float32, on the CPU."""
        return [self.theta ** (-torch.arange(0, dim, 2, device="cpu") / dim) for dim in self.dims]

    def followed(self) -> torch.Tensor:
        """1 for each pair of channels that the shared vector lies in, 0 for the others: (head_dim / 2,), float32, on the CPU.

        Raises `ValueError` if no pair turns slowly within a block and by two radians or more over the whole video.
        """
        columns = self.tokens[-1]
        within = (1.0, max(1.0, BLOCK / columns), float(min(BLOCK, columns)))  # the steps within a block, by axis
        found = []
        for angles, steps, most in zip(self.angles(), within, self.tokens, strict=True):
            found.append((angles * steps <= 1) & (angles * most >= 2))
        pairs = torch.cat(found).float()
        if not pairs.any():
            raise ValueError(
                f"{self} has no channels whose angle turns over the video and hardly within {BLOCK} tokens"
            )
        return pairs


def latents(at: Place, *sizes: int) -> torch.Tensor:
    """Noise (batch, channels, frames, rows, columns), smooth where the place asks for structure."""
    return smooth(at, *sizes) if at.structured else at.randn(*sizes)


def smooth(at: Place, *sizes: int) -> torch.Tensor:
    """Noise (batch, channels, frames, rows, columns) with neighbours that are alike, of standard deviation 1."""
    coarse = [-(-size // step) + 1 for size, step in zip(sizes[2:], COARSE, strict=True)]
    noise = torch.randn(*sizes[:2], *coarse, device=at.device)
    found = torch.nn.functional.interpolate(noise, sizes[2:], mode="trilinear", align_corners=True)
    return (found / found.std()).to(at.dtype)


def follow_position(at: Place, denoiser: Denoiser, rotary: Rotary) -> Denoiser:
    """The denoiser; where the place asks for structure, with weights of its blocks' self attention changed in place: their
    scores follow position. The attention is `attn1` or `attn` of a block, with a norm behind the projections of query and key.
    """
    if not at.structured:
        return denoiser
    pairs = rotary.followed()
    for block in denoiser.model.modules():
        if type(block).__name__ in denoiser.blocks:
            share(block.attn1 if hasattr(block, "attn1") else block.attn, pairs, at.loose, PEAK)
    denoiser.data = f"structured, random part {at.loose:g}"
    return denoiser


@torch.no_grad()
def share(attention: Any, pairs: torch.Tensor, loose: float, peak: float) -> None:
    """Gives the queries and keys of an untrained attention of diffusers a vector that all tokens share, in place.

    pairs: 1 for each pair of channels that the vector lies in, 0 for the others: (head_dim / 2,), or (heads, head_dim / 2).
    loose: the norm of the part from the hidden states, relative to the vector. peak: the score of a token with itself.
    """
    shared = _shared(pairs, attention.to_q.bias)
    for projection, norm in ((attention.to_q, attention.norm_q), (attention.to_k, attention.norm_k)):
        projection.weight.mul_(loose / UNIFORM)
        projection.bias.copy_(shared)
        norm.weight.fill_(math.sqrt(peak / math.sqrt(2 * pairs.shape[-1])))


def _shared(pairs: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A vector for each head, in the given pairs of channels, of mean square 1 and with a direction of its own in each pair."""
    count = pairs.shape[-1]
    direction = 2 * math.pi * torch.rand(like.numel() // (2 * count), count, device=like.device)
    size = (2 * count / pairs.sum(-1, keepdim=True)).sqrt() * pairs
    vector = torch.stack([direction.cos(), direction.sin()], dim=-1) * size.to(like.device)[..., None]
    return vector.flatten().to(like.dtype)
