"""Every kernel of this machine at the shapes that the table of "auto" (attnrewrite/preferences.py) is about. On a GPU.

    python bench/kernels_by_shape.py [--shapes FLUX.1 "Wan2.1 14B"] [--kernels native _flash_3 flash_4]
                                     [--json bench/results/kernels_by_shape_h200.json]

Shapes are those of published denoisers, and some at both sides of the table's limits. Tensors are random, bfloat16, and lie
in memory as models make them; of a key padding one key in 16 is hidden. Kernels are timed as `attnrewrite.tune` times them:
compiled with their padding and packing, by CUDA events behind a pause, in turn, the median. Errors are against float64. A
line a shape: `native`, the fastest exact kernel, what "auto" takes, what it takes where quantised kernels are allowed. "!"
marks a choice that is slower than `native` by more than 2 %. The file is a plan (`attnrewrite.Plan.load`); of one that is there
already the shapes that are not measured now stay, so that several runs make one file.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

import attnrewrite
from attnrewrite import AttentionCall, Mask, MaskKind, Numerics, Plan, Tuning, make_policy
from attnrewrite.example_tensors import example
from attnrewrite.measuring import Settings, measure_site
from attnrewrite.policies import candidates_of
from attnrewrite.selecting import usual_candidates

PADDING = "key padding"
# batch, heads, heads of keys, q_len, kv_len, head_dim, mask
SHAPES: dict[str, tuple[int, int, int, int, int, int, str | None]] = {
    "FLUX.1": (1, 24, 24, 4608, 4608, 128, None),
    "FLUX.1, batch 2": (2, 24, 24, 4608, 4608, 128, None),
    "1,024 tokens of 128": (2, 24, 24, 1024, 1024, 128, None),
    "2,048 tokens of 128": (2, 24, 24, 2048, 2048, 128, None),
    "4,096 tokens of 128, 12 heads": (1, 12, 12, 4096, 4096, 128, None),
    "16,384 tokens of 128": (1, 24, 24, 16384, 16384, 128, None),
    "Wan2.1 14B": (1, 40, 40, 32760, 32760, 128, None),
    "Wan2.1 1.3B": (1, 12, 12, 32760, 32760, 128, None),
    "Wan2.1 14B, cross": (1, 40, 40, 32760, 512, 128, None),
    "SD3.5-large": (2, 38, 38, 4429, 4429, 64, None),
    "SDXL, 4,096": (2, 10, 10, 4096, 4096, 64, None),
    "SDXL, 1,024": (2, 20, 20, 1024, 1024, 64, None),
    "SDXL, cross": (2, 10, 10, 4096, 77, 64, None),
    "LTX-Video": (2, 32, 32, 6144, 6144, 64, None),
    "CogVideoX": (2, 48, 48, 17776, 17776, 64, None),
    "16,384 tokens of 64": (1, 24, 24, 16384, 16384, 64, None),
    "Lumina-Image 2": (2, 24, 8, 4352, 4352, 96, None),
    "HunyuanVideo, padded": (1, 24, 24, 32896, 32896, 128, PADDING),
    "Qwen-Image, padded": (2, 24, 24, 7145, 7145, 128, PADDING),
    "4,096 tokens of 128, padded": (2, 24, 24, 4096, 4096, 128, PADDING),
    "16,384 tokens of 128, padded": (1, 24, 24, 16384, 16384, 128, PADDING),
    "6,144 tokens of 64, padded": (2, 32, 32, 6144, 6144, 64, PADDING),
    "Lumina-Image 2, padded": (2, 24, 8, 4352, 4352, 96, PADDING),
    "LTX-Video, cross, padded": (2, 32, 32, 6144, 128, 64, PADDING),
}


def call_of(name: str) -> AttentionCall:
    batch, heads, kv_heads, q_len, kv_len, head_dim, mask = SHAPES[name]
    padded = Mask(MaskKind.KEY_PADDING, "bool", (batch, 1, 1, kv_len)) if mask else Mask()
    return AttentionCall(
        name, batch, heads, kv_heads, q_len, kv_len, head_dim, head_dim, "bfloat16", "cuda", padded, layout="bshd",
        role="self" if q_len == kv_len else "cross",
    )  # fmt: skip


def line(site: attnrewrite.Site, machine: attnrewrite.Machine) -> str:
    timed = {each.name: each for each in site.measured if each.milliseconds is not None}
    native = timed["native"].milliseconds or 0.0
    exact = [each for each in timed.values() if attnrewrite.records_of(each.name)[0].numerics < Numerics.QUANTISED]
    best = min(exact, key=lambda each: each.milliseconds or 0.0)
    text = f"{site.name:30} native {native:8.3f} ms  best {best.name} {native / (best.milliseconds or 1):.2f}x"
    for numerics in ("reordered", "quantised"):
        (taken,) = attnrewrite.make_plan([site.call], make_policy(["auto"], numerics=numerics), [machine]).sites
        ratio = native / (timed[taken.chosen].milliseconds or 1) if taken.chosen in timed else float("nan")
        text += f"  auto{', quantised' if numerics == 'quantised' else ''}: {taken.chosen} {ratio:.2f}x"
        text += "" if ratio > 0.98 else " !"
    return text


def earlier(path: Path | None, machine: attnrewrite.Machine, names: list[str]) -> list[attnrewrite.Site]:
    """What the file has of other shapes."""
    if path is None or not path.exists():
        return []
    plan = Plan.load(path)
    if plan.tuning is None or plan.tuning.machines != (machine,):
        raise SystemExit(f"{path} is of {plan.tuning and plan.tuning.machines}: move it away, or name another file")
    return [site for site in plan.sites if site.name not in names and site.name in SHAPES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES), metavar="NAME")
    parser.add_argument("--kernels", nargs="+", metavar="NAME", help="these alone (all that are installed)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan there")
    options = parser.parse_args()
    machine = attnrewrite.machine_of(torch.device("cuda"))
    chosen = candidates_of(options.kernels, "--kernels") if options.kernels else usual_candidates()
    settings = Settings(chosen, Numerics.QUANTISED)
    sites = earlier(options.json, machine, options.shapes)
    started = time.perf_counter()
    for name in options.shapes:
        with torch.no_grad():
            call = call_of(name)
            site = measure_site(example(call, torch.device("cuda")), machine, settings)
        sites.append(replace(site, call=call))
        print(line(sites[-1], machine), flush=True)
        torch.cuda.empty_cache()
    sites.sort(key=lambda site: list(SHAPES).index(site.name))
    seconds = time.perf_counter() - started
    plan = Plan(
        tuple(sites),
        Tuning("bench/kernels_by_shape.py", (machine,), attnrewrite.__version__, "quantised", seconds=seconds),
    )
    print(f"\n{plan}")
    if options.json:
        plan.save(options.json)


if __name__ == "__main__":
    main()
