"""Small diffusion models of diffusers' and transformers' own classes, with random weights and inputs.

`MODELS` has a builder for each: it returns a module in eval mode and the keyword arguments of one forward. Nothing is
downloaded. Sizes differ wherever the model allows it (batch, lengths, heads, head dims), so that a kernel that mixes up
two of them cannot give the right numbers.
"""

import functools

import diffusers
import torch
import transformers

MODELS = {}

# Dynamo settings without which a model is not traced as a whole.
SETTINGS = {
    # Picks the valid prompt tokens of each sample with `nonzero`, in a loop: Dynamo leaves the attention to Python.
    "mochi": {"capture_dynamic_output_shape_ops": True},
}


def model(build):
    """Enters a builder into the table, under its own name. Weights and inputs are the same at every call."""

    @functools.wraps(build)
    def seeded():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(len(build.__name__))
            module, kwargs = build()
            sharpen(module)
        return module.eval(), {**kwargs, "return_dict": False}

    MODELS[build.__name__] = seeded
    return seeded


def sharpen(module):
    """Makes attention matter: with the weights of a fresh module every query attends to all keys alike."""
    for name, parameter in module.named_parameters():
        if parameter.dim() == 2 and any(part in name for part in ("to_q", "to_k", "q_proj", "k_proj", ".q.", ".k.")):
            parameter.data.mul_(4)


def randn(*shape):
    return torch.randn(shape)


def mask_of(lengths, width):
    """(batch, width), 1 for the first `lengths[i]` tokens of row i: a padded prompt."""
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).long()


def position_ids(tokens, axes):
    """(tokens, axes): made-up positions of tokens on a grid."""
    return torch.stack([torch.arange(tokens) // 4**axis % 4 for axis in range(axes)], dim=-1).float()


def rotary(tokens, dim):
    """Cosines and sines, (tokens, dim) each."""
    angles = torch.outer(torch.arange(tokens).float(), torch.logspace(0, -2, dim // 2)).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


@model
def flux():
    module = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=20, pooled_projection_dim=12, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return module, {
        "hidden_states": randn(2, 15, 4),
        "encoder_hidden_states": randn(2, 7, 20),
        "pooled_projections": randn(2, 12),
        "timestep": torch.tensor([0.3, 0.9]),
        "guidance": torch.tensor([3.5, 3.5]),
        "img_ids": position_ids(15, 3),
        "txt_ids": torch.zeros(7, 3),
    }


@model
def flux2():
    module = diffusers.Flux2Transformer2DModel(
        in_channels=6, num_layers=1, num_single_layers=2, attention_head_dim=24, num_attention_heads=2,
        joint_attention_dim=18, timestep_guidance_channels=32, axes_dims_rope=(6, 6, 6, 6),
    )  # fmt: skip
    return module, {
        "hidden_states": randn(3, 14, 6),
        "encoder_hidden_states": randn(3, 9, 18),
        "timestep": torch.tensor([0.2, 0.5, 0.7]),
        "guidance": torch.full((3,), 4.0),
        "img_ids": position_ids(14, 4),
        "txt_ids": position_ids(9, 4),
    }


@model
def sd3():
    module = diffusers.SD3Transformer2DModel(
        sample_size=12, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=20, caption_projection_dim=32, pooled_projection_dim=28, pos_embed_max_size=10,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return module, {
        "hidden_states": randn(2, 4, 12, 10),
        "encoder_hidden_states": randn(2, 11, 20),
        "pooled_projections": randn(2, 28),
        "timestep": torch.tensor([400, 700]),
    }


@model
def sdxl_unet():
    module = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, transformer_layers_per_block=(1, 2),
        cross_attention_dim=20,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 12,
    )  # fmt: skip
    return module, {
        "sample": randn(3, 4, 16, 12),
        "timestep": torch.tensor([10, 500, 900]),
        "encoder_hidden_states": randn(3, 13, 20),
        "added_cond_kwargs": {"text_embeds": randn(3, 12), "time_ids": torch.arange(18.0).view(3, 6)},
    }


@model
def svd_unet():
    module = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=16, in_channels=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=20,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), num_attention_heads=(2, 4),
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=24, num_frames=3,
    )  # fmt: skip
    return module, {
        "sample": randn(2, 3, 8, 8, 6),
        "timestep": torch.tensor(100.0),
        "encoder_hidden_states": randn(2, 1, 20),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02], [7.0, 100.0, 0.1]]),
    }


