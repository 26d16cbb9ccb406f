"""Denoisers of diffusers at their published widths and token counts, with fewer layers and random weights.

Nothing is downloaded. Widths come from the published configurations (most are the defaults of the model classes in diffusers
0.42), token counts from the default sizes of the pipelines. Each has a small version for the CPU with the same code paths.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .denoiser import Denoiser, Place
from .video_denoisers import cogvideox, hunyuan, ltx, svd, wan_1_3b, wan_14b, wan_14b_720p


def flux(at: Place) -> Denoiser:
    """1024 x 1024 pixels. Guidance is distilled, so one prompt of 512 tokens."""
    heads, dim = at.pick(24, 2), at.pick(128, 16)
    layers, single = at.pick(3, 1), at.pick(6, 1)
    channels, joint, pooled = at.pick(64, 8), at.pick(4096, 24), at.pick(768, 12)
    side, text = at.pick(64, 5), at.pick(512, 7)
    model = at.built(
        "FluxTransformer2DModel", num_layers=layers, num_single_layers=single, num_attention_heads=heads,
        attention_head_dim=dim, in_channels=channels, joint_attention_dim=joint, pooled_projection_dim=pooled,
        guidance_embeds=True, axes_dims_rope=at.pick((16, 56, 56), (4, 6, 6)),
    )  # fmt: skip
    rows, columns = (
        torch.arange(side * side, device=at.device) // side,
        torch.arange(side * side, device=at.device) % side,
    )
    inputs = {
        "hidden_states": at.randn(1, side * side, channels),
        "encoder_hidden_states": at.randn(1, text, joint),
        "pooled_projections": at.randn(1, pooled),
        "timestep": at.full(0.5),
        "guidance": at.full(3.5),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).to(at.dtype),
        "txt_ids": torch.zeros(text, 3, device=at.device, dtype=at.dtype),
    }
    blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    about = f"FLUX.1, {layers} + {single} of 19 + 38 blocks, 1 x {side * side + text:,} tokens, {heads} heads of {dim}"
    return Denoiser(model, inputs, blocks, about)


def sd35(at: Place) -> Denoiser:
    """1024 x 1024 pixels with guidance: two prompts of 77 + 256 tokens. Its attention calls SDPA without the dispatcher."""
    heads, dim, layers = at.pick(38, 3), at.pick(64, 8), at.pick(6, 2)
    side, text, joint, pooled = at.pick(128, 8), at.pick(333, 7), at.pick(4096, 20), at.pick(2048, 12)
    model = at.built(
        "SD3Transformer2DModel", sample_size=side, patch_size=2, in_channels=16, out_channels=16, num_layers=layers,
        num_attention_heads=heads, attention_head_dim=dim, joint_attention_dim=joint, caption_projection_dim=heads * dim,
        pooled_projection_dim=pooled, pos_embed_max_size=at.pick(192, 8), qk_norm="rms_norm",
    )  # fmt: skip
    inputs = {
        "hidden_states": at.randn(2, 16, side, side),
        "encoder_hidden_states": at.randn(2, text, joint),
        "pooled_projections": at.randn(2, pooled),
        "timestep": torch.tensor([500, 500], device=at.device),
    }
    tokens = (side // 2) ** 2 + text
    about = f"SD3.5-large, {layers} of 38 blocks, 2 x {tokens:,} tokens, {heads} heads of {dim}"
    return Denoiser(model, inputs, ("JointTransformerBlock",), about)


def sdxl(at: Place) -> Denoiser:
    """1024 x 1024 pixels with guidance: two prompts of 77 tokens. The innermost blocks have fewer layers than published; only
    the transformer blocks are compiled, the ResNets are not."""
    channels, heads = at.pick((320, 640, 1280), (32, 64)), at.pick((5, 10, 20), (2, 4))
    layers = at.pick((1, 2, 3), (1, 1))
    side, text, joint = at.pick(128, 8), at.pick(77, 7), at.pick(2048, 20)
    pooled, embedded = at.pick(1280, 12), at.pick(256, 8)
    down, up = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    model = at.built(
        "UNet2DConditionModel", sample_size=side, block_out_channels=channels, attention_head_dim=heads,
        down_block_types=("DownBlock2D", *[down] * (len(channels) - 1)), cross_attention_dim=joint,
        up_block_types=(*[up] * (len(channels) - 1), "UpBlock2D"), transformer_layers_per_block=layers,
        layers_per_block=at.pick(2, 1), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=embedded, projection_class_embeddings_input_dim=6 * embedded + pooled,
    )  # fmt: skip
    inputs = {
        "sample": at.randn(2, 4, side, side),
        "timestep": torch.tensor([500, 500], device=at.device),
        "encoder_hidden_states": at.randn(2, text, joint),
        "added_cond_kwargs": {"text_embeds": at.randn(2, pooled), "time_ids": at.full(*[1024.0] * 12).view(2, 6)},
    }
    about = f"SDXL, UNet with {layers[-1]} of 10 inner layers, 2 x {(side // 2) ** 2:,} and {(side // 4) ** 2:,} tokens"
    return Denoiser(model, inputs, ("BasicTransformerBlock",), about)


def qwen_image(at: Place) -> Denoiser:
    """1328 x 1328 pixels with guidance: two prompts of 256 and 40 tokens. Sequences are text, padding, image."""
    heads, dim, layers = at.pick(24, 3), at.pick(128, 16), at.pick(6, 2)
    side, text, joint = at.pick(83, 5), at.pick(256, 9), at.pick(3584, 20)
    model = at.built(
        "QwenImageTransformer2DModel", num_layers=layers, num_attention_heads=heads, attention_head_dim=dim,
        joint_attention_dim=joint, axes_dims_rope=at.pick((16, 56, 56), (4, 6, 6)),
    )  # fmt: skip
    inputs = {
        "hidden_states": at.randn(2, side * side, 64),
        "encoder_hidden_states": at.randn(2, text, joint),
        "encoder_hidden_states_mask": at.mask_of((text, at.pick(40, 4)), text),
        "timestep": at.full(0.5, 0.5),
        "img_shapes": [[(1, side, side)], [(1, side, side)]],
    }
    about = f"Qwen-Image, {layers} of 60 blocks, 2 x {side * side + text:,} tokens, {heads} heads of {dim}"
    return Denoiser(model, inputs, ("QwenImageTransformerBlock",), about)


def lumina2(at: Place) -> Denoiser:
    """1024 x 1024 pixels with guidance: prompts of 256 and 60 tokens. Text and image are one sequence, padded at its end."""
    heads, keys, dim, layers = at.pick(24, 4), at.pick(8, 2), at.pick(96, 24), at.pick(6, 1)
    side, text, joint = at.pick(128, 8), at.pick(256, 9), at.pick(2304, 20)
    model = at.built(
        "Lumina2Transformer2DModel", num_layers=layers, cap_feat_dim=joint, hidden_size=heads * dim,
        num_attention_heads=heads, num_kv_heads=keys, axes_dim_rope=at.pick((32, 32, 32), (8, 8, 8)),
    )  # fmt: skip
    inputs = {
        "hidden_states": at.randn(2, 16, side, side),
        "timestep": at.full(0.5, 0.5),
        "encoder_hidden_states": at.randn(2, text, joint),
        "encoder_attention_mask": at.mask_of((text, at.pick(60, 4)), text),
    }
    tokens = (side // 2) ** 2 + text
    on = f"{heads} heads of {dim} on {keys} of keys"
    about = f"Lumina-Image 2, {layers} of 26 blocks and refiners, 2 x {tokens:,} tokens, {on}"
    return Denoiser(model, inputs, ("Lumina2TransformerBlock",), about)


MODELS: dict[str, Callable[[Place], Denoiser]] = {
    "hunyuan": hunyuan,
    "qwen-image": qwen_image,
    "wan-14b": wan_14b,
    "wan-14b-720p": wan_14b_720p,
    "wan-1.3b": wan_1_3b,
    "sd3.5": sd35,
    "flux": flux,
    "sdxl": sdxl,
    "cogvideox": cogvideox,
    "svd": svd,
    "ltx": ltx,
    "lumina2": lumina2,
}
