"""The small class-conditional DiT of the demo: its data, its noise schedule and its sampler.

Images are scikit-learn's handwritten digits (`load_digits`: 1797 images of 8 x 8, values 0..16), scaled to -1..1.
The model is diffusers' own `DiTTransformer2DModel`. Only demo.py in this folder uses attnrewrite.
"""

from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from sklearn.datasets import load_digits

WEIGHTS = Path(__file__).parent / "weights"
CLASSES = 10
HELD_OUT = 297


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (1797, 1, 8, 8) float32 in -1..1 and labels (1797,) int64; the last `HELD_OUT` are not used for training."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    return images, torch.tensor(digits.target)


def build() -> DiTTransformer2DModel:
    """The untrained model: 4 blocks, 4 heads of 24, one token a pixel."""
    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=1,
        out_channels=1,
        num_layers=4,
        sample_size=8,
        patch_size=1,
        num_embeds_ada_norm=CLASSES,
    )


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=True
    )


def load() -> DiTTransformer2DModel:
    """The trained model in float32, in eval mode. The file holds float16 to stay small."""
    return DiTTransformer2DModel.from_pretrained(WEIGHTS, torch_dtype=torch.float32).eval()


@torch.no_grad()
def sample(denoiser, labels: torch.Tensor, noise: torch.Tensor, steps: int = 30) -> torch.Tensor:
    """Samples with DDIM and returns images (N, 1, 8, 8) in -1..1. labels: (N,) int64. noise: (N, 1, 8, 8) float32.

    There is no classifier-free guidance: it saturates the pixels of images this small.
    """
    schedule = scheduler()
    schedule.set_timesteps(steps)
    images = noise
    for t in schedule.timesteps:
        velocity = denoiser(images, timestep=t.expand(len(labels)), class_labels=labels).sample
        images = schedule.step(velocity, t, images).prev_sample
    return images.clamp(-1, 1)