@model
def wan():
    module = diffusers.WanTransformer3DModel(
        num_attention_heads=3, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=20, freq_dim=32,
        ffn_dim=40,
        num_layers=2, rope_max_seq_len=32, image_dim=14, added_kv_proj_dim=36,
    )  # fmt: skip
    return module, {
        "hidden_states": randn(2, 4, 2, 8, 6),
        "timestep": torch.tensor([300, 800]),
        "encoder_hidden_states": randn(
            2, 512, 20
        ),  # the model takes the last 512 for the prompt, the rest for the image
        "encoder_hidden_states_image": randn(2, 5, 14),
    }


@model
def hunyuan_video():
    module = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=14, num_layers=1, num_single_layers=2,
        num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 8),
    )  # fmt: skip
    return module, {
        "hidden_states": randn(3, 4, 2, 6, 8),
        "timestep": torch.tensor([10, 500, 900]),
        "encoder_hidden_states": randn(3, 9, 16),
        "encoder_attention_mask": mask_of([9, 4, 6], 9),
        "pooled_projections": randn(3, 8),
        "guidance": torch.full((3,), 6000.0),
    }


@model
def qwen_image():
    module = diffusers.QwenImageTransformer2DModel(
        in_channels=12, out_channels=3, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=20,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return module, {
        "hidden_states": randn(2, 143, 12),
        "encoder_hidden_states": randn(2, 9, 20),
        "encoder_hidden_states_mask": mask_of([9, 5], 9),
        "timestep": torch.tensor([0.4, 0.6]),
        "img_shapes": [[(1, 11, 13)], [(1, 11, 13)]],
    }


@model
def ltx_video():
    module = diffusers.LTXVideoTransformer3DModel(
        in_channels=6, out_channels=6, num_attention_heads=3, attention_head_dim=8, cross_attention_dim=24,
        num_layers=2,
        caption_channels=20,
    )  # fmt: skip
    return module, {
        "hidden_states": randn(2, 3 * 2 * 4, 6),
        "encoder_hidden_states": randn(2, 10, 20),
        "timestep": torch.tensor([[300], [700]]),
        "encoder_attention_mask": mask_of([6, 10], 10),
        "num_frames": 3,
        "height": 2,
        "width": 4,
        "rope_interpolation_scale": (0.3, 32.0, 32.0),
    }


@model
def cogvideox():
    module = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=10,
        text_embed_dim=18,
        num_layers=2, sample_width=8, sample_height=6, sample_frames=9, max_text_seq_length=7,
        use_rotary_positional_embeddings=True,
    )  # fmt: skip
    return module, {
        "hidden_states": randn(3, 2, 4, 6, 8),
        "encoder_hidden_states": randn(3, 7, 18),
        "timestep": torch.tensor([10, 500, 900]),
        "image_rotary_emb": rotary(2 * 3 * 4, 16),
    }


@model
def pixart():
    module = diffusers.PixArtTransformer2DModel(
        num_attention_heads=3, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, norm_num_groups=4,
        cross_attention_dim=24, sample_size=8, caption_channels=20, use_additional_conditions=False,
    )  # fmt: skip
    return module, {
        "hidden_states": randn(2, 4, 10, 8),
        "encoder_hidden_states": randn(2, 11, 20),
        "timestep": torch.tensor([300, 800]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "encoder_attention_mask": mask_of([11, 4], 11),
    }


@model
def sana():
    module = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=3, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=4,
        cross_attention_head_dim=6, cross_attention_dim=24, caption_channels=20, sample_size=8,
    )  # fmt: skip
    return module, {
        "hidden_states": randn(2, 4, 8, 7),
        "encoder_hidden_states": randn(2, 12, 20),
        "timestep": torch.tensor([300, 800]),
        "encoder_attention_mask": mask_of([5, 12], 12),
    }


