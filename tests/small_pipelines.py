"""A pipeline of diffusers' own classes with small sizes and random weights, saved as `from_pretrained` reads it."""

import string

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

LETTERS = string.ascii_lowercase


def save_stable_diffusion_3(folder):
    """Stable Diffusion 3.5: two CLIP encoders, T5, two joint blocks with two heads of 16, a VAE. Prompts are letters."""
    torch.manual_seed(0)
    spelled = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    clip_tokens = CLIPTokenizer(
        vocab={token: index for index, token in enumerate(spelled)}, merges=[], model_max_length=77
    )
    clip = CLIPTextConfig(
        vocab_size=len(spelled), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        projection_dim=16, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    t5 = T5Config(vocab_size=len(pieces), d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32,
        qk_norm="rms_norm",
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, shift_factor=0.1, scaling_factor=1.5,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(clip),
        tokenizer=clip_tokens,
        text_encoder_2=CLIPTextModelWithProjection(clip),
        tokenizer_2=clip_tokens,
        text_encoder_3=T5EncoderModel(t5),
        tokenizer_3=T5TokenizerFast(vocab=pieces, extra_ids=0),
    )
    pipe.save_pretrained(folder)
