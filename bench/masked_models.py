"""Measures steps of denoisers with padded prompts: torch.compile, diffusers' dispatcher, attnrewrite. Needs a GPU.

    python bench/masked_models.py [--models qwen-image ltx] [--rounds 20] [--json bench/results/masked_models_h200.json]

Like `attnrewrite bench --models`, with the same models, timing and errors (attnrewrite/commands/bench/model_level.py), but with
named kernels instead of chosen ones. Each attnrewrite variant has one list of kernels for sites with a mask tensor, and one for
all other sites.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import attnrewrite
from attnrewrite.commands.bench import results
from attnrewrite.commands.bench.denoiser import Place
from attnrewrite.commands.bench.denoisers import MODELS
from attnrewrite.commands.bench.model_level import measure
from attnrewrite.commands.bench.variants import PEER, PLAIN, Variant

PADDED = ("hunyuan", "qwen-image", "ltx", "lumina2")
PEERS = ("_flash_3", "_flash_varlen_3")
OURS = {
    "PyTorch alone": (["_native_varlen", "native"], ["native"]),
    "FA2": (["flash_varlen", "native"], ["flash", "native"]),
    "FA3": (["_flash_3", "native"], ["_flash_3", "native"]),
    "FA3, variable length": (["_flash_varlen_3", "native"], ["_flash_3", "native"]),
    "FA4": (["flash_4", "native"], ["flash_4", "native"]),
}


def variants() -> list[Variant]:
    def ours(masked: list[str], others: list[str]) -> attnrewrite.AttentionCompiler:
        return attnrewrite.with_backend(*others, rules={"masked": masked})

    return [
        Variant(PLAIN, lambda _: "inductor"),
        *(Variant(f"{PEER}{name}", lambda _: "inductor", peer=name) for name in PEERS),
        *(Variant(name, lambda _, choices=choices: ours(*choices)) for name, choices in OURS.items()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=PADDED, choices=PADDED)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE too")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench/masked_models.py needs a CUDA GPU: published token counts take hours on a CPU")
    device = torch.device("cuda")
    result = {**results.header(device), "rounds": options.rounds, "models": {}}
    for name in options.models:
        result["models"][name] = measure(MODELS[name](Place(device, torch.bfloat16)), variants(), options.rounds)
        torch.cuda.empty_cache()
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