@model
def z_image():
    # Two prompts of different padded lengths, so that a boolean mask is built; the model pads to multiples of 32.
    module = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=48, n_layers=2, n_refiner_layers=1, n_heads=3, n_kv_heads=3, cap_feat_dim=20,
        axes_dims=[4, 6, 6], axes_lens=[128, 32, 32],
    )  # fmt: skip
    torch.nn.init.normal_(module.x_pad_token)  # torch.empty until weights are loaded
    torch.nn.init.normal_(module.cap_pad_token)
    return module, {
        "x": [randn(4, 1, 8, 12), randn(4, 1, 12, 20)],
        "t": torch.tensor([0.3, 0.8]),
        "cap_feats": [randn(9, 20), randn(40, 20)],
    }


@model
def vae():
    module = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 24),
        layers_per_block=1, norm_num_groups=4, sample_size=16,
    )  # fmt: skip
    return module, {"sample": randn(2, 3, 16, 12)}


@model
def dit():
    module = diffusers.DiTTransformer2DModel(
        num_attention_heads=3, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2, norm_num_groups=2,
        sample_size=8, num_embeds_ada_norm=11,
    )  # fmt: skip
    return module, {
        "hidden_states": randn(5, 4, 8, 8),
        "timestep": torch.tensor([0, 3, 5, 7, 10]),
        "class_labels": torch.tensor([1, 4, 6, 8, 10]),
    }


@model
def aura_flow():
    module = diffusers.AuraFlowTransformer2DModel(
        sample_size=10, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=2, attention_head_dim=12,
        num_attention_heads=3, joint_attention_dim=20, caption_projection_dim=36, pos_embed_max_size=36,
    )  # fmt: skip
    return module, {
        "hidden_states": randn(2, 4, 10, 8),
        "encoder_hidden_states": randn(2, 9, 20),
        "timestep": torch.tensor([0.3, 0.8]),
    }


@model
def hunyuan_dit():
    module = diffusers.HunyuanDiT2DModel(
        num_attention_heads=3, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=10, hidden_size=24,
        num_layers=4,
        cross_attention_dim=14, cross_attention_dim_t5=16, pooled_projection_dim=12, text_len=5, text_len_t5=6,
        use_style_cond_and_image_meta_size=False,
    )  # fmt: skip
    return module, {
        "hidden_states": randn(2, 4, 10, 8),
        "timestep": torch.tensor([300.0, 800.0]),
        "encoder_hidden_states": randn(2, 5, 14),
        "text_embedding_mask": mask_of([5, 3], 5),
        "encoder_hidden_states_t5": randn(2, 6, 16),
        "text_embedding_mask_t5": mask_of([2, 6], 6),
        "image_rotary_emb": rotary(20, 8),
    }


@model
def lumina2():
    module = diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=48, num_layers=2, num_refiner_layers=1, num_attention_heads=4,
        num_kv_heads=2, multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(40, 16, 16), cap_feat_dim=20,
    )  # fmt: skip
    return module, {
        "hidden_states": randn(3, 4, 8, 10),
        "timestep": torch.tensor([0.1, 0.5, 0.9]),
        "encoder_hidden_states": randn(3, 9, 20),
        "encoder_attention_mask": mask_of([9, 4, 6], 9).bool(),
    }


@model
def mochi():
    module = diffusers.MochiTransformer3DModel(
        num_attention_heads=3, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=4,
        text_embed_dim=32, time_embed_dim=10, max_sequence_length=9,
    )  # fmt: skip
    return module, {
        "hidden_states": randn(2, 4, 2, 6, 8),
        "encoder_hidden_states": randn(2, 9, 32),
        "timestep": torch.tensor([300, 800]),
        "encoder_attention_mask": mask_of([9, 5], 9).bool(),
    }


@model
def allegro():
    module = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=2,
        cross_attention_dim=24,
        sample_width=8, sample_height=6, sample_frames=3, caption_channels=20,
    )  # fmt: skip
    grid = torch.cartesian_prod(torch.arange(3), torch.arange(3), torch.arange(4)).T[:, None].contiguous()
    seen = torch.ones(2, 3, 6, 8)
    seen[1, :, 4:] = 0  # the second video is less high
    return module, {
        "hidden_states": randn(2, 4, 3, 6, 8),
        "encoder_hidden_states": randn(2, 10, 20),
        "timestep": torch.tensor([300, 800]),
        "attention_mask": seen,
        "encoder_attention_mask": mask_of([10, 6], 10),
        "image_rotary_emb": ([rotary(length, 4) for length in (3, 3, 4)], list(grid)),
    }


