#!/usr/bin/env bash
# diffusers' video UNet and video decoder make the parameter `mix_factor` of each temporal block by `torch.Tensor([...])`, and this
# constructor does not know the default device. A model that is built under `with torch.device("cuda")` (or "meta", or behind
# `torch.set_default_device`) therefore has 12 of 424 parameters on the CPU, and the first step ends with an error about two devices.
# `model.to(device)` behind the constructor mends it. Other classes (FLUX.1, Wan) are on the device as a whole.
#
# Seen 2026-11-29 with diffusers 0.42.1, torch 2.13.0 (CPU), Python 3.11:
#   FluxTransformer2DModel: 0 of 62 parameters are not on meta
#   UNetSpatioTemporalConditionModel: 12 of 424 parameters are not on meta: mix_factor
#   AutoencoderKLTemporalDecoder: 5 of 161 parameters are not on meta: mix_factor
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "numpy==2.2.6" "diffusers==0.42.1" 2>/dev/null
cat >"$folder/devices.py" <<'PYTHON'
import diffusers
import torch

down, up = "CrossAttnDownBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"
MODELS = {
    "FluxTransformer2DModel": dict(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=20, pooled_projection_dim=12, axes_dims_rope=(4, 4, 8),
    ),
    "UNetSpatioTemporalConditionModel": dict(
        block_out_channels=(32, 64), num_attention_heads=(2, 4), down_block_types=(down, "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", up), cross_attention_dim=20, layers_per_block=1,
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=24, num_frames=3,
    ),
    "AutoencoderKLTemporalDecoder": dict(block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2),
}
apart = {}
for name, sizes in MODELS.items():
    with torch.device("meta"):
        model = getattr(diffusers, name)(**sizes)
    elsewhere = [path for path, each in model.named_parameters() if each.device.type != "meta"]
    apart[name] = {path.rsplit(".", 1)[-1] for path in elsewhere}
    said = f": {', '.join(sorted(apart[name]))}" if elsewhere else ""
    print(f"{name}: {len(elsewhere)} of {len(list(model.parameters()))} parameters are not on meta{said}")
raise SystemExit(list(apart.values()) != [set(), {"mix_factor"}, {"mix_factor"}])
PYTHON
"$folder/venv/bin/python" "$folder/devices.py" 2>/dev/null
