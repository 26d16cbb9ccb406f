"""Models whose attention is spelled out in tensor operations: of diffusers and transformers, and two well-known modules.

`MODELS` has a builder for each: a module in eval mode, its arguments, and what its attention calls are:
(batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim) for each site.
"""

import math

import torch
import transformers
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor,
    AttnProcessor,
    IPAdapterAttnProcessor,
    SlicedAttnProcessor,
)
from diffusers.models.autoencoders.autoencoder_kl_ltx2_audio import LTX2AudioAttnBlock
from diffusers.models.embeddings import AttentionPooling
from diffusers.models.unets.unet_1d_blocks import SelfAttention1d
from torch import nn

MODELS = {}


def model(build):
    def seeded():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(len(build.__name__))
            module, arguments, calls = build()
            for name, parameter in module.named_parameters():  # so that attention matters
                if parameter.dim() == 2 and any(
                    part in name for part in ("to_q", "to_k", "q_proj", "qkv", ".q.", "query")
                ):
                    parameter.data.mul_(3)
        return module.eval(), arguments, calls

    MODELS[build.__name__] = seeded
    return build


class First(nn.Module):
    """Wraps a model of transformers: takes its inputs by position and returns its first output."""

    def __init__(self, inner, *names, **fixed):
        super().__init__()
        self.inner, self.names, self.fixed = inner, names, fixed

    def forward(self, *tensors):
        return self.inner(**dict(zip(self.names, tensors, strict=True)), **self.fixed, return_dict=False)[0]


@model
def attn_processor():
    return (
        Attention(24, heads=3, dim_head=8, processor=AttnProcessor()),
        (torch.randn(2, 7, 24),),
        [(2, 3, 3, 7, 7, 8, 8)],
    )


@model
def attn_processor_cross_with_mask():
    module = Attention(24, heads=3, dim_head=8, cross_attention_dim=20, processor=AttnProcessor())
    return module, (torch.randn(2, 7, 24), torch.randn(2, 11, 20), torch.randn(2, 1, 11)), [(2, 3, 3, 7, 11, 8, 8)]


@model
def attn_added_kv_processor():
    module = Attention(
        24, heads=3, dim_head=8, added_kv_proj_dim=20, norm_num_groups=4, bias=True, processor=AttnAddedKVProcessor()
    )
    return module, (torch.randn(2, 24, 7, 2), torch.randn(2, 5, 20)), [(2, 3, 3, 14, 19, 8, 8)]


@model
def sliced_attn_processor():
    module = Attention(24, heads=3, dim_head=8, cross_attention_dim=20, processor=SlicedAttnProcessor(2))
    arguments = (torch.randn(2, 7, 24), torch.randn(2, 11, 20), torch.randn(2, 1, 11))
    return module, arguments, [(2, 1, 1, 7, 11, 8, 8)] * 3


@model
def ip_adapter_attn_processor():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Attention(24, heads=3, dim_head=8, cross_attention_dim=20)
            self.attention.set_processor(IPAdapterAttnProcessor(24, 20, num_tokens=(4,), scale=0.7))

        def forward(self, x, text, image):
            return self.attention(x, (text, [image]))

    arguments = (torch.randn(2, 7, 24), torch.randn(2, 11, 20), torch.randn(2, 1, 4, 20))
    return Adapted(), arguments, [(2, 3, 3, 7, 11, 8, 8), (2, 3, 3, 7, 4, 8, 8)]


@model
def self_attention_1d():
    return SelfAttention1d(24, 3), (torch.randn(2, 24, 7),), [(2, 3, 3, 7, 7, 8, 8)]


@model
def attention_pooling():
    return AttentionPooling(3, 24), (torch.randn(2, 7, 24),), [(2, 3, 3, 1, 8, 8, 8)]


@model
def ltx2_audio_vae():
    return LTX2AudioAttnBlock(32), (torch.randn(2, 32, 3, 5),), [(2, 1, 1, 15, 15, 32, 32)]


def quiet(config):
    config._attn_implementation = "eager"
    return config


IDS = torch.tensor([[5, 9, 33, 12, 7, 41, 3], [8, 6, 22, 45, 3, 3, 3]])
PADDING = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])


@model
def clip_text():
    config = transformers.CLIPTextConfig(
        hidden_size=24, intermediate_size=16, num_hidden_layers=2, num_attention_heads=3, vocab_size=50,
        bos_token_id=1, eos_token_id=3, pad_token_id=3,
    )  # fmt: skip
    module = First(transformers.CLIPTextModel(quiet(config)), "input_ids", "attention_mask")
    return module, (IDS, PADDING), [(2, 3, 3, 7, 7, 8, 8)] * 2


@model
def clip_vision():
    config = transformers.CLIPVisionConfig(
        hidden_size=24, intermediate_size=16, num_hidden_layers=2, num_attention_heads=3, image_size=8, patch_size=4
    )
    module = First(transformers.CLIPVisionModel(quiet(config)), "pixel_values")
    return module, (torch.randn(2, 3, 8, 8),), [(2, 3, 3, 5, 5, 8, 8)] * 2