@model
def chroma():
    module = diffusers.ChromaTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=20, axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=1,
    )  # fmt: skip
    return module, {
        "hidden_states": randn(3, 18, 4),
        "encoder_hidden_states": randn(3, 7, 20),
        "timestep": torch.tensor([0.3, 0.5, 0.9]),
        "img_ids": position_ids(18, 3),
        "txt_ids": torch.zeros(7, 3),
        "attention_mask": torch.cat([mask_of([7, 4, 5], 7), mask_of([18] * 3, 18)], dim=1).bool(),
    }


@model
def cogview4():
    module = diffusers.CogView4Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=3, text_embed_dim=20,
        time_embed_dim=12, condition_dim=4, pos_embed_max_size=8, sample_size=8, rope_axes_dim=(8, 8),
    )  # fmt: skip
    return module, {
        "hidden_states": randn(2, 4, 8, 10),
        "encoder_hidden_states": randn(2, 9, 20),
        "timestep": torch.tensor([300, 800]),
        "original_size": torch.tensor([[20, 20], [20, 30]]),
        "target_size": torch.tensor([[20, 20], [20, 30]]),
        "crop_coords": torch.tensor([[0, 0], [2, 3]]),
    }


@model
def stable_audio():
    module = diffusers.StableAudioDiTModel(
        sample_size=24, in_channels=3, out_channels=3, num_layers=2, attention_head_dim=10, num_attention_heads=4,
        num_key_value_attention_heads=2, cross_attention_dim=20, time_proj_dim=8, global_states_input_dim=14,
        cross_attention_input_dim=18,
    )  # fmt: skip
    return module, {
        "hidden_states": randn(2, 3, 24),
        "timestep": torch.tensor([0.3, 0.8]),
        "encoder_hidden_states": randn(2, 7, 18),
        "global_hidden_states": randn(2, 1, 14),
        "rotary_embedding": rotary(25, 4),
    }


@model
def latte():
    module = diffusers.LatteTransformer3DModel(
        num_attention_heads=3, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1,
        cross_attention_dim=24,
        attention_bias=True, sample_size=8, patch_size=2, activation_fn="gelu-approximate", num_embeds_ada_norm=20,
        norm_type="ada_norm_single", norm_elementwise_affine=False, caption_channels=20, video_length=3,
    )  # fmt: skip
    return module, {
        "hidden_states": randn(2, 4, 3, 8, 8),
        "timestep": torch.tensor([300, 800]),
        "encoder_hidden_states": randn(2, 10, 20),
    }


@model
def clip_text():
    config = transformers.CLIPTextConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
        projection_dim=16,
        max_position_embeddings=17, bos_token_id=0, eos_token_id=49, pad_token_id=1, attn_implementation="sdpa",
    )  # fmt: skip
    module = transformers.CLIPTextModel(config)
    return module, {"input_ids": torch.randint(2, 48, (4, 17)), "attention_mask": mask_of([17, 9, 5, 12], 17)}


@model
def qwen2():
    config = transformers.Qwen2Config(
        vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=160, attn_implementation="sdpa",
    )  # fmt: skip
    module = transformers.Qwen2Model(config)
    return module, {
        "input_ids": torch.randint(2, 48, (3, 135)),
        "attention_mask": mask_of([135, 9, 70], 135),
        "use_cache": False,
    }


@model
def t5_encoder():
    config = transformers.T5Config(
        vocab_size=50, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3, attn_implementation="sdpa",
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    module = transformers.T5EncoderModel(config)
    return module, {"input_ids": torch.randint(2, 48, (2, 141)), "attention_mask": mask_of([141, 9], 141)}


def small_flux():
    """The smallest of all, with weights that need no gradient; not one of the zoo."""
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=20, pooled_projection_dim=12, axes_dims_rope=(4, 4, 8),
    ).eval().requires_grad_(False)  # fmt: skip
    given = {
        "hidden_states": torch.randn(2, 15, 4), "encoder_hidden_states": torch.randn(2, 7, 20),
        "pooled_projections": torch.randn(2, 12), "timestep": torch.tensor([0.3, 0.9]),
        "img_ids": torch.zeros(15, 3), "txt_ids": torch.zeros(7, 3),
    }  # fmt: skip
    return model, given
