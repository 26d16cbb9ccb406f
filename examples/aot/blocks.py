"""Compiles one AOTInductor package for each class of repeated block of a FLUX transformer. All blocks of the class share it,
also in models with other weights.

    python examples/aot/blocks.py [--out out/aot/blocks] [--backend _native_flash,native]

The model is small and its weights are random; nothing is downloaded.
"""

import argparse
import logging
import time
import warnings
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel

import attnrewrite


def build(seed):
    torch.manual_seed(seed)
    model = FluxTransformer2DModel(
        in_channels=4, num_layers=4, num_single_layers=8, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=20, pooled_projection_dim=12, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return model.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/aot/blocks"))
    parser.add_argument("--backend", default="_native_flash,native")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # diffusers' own
    logging.getLogger("diffusers").setLevel(logging.ERROR)

    inputs = {
        "hidden_states": torch.randn(2, 15, 4), "encoder_hidden_states": torch.randn(2, 7, 20),
        "pooled_projections": torch.randn(2, 12), "timestep": torch.tensor([0.3, 0.9]),
        "img_ids": torch.zeros(15, 3), "txt_ids": torch.zeros(7, 3), "return_dict": False,
    }  # fmt: skip
    started = time.perf_counter()
    packages = attnrewrite.aot_compile_blocks(build(0), arguments.out, (), inputs, backend=arguments.backend.split(","))
    print(f"compiled in {time.perf_counter() - started:.0f} s")
    for package in packages.values():
        print(f"{package} ({Path(package.path).stat().st_size >> 10} KiB)")
    with torch.no_grad():
        for seed in (0, 1):
            model = build(seed)
            expected = model(**inputs)[0]
            started = time.perf_counter()
            count = attnrewrite.load_blocks(model, arguments.out)
            took = time.perf_counter() - started
            difference = (model(**inputs)[0] - expected).abs().max().item()
            print(f"model {seed}: {count} blocks in {took:.2f} s, largest difference to eager {difference:.1e}")
            if difference > 1e-4:
                raise SystemExit("the outputs differ")


if __name__ == "__main__":
    main()
