"""A small video DiT and what it draws: handwritten digits that move in straight lines and bounce off the edges.

Videos are (batch, 1, frames, height, width) in -1..1. A digit is one of scikit-learn's (`load_digits`: 1797 images of 8 x 8,
values 0..16), 20 pixels wide, between pixels (bilinear). The model is diffusers' own `WanTransformer3DModel`: 4 blocks, 2 heads
of 128, rotary positions in three axes, the digit's class as tokens of cross attention, patches of 1 x 2 x 2: a video of
32 x 64 x 64 is 32,768 tokens. It predicts the velocity of a flow from video (t = 0) to noise (t = 1). Nothing in this file
knows of attnrewrite.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor

WEIGHTS = Path(__file__).parent / "weights.safetensors"
CLASSES, HELD_OUT = 10, 297
SIZE = (32, 64, 64)  # frames, height, width of the videos that are sampled
DIGIT = 20  # pixels
TEXT = (4, 64)  # tokens and channels of a class
SHIFT = (
    3.0  # of the noise levels: neighbouring pixels say much about each other, so that more noise is needed to hide them
)


def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 8, 8) float32 in 0..1 and labels (1797,) int64; the last `HELD_OUT` are not used for training."""
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)


def videos(images: Tensor, size: tuple[int, int, int], generator: torch.Generator | None = None) -> Tensor:
    """Lets images (batch, 8, 8) in 0..1 move: (batch, 1, frames, height, width). Start and velocity (0.5 to 2 pixels a frame in
    each axis) are random."""
    batch, (frames, height, width), device = len(images), size, images.device

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, device=device, generator=generator)

    room = torch.tensor([width - DIGIT, height - DIGIT], device=device, dtype=torch.float32)
    speed = (0.5 + 1.5 * draw(batch, 1, 2)) * (draw(batch, 1, 2) < 0.5).float().mul(2).sub(1)
    way = draw(batch, 1, 2) * room + speed * torch.arange(frames, device=device)[:, None]
    corner = room - (way.remainder(2 * room) - room).abs()  # (batch, frames, 2): x and y, reflected at the edges
    axes = [torch.arange(each, device=device) + 0.5 for each in (width, height)]
    x, y = ((axis - corner[..., number, None]) * (2 / DIGIT) - 1 for number, axis in enumerate(axes))
    grid = torch.stack(torch.broadcast_tensors(x[:, :, None, :], y[:, :, :, None]), -1).flatten(0, 1)
    still = images[:, None, None].expand(batch, frames, 1, 8, 8).flatten(0, 1)
    drawn = F.grid_sample(still, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return drawn.unflatten(0, (batch, frames)).transpose(1, 2) * 2 - 1


def build(layers: int = 4) -> WanTransformer3DModel:
    """The untrained model."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=128,
        in_channels=1,
        out_channels=1,
        text_dim=TEXT[1],
        freq_dim=128,
        ffn_dim=1024,
        num_layers=layers,
        rope_max_seq_len=64,
    )


def prompts(labels: Tensor) -> Tensor:
    """The tokens of classes (batch,): (batch, tokens, channels), random vectors that are the same in every process."""
    table = torch.randn(CLASSES, *TEXT, generator=torch.Generator().manual_seed(0))
    return table.to(labels.device)[labels]


def save(model: torch.nn.Module, path: Path = WEIGHTS) -> None:
    """Writes weights in 8 bits a number, with one scale for each row of a matrix; vectors in float16."""
    stored = {}
    for name, weight in model.state_dict().items():
        if weight.dim() < 2:
            stored[name] = weight.half()
            continue
        rows = weight.float().flatten(1)
        scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        stored[name] = (rows / scale).round().to(torch.int8).view(weight.shape).contiguous()
        stored[f"{name}.scale"] = scale[:, 0].clone()
    save_file(stored, path)


def load(path: Path = WEIGHTS, dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    """The trained model in eval mode, in `dtype` but for those modules that diffusers keeps in float32. Raises
    `FileNotFoundError` if there are no weights: train.py makes them."""
    stored, state = load_file(path), {}
    for name, weight in stored.items():
        if (scale := stored.get(f"{name}.scale")) is not None:
            state[name] = weight.float() * scale.view(-1, *[1] * (weight.dim() - 1))
        elif not name.endswith(".scale"):
            state[name] = weight.float()
    model = build(layers=1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")))
    model.load_state_dict(state)
    for name, parameter in model.named_parameters():
        if not set(name.split(".")) & set(model._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


class Pipeline:
    """Draws videos of digits: `pipe(labels, noise)`. `components` is that of a diffusers pipeline."""

    def __init__(self, transformer: WanTransformer3DModel, steps: int = 30) -> None:
        self.transformer, self.steps = transformer, steps
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)

    @property
    def components(self) -> dict[str, object]:
        return {"transformer": self.transformer, "scheduler": self.scheduler}

    @torch.no_grad()
    def __call__(self, labels: Tensor, noise: Tensor) -> Tensor:
        """labels: (batch,) int64. noise: (batch, 1, frames, height, width) float32. Returns videos of its shape in -1..1.

        There is no classifier-free guidance: videos this plain need none.
        """
        dtype = self.transformer.proj_out.weight.dtype
        text = prompts(labels).to(dtype)
        self.scheduler.set_timesteps(self.steps, device=noise.device)
        drawn = noise
        for t in self.scheduler.timesteps:
            (velocity,) = self.transformer(
                hidden_states=drawn.to(dtype),
                timestep=t.expand(len(labels)),
                encoder_hidden_states=text,
                return_dict=False,
            )
            drawn = self.scheduler.step(velocity.float(), t, drawn).prev_sample
        return drawn.clamp(-1, 1)
