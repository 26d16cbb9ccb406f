"""Denoisers of diffusers at their published widths and token counts, with fewer layers and random weights.

Each function gives a `Denoiser`: nothing is downloaded. Widths are the defaults of the model classes (diffusers 0.42), token
counts those of the pipelines' default sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch


@dataclass
class Denoiser:
    """`blocks`: classes of the modules that are compiled each by itself, as `compile_repeated_blocks` does; empty: the whole
    model is one graph."""

    model: torch.nn.Module
    inputs: dict[str, Any]
    blocks: tuple[str, ...]
    about: str

    def step(self) -> torch.Tensor:
        output: torch.Tensor = self.model(**self.inputs, return_dict=False)[0]
        return output

    def compile(self, backend: Any) -> Callable[[], torch.Tensor]:
        """A step of the model compiled through a backend. Steps of several backends can be run in turn."""
        if not self.blocks:
            compiled = torch.compile(self.model, backend=backend, dynamic=False)
            return lambda: compiled(**self.inputs, return_dict=False)[0]
        regions = [module for module in self.model.modules() if type(module).__name__ in self.blocks]
        calls = [torch.compile(module._call_impl, backend=backend, dynamic=False) for module in regions]

        def step() -> torch.Tensor:
            for module, call in zip(regions, calls, strict=True):
                module._compiled_call_impl = call
            try:
                return self.step()
            finally:
                for module in regions:
                    module._compiled_call_impl = None

        return step


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def mask_of(lengths: list[int], longest: int) -> torch.Tensor:
    """(batch, longest), True where a prompt has a token."""
    return torch.arange(longest, device="cuda") < torch.tensor(lengths, device="cuda")[:, None]


def built(kind: type[torch.nn.Module], **configuration: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return kind(**configuration).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def hunyuan_video() -> Denoiser:
    """17 latent frames of 640 x 768: 32,640 tokens, and 256 of a prompt with 100."""
    model = built(diffusers.HunyuanVideoTransformer3DModel, num_layers=2, num_single_layers=4)
    inputs = {
        "hidden_states": randn(1, 16, 17, 80, 96),
        "timestep": torch.tensor([500], device="cuda"),
        "encoder_hidden_states": randn(1, 256, 4096),
        "encoder_attention_mask": mask_of([100], 256),
        "pooled_projections": randn(1, 768),
        "guidance": torch.tensor([6000.0], device="cuda", dtype=torch.bfloat16),
    }
    blocks = ("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock")
    return Denoiser(model, inputs, blocks, "HunyuanVideo, 2 + 4 of 20 + 40 blocks, 1 x 32,896 tokens, 24 heads of 128")


def qwen_image() -> Denoiser:
    """1328 x 1328, guided: two prompts of 256 and 40 tokens; text | padding | image."""
    model = built(diffusers.QwenImageTransformer2DModel, num_layers=6)
    inputs = {
        "hidden_states": randn(2, 83 * 83, 64),
        "encoder_hidden_states": randn(2, 256, 3584),
        "encoder_hidden_states_mask": mask_of([256, 40], 256),
        "timestep": torch.tensor([0.5, 0.5], device="cuda", dtype=torch.bfloat16),
        "img_shapes": [[(1, 83, 83)], [(1, 83, 83)]],
    }
    about = "Qwen-Image, 6 of 60 blocks, 2 x 7,145 tokens, 24 heads of 128"
    return Denoiser(model, inputs, ("QwenImageTransformerBlock",), about)


def ltx_video() -> Denoiser:
    """121 frames of 512 x 768: 6,144 tokens; the prompt's mask is made additive in front of the blocks."""
    model = built(diffusers.LTXVideoTransformer3DModel, num_layers=7)
    inputs = {
        "hidden_states": randn(2, 16 * 16 * 24, 128),
        "encoder_hidden_states": randn(2, 128, 4096),
        "timestep": torch.tensor([[500], [500]], device="cuda"),
        "encoder_attention_mask": mask_of([128, 20], 128),
        "num_frames": 16,
        "height": 16,
        "width": 24,
        "rope_interpolation_scale": (8 / 25, 32.0, 32.0),
    }
    about = "LTX-Video, 7 of 28 blocks in one graph, 2 x 6,144 tokens, 32 heads of 64, 128 keys of text"
    return Denoiser(model, inputs, (), about)


def lumina2() -> Denoiser:
    """1024 x 1024, guided: prompts of 256 and 60 tokens; text and image in one sequence, its end padded."""
    model = built(diffusers.Lumina2Transformer2DModel, num_layers=6, cap_feat_dim=2304)
    inputs = {
        "hidden_states": randn(2, 16, 128, 128),
        "timestep": torch.tensor([0.5, 0.5], device="cuda", dtype=torch.bfloat16),
        "encoder_hidden_states": randn(2, 256, 2304),
        "encoder_attention_mask": mask_of([256, 60], 256),
    }
    about = "Lumina-Image 2, 6 of 26 blocks and refiners, 2 x 4,352 tokens, 24 heads of 96 on 8 of keys"
    return Denoiser(model, inputs, ("Lumina2TransformerBlock",), about)
