"""Denoisers of videos, as those of pictures in denoisers.py."""

from __future__ import annotations

import torch

from .denoiser import Denoiser, Place
from .structure import Rotary, follow_position, latents


def svd(at: Place) -> Denoiser:
    """14 frames of 576 x 1024 pixels with guidance. Spatial attention within a frame, temporal attention between the frames at
    each place: short sequences in a large batch. Only the transformer blocks are compiled, the ResNets are not."""
    channels, heads = at.pick((320, 640, 1280, 1280), (32, 64)), at.pick((5, 10, 20, 20), (2, 4))
    frames, rows, columns = at.pick((14, 72, 128), (3, 8, 4))
    joint, embedded = at.pick(1024, 20), at.pick(256, 8)
    down, up = "CrossAttnDownBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"
    attending = len(channels) - 1
    model = at.built(
        "UNetSpatioTemporalConditionModel", block_out_channels=channels, num_attention_heads=heads,
        down_block_types=(*[down] * attending, "DownBlockSpatioTemporal"), cross_attention_dim=joint,
        up_block_types=("UpBlockSpatioTemporal", *[up] * attending), layers_per_block=at.pick(2, 1),
        addition_time_embed_dim=embedded, projection_class_embeddings_input_dim=3 * embedded, num_frames=frames,
    )  # fmt: skip
    inputs = {
        "sample": at.randn(2, frames, 8, rows, columns),
        "timestep": torch.tensor(500, device=at.device),
        "encoder_hidden_states": at.randn(2, 1, joint),
        "added_time_ids": at.full(*[6.0, 127.0, 0.02] * 2).view(2, 3),
    }
    about = f"Stable Video Diffusion, {frames} frames of {rows * columns:,} places and less, batch 2"
    return Denoiser(model, inputs, ("BasicTransformerBlock", "TemporalBasicTransformerBlock"), about)