@model
def t5_encoder():
    config = transformers.T5Config(d_model=24, d_kv=8, d_ff=16, num_layers=2, num_heads=3, vocab_size=50)
    module = First(transformers.T5EncoderModel(quiet(config)), "input_ids", "attention_mask")
    return module, (IDS, PADDING), [(2, 3, 3, 7, 7, 8, 8)] * 2


@model
def t5_encoder_decoder():
    config = transformers.T5Config(d_model=24, d_kv=8, d_ff=16, num_layers=1, num_heads=3, vocab_size=50)
    module = First(
        transformers.T5Model(quiet(config)), "input_ids", "attention_mask", "decoder_input_ids", use_cache=False
    )
    own = [(2, 3, 3, 7, 7, 8, 8), (2, 3, 3, 4, 4, 8, 8), (2, 3, 3, 4, 7, 8, 8)]
    return module, (IDS, PADDING, IDS[:, :4]), own


@model
def qwen2():
    config = transformers.Qwen2Config(
        hidden_size=48, intermediate_size=16, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=50, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    module = First(transformers.Qwen2Model(quiet(config)), "input_ids", "attention_mask", use_cache=False)
    return module, (IDS, PADDING), [(2, 6, 2, 7, 7, 8, 8)] * 2


class CrossAttention(nn.Module):
    """As in latent diffusion's UNet: heads folded into the batch by rearrange, einsum, a mask of -finfo.max."""

    def __init__(self, width, context, heads, dim):
        super().__init__()
        self.scale, self.heads = dim**-0.5, heads
        self.to_q = nn.Linear(width, heads * dim, bias=False)
        self.to_k = nn.Linear(context, heads * dim, bias=False)
        self.to_v = nn.Linear(context, heads * dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * dim, width), nn.Dropout(0.1))

    def forward(self, x, context, mask=None):
        heads = self.heads

        def folded(tensor):  # rearrange(tensor, "b n (h d) -> (b h) n d", h=heads)
            batch, length, width = tensor.shape
            split = tensor.reshape(batch, length, heads, width // heads).permute(0, 2, 1, 3)
            return split.reshape(batch * heads, length, width // heads)

        query, key, value = folded(self.to_q(x)), folded(self.to_k(context)), folded(self.to_v(context))
        scores = torch.einsum("b i d, b j d -> b i j", query, key) * self.scale
        if mask is not None:
            mask = mask.reshape(mask.shape[0], -1)  # rearrange(mask, "b ... -> b (...)")
            mask = mask[:, None, :].expand(-1, heads, -1).reshape(-1, 1, mask.shape[-1])  # repeat "b j -> (b h) () j"
            scores.masked_fill_(~mask, -torch.finfo(scores.dtype).max)
        weights = scores.softmax(dim=-1)
        output = torch.einsum("b i j, b j d -> b i d", weights, value)
        length, dim = output.shape[1:]
        output = output.reshape(-1, heads, length, dim).permute(0, 2, 1, 3).reshape(-1, length, heads * dim)
        return self.to_out(output)


@model
def compvis_cross_attention():
    return CrossAttention(24, 20, 3, 8), (torch.randn(2, 7, 24), torch.randn(2, 11, 20)), [(2, 3, 3, 7, 11, 8, 8)]


@model
def compvis_cross_attention_with_mask():
    mask = torch.rand(2, 11) > 0.3
    arguments = (torch.randn(2, 7, 24), torch.randn(2, 11, 20), mask)
    return CrossAttention(24, 20, 3, 8), arguments, [(2, 3, 3, 7, 11, 8, 8)]


class VisionAttention(nn.Module):
    """As in timm, without its fused call."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop = nn.Dropout(0.1)

    def forward(self, x):
        batch, length, dim = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        query = query * self.scale
        weights = self.attn_drop((query @ key.transpose(-2, -1)).softmax(dim=-1))
        return self.proj((weights @ value).transpose(1, 2).reshape(batch, length, dim))


@model
def timm_attention():
    return VisionAttention(24, 3), (torch.randn(2, 7, 24),), [(2, 3, 3, 7, 7, 8, 8)]


class GroupedAttention(nn.Module):
    """Grouped queries by repeat_interleave of key and value; half of the scale on query and key; output as v @ weights.T."""

    def __init__(self, dim=24, heads=6, kv_heads=2):
        super().__init__()
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim // heads
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, kv_heads * self.dim)
        self.value = nn.Linear(dim, kv_heads * 2 * self.dim)

    def forward(self, x):
        batch, length, _ = x.shape
        half = self.dim**-0.25
        query = self.query(x).view(batch, length, self.heads, -1).transpose(1, 2) * half
        key = self.key(x).view(batch, length, self.kv_heads, -1).transpose(1, 2) * half
        value = self.value(x).view(batch, length, self.kv_heads, -1).permute(0, 2, 3, 1)
        key, value = (each.repeat_interleave(self.heads // self.kv_heads, dim=1) for each in (key, value))
        weights = torch.softmax(query @ key.mT, -1)
        return (value @ weights.mT).flatten(1, 2) / math.pi


@model
def grouped_attention():
    return GroupedAttention(), (torch.randn(2, 7, 24),), [(2, 6, 2, 7, 7, 4, 8)]
