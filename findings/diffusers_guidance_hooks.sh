#!/usr/bin/env bash
# diffusers' guidance by hooks (skip layer, perturbed attention and auto guidance: `apply_layer_skip`; smoothed energy guidance) looks
# up attention modules by class and processors in a registry. Both were left behind when models got attention classes of their own:
# with `skip_attention_scores=True`, as perturbed attention guidance sets it, FLUX.1's FluxAttention has no `is_cross_attention`,
# and Wan's WanAttnProcessor is not registered (its deprecated subclass WanAttnProcessor2_0 is, which no model creates). Smoothed
# energy guidance works for Wan and not for FLUX.1. The registry itself lists both models.
#
# Seen 2026-11-29 with diffusers 0.42.1, torch 2.13.0 (CPU), Python 3.11:
#   registered: AttnProcessor2_0 CogView4AttnProcessor FluxAttnProcessor HunyuanImageAttnProcessor QwenDoubleStreamAttnProcessor2_0
#               WanAttnProcessor2_0 ZSingleStreamAttnProcessor
#   flux, attention scores skipped: AttributeError: 'FluxAttention' object has no attribute 'is_cross_attention'
#   wan, attention scores skipped: ValueError: Model class <...WanAttnProcessor> not registered.
#   flux, queries blurred: AttributeError: 'FluxAttention' object has no attribute 'is_cross_attention'
#   wan, queries blurred: runs
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "numpy==2.2.6" "diffusers==0.42.1" 2>/dev/null
cat >"$folder/guidance.py" <<'PYTHON'
import diffusers
import torch
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.hooks.smoothed_energy_guidance_utils import (
    SmoothedEnergyGuidanceConfig,
    _apply_smoothed_energy_guidance_hook,
)


def flux():
    model = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=20, pooled_projection_dim=12, axes_dims_rope=(4, 4, 8),
    )
    inputs = dict(
        hidden_states=torch.randn(1, 16, 4), encoder_hidden_states=torch.randn(1, 7, 20),
        pooled_projections=torch.randn(1, 12), timestep=torch.tensor([0.3]), img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(7, 3),
    )
    return model, inputs, "transformer_blocks"


def wan():
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
    )
    inputs = dict(
        hidden_states=torch.randn(1, 4, 2, 8, 8), timestep=torch.tensor([500]),
        encoder_hidden_states=torch.randn(1, 7, 16),
    )
    return model, inputs, "blocks"


def skipped(model, blocks):
    apply_layer_skip(model, LayerSkipConfig(
        indices=[0], fqn=blocks, skip_attention=False, skip_attention_scores=True, skip_ff=False
    ))


def blurred(model, blocks):
    config = SmoothedEnergyGuidanceConfig(indices=[0], fqn=blocks)
    _apply_smoothed_energy_guidance_hook(model, config, blur_sigma=1.0)


for hook, name in ((skipped, "attention scores skipped"), (blurred, "queries blurred")):
    for build in (flux, wan):
        model, inputs, blocks = build()
        try:
            hook(model, blocks)
            with torch.no_grad():
                model(**inputs)
            said = "runs"
        except (AttributeError, ValueError) as error:
            said = f"{type(error).__name__}: {error}"
        print(f"{build.__name__}, {name}: {said}")
print("registered:", *sorted(each.__name__ for each in AttentionProcessorRegistry._registry))
PYTHON
said=$("$folder/venv/bin/python" -W ignore "$folder/guidance.py")
echo "$said"
missing="AttributeError: 'FluxAttention' object has no attribute 'is_cross_attention'"
grep -q "^flux, attention scores skipped: $missing" <<<"$said"
grep -q "^wan, attention scores skipped: ValueError: Model class .*WanAttnProcessor'> not registered" <<<"$said"
grep -q "^flux, queries blurred: $missing" <<<"$said"
grep -q "^wan, queries blurred: runs" <<<"$said"
grep -q "^registered: .*FluxAttnProcessor .*WanAttnProcessor2_0 " <<<"$said"