def wan(
    at: Place, name: str, heads: int, inner: int, layers: int, of: int, size: tuple[int, int, int] = (21, 60, 104)
) -> Denoiser:
    """81 frames of 480 x 832 pixels, 32,760 tokens, unless `size` has other latents (frames, rows, columns); a prompt of 512
    tokens."""
    heads, dim, inner = at.pick(heads, 3), at.pick(128, 12), at.pick(inner, 40)
    layers = at.pick(layers, 2)
    frames, rows, columns = at.pick(size, (2, 6, 4))
    text, joint = at.pick(512, 7), at.pick(4096, 20)
    model = at.built(
        "WanTransformer3DModel", num_attention_heads=heads, attention_head_dim=dim, ffn_dim=inner, num_layers=layers,
        text_dim=joint, freq_dim=at.pick(256, 32),
    )  # fmt: skip
    inputs = {
        "hidden_states": latents(at, 1, 16, frames, rows, columns),
        "timestep": torch.tensor([500], device=at.device),
        "encoder_hidden_states": at.randn(1, text, joint),
    }
    tokens = frames * rows * columns // 4
    about = f"{name}, {layers} of {of} blocks, 1 x {tokens:,} tokens, {heads} heads of {dim}, {text} keys of text"
    made = Denoiser(model, inputs, ("WanTransformerBlock",), about)
    side = 2 * (dim // 6)  # as WanRotaryPosEmbed of diffusers 0.42 divides a head among its axes
    rotary = Rotary((frames, rows // 2, columns // 2), (dim - 2 * side, side, side), 1e4)
    return follow_position(at, made, rotary)


def wan_1_3b(at: Place) -> Denoiser:
    return wan(at, "Wan2.1 1.3B", heads=12, inner=8960, layers=4, of=30)


def wan_14b(at: Place) -> Denoiser:
    return wan(at, "Wan2.1 14B", heads=40, inner=13824, layers=3, of=40)


def wan_14b_720p(at: Place) -> Denoiser:
    """81 frames of 720 x 1280 pixels: 75,600 tokens."""
    return wan(at, "Wan2.1 14B 720p", heads=40, inner=13824, layers=2, of=40, size=(21, 90, 160))


def hunyuan(at: Place) -> Denoiser:
    """17 latent frames of 640 x 768 pixels: 32,640 tokens, and a prompt of 100 tokens padded to 256."""
    heads, dim = at.pick(24, 2), at.pick(128, 24)
    layers, single, axes = at.pick(2, 1), at.pick(4, 1), at.pick((16, 56, 56), (8, 8, 8))
    frames, rows, columns = at.pick((17, 80, 96), (3, 8, 6))
    text, real, joint, pooled = at.pick(256, 9), at.pick(100, 5), at.pick(4096, 20), at.pick(768, 12)
    model = at.built(
        "HunyuanVideoTransformer3DModel", num_layers=layers, num_single_layers=single, num_attention_heads=heads,
        attention_head_dim=dim, text_embed_dim=joint, pooled_projection_dim=pooled, num_refiner_layers=at.pick(2, 1),
        rope_axes_dim=axes,
    )  # fmt: skip
    inputs = {
        "hidden_states": latents(at, 1, 16, frames, rows, columns),
        "timestep": torch.tensor([500], device=at.device),
        "encoder_hidden_states": at.randn(1, text, joint),
        "encoder_attention_mask": at.mask_of((real,), text),
        "pooled_projections": at.randn(1, pooled),
        "guidance": at.full(6000.0),
    }
    blocks = ("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock")
    tokens = frames * rows * columns // 4 + text
    about = f"HunyuanVideo, {layers} + {single} of 20 + 40 blocks, 1 x {tokens:,} tokens, {heads} heads of {dim}"
    made = Denoiser(model, inputs, blocks, about)
    rotary = Rotary((frames, rows // 2, columns // 2), axes, 256.0)
    return follow_position(at, made, rotary)


def cogvideox(at: Place) -> Denoiser:
    """CogVideoX-5B: 49 frames of 480 x 720 pixels with guidance, two prompts of 226 tokens in front of 17,550 of the video. Its
    attention calls SDPA without the dispatcher."""
    heads, dim, layers = at.pick(48, 3), at.pick(64, 16), at.pick(6, 2)
    frames, rows, columns = at.pick((13, 60, 90), (3, 6, 8))
    text, joint = at.pick(226, 7), at.pick(4096, 20)
    model = at.built(
        "CogVideoXTransformer3DModel", num_attention_heads=heads, attention_head_dim=dim, num_layers=layers,
        text_embed_dim=joint, max_text_seq_length=text, time_embed_dim=at.pick(512, 24), sample_frames=4 * frames - 3,
        sample_height=rows, sample_width=columns, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    grid = (rows // 2, columns // 2)
    inputs = {
        "hidden_states": latents(at, 2, 16, frames, rows, columns).transpose(1, 2),
        "encoder_hidden_states": at.randn(2, text, joint),
        "timestep": torch.tensor([500, 500], device=at.device),
        "image_rotary_emb": _angles(dim, grid, frames, at.device),
    }
    tokens = frames * grid[0] * grid[1] + text
    about = f"CogVideoX-5B, {layers} of 42 blocks, 2 x {tokens:,} tokens, {heads} heads of {dim}"
    made = Denoiser(model, inputs, ("CogVideoXBlock",), about)
    rotary = Rotary((frames, *grid), (dim // 4, dim // 8 * 3, dim // 8 * 3), 1e4)
    return follow_position(at, made, rotary)


def _angles(dim: int, grid: tuple[int, int], frames: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What CogVideoX's pipeline passes for the rotary embedding: cosine and sine, (tokens, dim) each, float32."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    cosine, sine = get_3d_rotary_pos_embed(dim, ((0, 0), grid), grid, frames, device=device)
    return cosine, sine


def ltx(at: Place) -> Denoiser:
    """121 frames of 512 x 768 pixels: 6,144 tokens. The model makes the prompt's mask additive before its blocks."""
    heads, dim, layers = at.pick(32, 3), at.pick(64, 16), at.pick(7, 2)
    frames, rows, columns = at.pick((16, 16, 24), (2, 4, 3))
    text, joint = at.pick(128, 9), at.pick(4096, 20)
    model = at.built(
        "LTXVideoTransformer3DModel", num_layers=layers, num_attention_heads=heads, attention_head_dim=dim,
        cross_attention_dim=heads * dim, caption_channels=joint,
    )  # fmt: skip
    inputs = {
        "hidden_states": at.randn(2, frames * rows * columns, 128),
        "encoder_hidden_states": at.randn(2, text, joint),
        "timestep": torch.tensor([[500], [500]], device=at.device),
        "encoder_attention_mask": at.mask_of((text, at.pick(20, 4)), text),
        "num_frames": frames,
        "height": rows,
        "width": columns,
        "rope_interpolation_scale": (8 / 25, 32.0, 32.0),
    }
    about = (
        f"LTX-Video, {layers} of 28 blocks in one graph, 2 x {frames * rows * columns:,} tokens, {heads} heads of {dim}, "
        f"{text} keys of text"
    )
    return Denoiser(model, inputs, (), about)
