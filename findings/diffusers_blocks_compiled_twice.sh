#!/usr/bin/env bash
# Regional compilation should compile each class of block once. In several of diffusers' models the first block of a class gets a
# tensor that lies otherwise in memory than the next blocks get it, so Dynamo compiles the block a second time, with everything that
# hangs on it (autotuning, CUDA graphs): a part of a joined sequence (FLUX.1's and HunyuanVideo's single blocks get a `cat`, whose
# parts the first block slices and joins again; CogVideoX's blocks), or a patch embedding that was flattened and transposed (PixArt,
# Sana). Wan's model calls `.contiguous()` before its blocks for that reason, and is compiled once.
#
# Seen 2026-11-29 with diffusers 0.42.1, torch 2.13.0 (CPU), Python 3.11: blocks, compilations
#   FluxTransformerBlock 3 1
#   FluxSingleTransformerBlock 3 2
#   HunyuanVideoSingleTransformerBlock 3 2
#   CogVideoXBlock 3 2
#   BasicTransformerBlock (PixArt) 3 2
#   SanaTransformerBlock 3 2
#   WanTransformerBlock 3 1
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "numpy==2.2.6" "diffusers==0.42.1" 2>/dev/null
cat >"$folder/blocks.py" <<'PYTHON'
import diffusers
import torch

randn = torch.randn


def flux():
    model = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=3, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=20, pooled_projection_dim=12, axes_dims_rope=(4, 4, 8),
    )
    return model, dict(
        hidden_states=randn(1, 16, 4), encoder_hidden_states=randn(1, 7, 20), pooled_projections=randn(1, 12),
        timestep=torch.tensor([0.3]), img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(7, 3),
    )


def hunyuan():
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=3,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=False, text_embed_dim=20,
        pooled_projection_dim=12, rope_axes_dim=(4, 6, 6),
    )
    return model, dict(
        hidden_states=randn(1, 4, 2, 8, 8), timestep=torch.tensor([3.0]), encoder_hidden_states=randn(1, 7, 20),
        encoder_attention_mask=torch.ones(1, 7), pooled_projections=randn(1, 12),
    )


def cogvideox():
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=12,
        num_layers=3, sample_width=8, sample_height=8, sample_frames=5, max_text_seq_length=7,
    )
    return model, dict(
        hidden_states=randn(1, 2, 4, 8, 8), encoder_hidden_states=randn(1, 7, 12), timestep=torch.tensor([3])
    )


def pixart():
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=3, cross_attention_dim=32,
        sample_size=8, patch_size=2, caption_channels=20, use_additional_conditions=False,
    )
    return model, dict(
        hidden_states=randn(1, 4, 8, 8), encoder_hidden_states=randn(1, 7, 20), timestep=torch.tensor([3]),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )


def sana():
    model = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=3,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=20,
        sample_size=8, patch_size=1,
    )
    return model, dict(
        hidden_states=randn(1, 4, 8, 8), encoder_hidden_states=randn(1, 7, 20), timestep=torch.tensor([3])
    )


def wan():
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=20,
        freq_dim=16, ffn_dim=32, num_layers=3,
    )
    return model, dict(
        hidden_states=randn(1, 4, 2, 8, 8), timestep=torch.tensor([500]), encoder_hidden_states=randn(1, 7, 20)
    )


EXPECTED = {
    "FluxTransformerBlock": (3, 1), "FluxSingleTransformerBlock": (3, 2), "HunyuanVideoSingleTransformerBlock": (3, 2),
    "CogVideoXBlock": (3, 2), "BasicTransformerBlock": (3, 2), "SanaTransformerBlock": (3, 2), "WanTransformerBlock": (3, 1),
}
seen = {}
for build in (flux, hunyuan, cogvideox, pixart, sana, wan):
    torch.compiler.reset()
    torch.manual_seed(0)
    model, inputs = build()
    blocks, compiled, backends = {}, {}, {}

    def counting(name):
        def backend(graph, examples):
            compiled[name] = compiled.get(name, 0) + 1
            return graph

        return backend

    for module in model.children():
        for block in module if isinstance(module, torch.nn.ModuleList) else ():
            name = type(block).__name__
            if name in EXPECTED:
                blocks[name] = blocks.get(name, 0) + 1
                block.compile(backend=backends.setdefault(name, counting(name)))
    with torch.no_grad():
        model.eval()(**inputs)
    seen |= {name: (count, compiled[name]) for name, count in blocks.items()}
for name, counts in seen.items():
    print(name, *counts)
raise SystemExit(seen != EXPECTED)
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/blocks.py"
