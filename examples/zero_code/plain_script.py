"""Samples with a small latent-diffusion pipeline of random weights. The script does not use attnrewrite."""

import argparse

import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.models import AutoencoderKL

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--compile", action="store_true", help="compile the transformer")
options = parser.parse_args()

torch.manual_seed(0)
transformer = DiTTransformer2DModel(
    num_attention_heads=3, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8, patch_size=2,
    num_embeds_ada_norm=1000,
)  # fmt: skip
vae = AutoencoderKL(
    block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
)  # fmt: skip
pipe = DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler(), id2label={index: str(index) for index in range(10)})
pipe.set_progress_bar_config(disable=True)
if options.compile:
    pipe.transformer.compile(fullgraph=True)

images = pipe(class_labels=[1, 7], num_inference_steps=options.steps, output_type="np").images
print(f"{len(images)} images of {images[0].shape}, mean {images.mean():.4f}")
