"""Denoisers of diffusers at their published widths and token counts, with fewer layers and random weights.

Nothing is downloaded. Widths come from the published configurations (most are the defaults of the model classes in diffusers
0.42), token counts from the default sizes of the pipelines. Each has a small version for the CPU with the same code paths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType
from typing import Any, TypeVar

import torch

from ...graphs.modules import set_implementation

Number = TypeVar("Number")


@dataclass(frozen=True)
class Place:
    """Where and at which size a model is built."""

    device: torch.device
    dtype: torch.dtype
    small: bool = False  # True: the sizes of a test instead of the published sizes

    def pick(self, published: Number, small: Number) -> Number:
        return small if self.small else published

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def full(self, *values: float) -> torch.Tensor:
        return torch.tensor(values, device=self.device, dtype=self.dtype)

    def mask_of(self, lengths: tuple[int, ...], longest: int) -> torch.Tensor:
        """A boolean mask (batch, longest), True for the tokens of each prompt, False for its padding."""
        return torch.arange(longest, device=self.device) < torch.tensor(lengths, device=self.device)[:, None]

    def built(self, kind: str, **configuration: Any) -> torch.nn.Module:
        """A model in eval mode. kind: the name of its class in diffusers."""
        diffusers: Any = imported()
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                model: torch.nn.Module = getattr(diffusers, kind)(**configuration).eval()
            # Parameters made by torch.Tensor([...]) lie on the CPU whatever the default device is (SVD's mix_factor).
            return model.to(self.device)
        finally:
            torch.set_default_dtype(before)


@dataclass
class Denoiser:
    """A model and its inputs."""

    model: torch.nn.Module
    inputs: dict[str, Any]  # the keyword arguments of a step
    blocks: tuple[str, ...]  # classes compiled one by one (as `compile_repeated_blocks`); (): one graph
    about: str  # name and sizes, for tables

    def step(self) -> torch.Tensor:
        output: torch.Tensor = self.model(**self.inputs, return_dict=False)[0]
        return output

    def compile(self, backend: Any, mode: str | None = None) -> Callable[[], torch.Tensor]:
        """Returns a function that runs one step compiled with `backend`. Steps of several backends can run in turn.

        mode: torch.compile's, for example "reduce-overhead".
        """
        regions = [module for module in self.model.modules() if type(module).__name__ in self.blocks] or [self.model]
        codes: dict[type, CodeType] = {}
        calls = [torch.compile(_own(module, codes), backend=backend, dynamic=False, mode=mode) for module in regions]

        def step() -> torch.Tensor:
            for module, call in zip(regions, calls, strict=True):
                set_implementation(module, call)
            try:
                return self.step()
            finally:
                for module in regions:
                    set_implementation(module, None)

        return step


def _own(module: torch.nn.Module, codes: dict[type, CodeType]) -> MethodType:
    """Returns `module.forward` with a code object of its own, shared by all modules of its class through `codes`. Dynamo keeps
    compiled code with the code object, and each call searches it: variants with a common one would slow each other down."""
    forward: Any = type(module).forward
    code = codes.setdefault(type(module), forward.__code__.replace())
    function = FunctionType(code, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__)
    function.__kwdefaults__ = forward.__kwdefaults__
    return MethodType(function, module)


def imported() -> Any:
    """Imports diffusers. Raises `ImportError`, which says how to install it."""
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(
            f"attnrewrite bench --models builds models of diffusers: pip install diffusers ({error})"
        ) from error
    return diffusers


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


def _wan(at: Place, name: str, heads: int, inner: int, layers: int, of: int) -> Denoiser:
    """81 frames of 480 x 832 pixels: 32,760 tokens, and a prompt of 512 tokens."""
    heads, dim, inner = at.pick(heads, 3), at.pick(128, 12), at.pick(inner, 40)
    layers = at.pick(layers, 2)
    frames, rows, columns = at.pick((21, 60, 104), (2, 6, 4))
    text, joint = at.pick(512, 7), at.pick(4096, 20)
    model = at.built(
        "WanTransformer3DModel", num_attention_heads=heads, attention_head_dim=dim, ffn_dim=inner, num_layers=layers,
        text_dim=joint, freq_dim=at.pick(256, 32),
    )  # fmt: skip
    inputs = {
        "hidden_states": at.randn(1, 16, frames, rows, columns),
        "timestep": torch.tensor([500], device=at.device),
        "encoder_hidden_states": at.randn(1, text, joint),
    }
    tokens = frames * rows * columns // 4
    about = f"{name}, {layers} of {of} blocks, 1 x {tokens:,} tokens, {heads} heads of {dim}, {text} keys of text"
    return Denoiser(model, inputs, ("WanTransformerBlock",), about)


def wan_1_3b(at: Place) -> Denoiser:
    return _wan(at, "Wan2.1 1.3B", heads=12, inner=8960, layers=4, of=30)


def wan_14b(at: Place) -> Denoiser:
    return _wan(at, "Wan2.1 14B", heads=40, inner=13824, layers=3, of=40)


def hunyuan(at: Place) -> Denoiser:
    """17 latent frames of 640 x 768 pixels: 32,640 tokens, and a prompt of 100 tokens padded to 256."""
    heads, dim = at.pick(24, 2), at.pick(128, 24)
    layers, single = at.pick(2, 1), at.pick(4, 1)
    frames, rows, columns = at.pick((17, 80, 96), (3, 8, 6))
    text, real, joint, pooled = at.pick(256, 9), at.pick(100, 5), at.pick(4096, 20), at.pick(768, 12)
    model = at.built(
        "HunyuanVideoTransformer3DModel", num_layers=layers, num_single_layers=single, num_attention_heads=heads,
        attention_head_dim=dim, text_embed_dim=joint, pooled_projection_dim=pooled, num_refiner_layers=at.pick(2, 1),
        rope_axes_dim=at.pick((16, 56, 56), (8, 8, 8)),
    )  # fmt: skip
    inputs = {
        "hidden_states": at.randn(1, 16, frames, rows, columns),
        "timestep": torch.tensor([500], device=at.device),
        "encoder_hidden_states": at.randn(1, text, joint),
        "encoder_attention_mask": at.mask_of((real,), text),
        "pooled_projections": at.randn(1, pooled),
        "guidance": at.full(6000.0),
    }
    blocks = ("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock")
    tokens = frames * rows * columns // 4 + text
    about = f"HunyuanVideo, {layers} + {single} of 20 + 40 blocks, 1 x {tokens:,} tokens, {heads} heads of {dim}"
    return Denoiser(model, inputs, blocks, about)


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
    "wan-1.3b": wan_1_3b,
    "sd3.5": sd35,
    "flux": flux,
    "sdxl": sdxl,
    "svd": svd,
    "ltx": ltx,
    "lumina2": lumina2,
}
