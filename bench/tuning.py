"""Measures the time of `attnrewrite.tune` for a denoiser at its published depth: HunyuanVideo, 20 + 40 blocks, 32,896 tokens.

    python bench/tuning.py --json bench/results/tuning_h100.json      # a GPU with 40 GiB
    python bench/tuning.py --small                                    # on a CPU: as many blocks, but tiny

step      seconds of one uncompiled step, which `tune` needs at least, since it runs the model
tune      seconds of `attnrewrite.tune`, and the part spent on sites: compiling, timing and comparing kernels
sites     the number of sites in the plan, and of sites that were measured: equal sites are measured once
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections import Counter
from pathlib import Path

import torch

from attnrewrite.commands.bench.denoiser import Place
from attnrewrite.commands.bench.denoisers import MODELS
from attnrewrite.entrances.tuning import read_search, search_model
from attnrewrite.measuring.measure_site import measure_alike
from attnrewrite.planning.registry import separate
from attnrewrite.planning.this_machine import machine_of

BLOCKS = {"num_layers": 20, "num_single_layers": 40}


def denoiser(small):
    """HunyuanVideo at its published depth, with the inputs of `attnrewrite bench`."""
    device = torch.device("cpu" if small else "cuda")
    place = Place(device, torch.float32 if small else torch.bfloat16, small)
    made = MODELS["hunyuan"](place)
    made.model = place.built("HunyuanVideoTransformer3DModel", **{**made.model.config, **BLOCKS})
    return made, device


def seconds(function, device):
    started = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--candidates", metavar="A,B", help="kernels to try (default: all except the kernels hub's)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # diffusers' own
    made, device = denoiser(options.small)
    of_sites = []

    def measured(*args):
        took, site = seconds(lambda: measure_alike(*args), device)
        of_sites.append(took)
        return site

    with torch.no_grad():
        made.step()  # warm-up
        step, _ = seconds(made.step, device)
        candidates = options.candidates and separate(options.candidates)
        search = read_search(made.model, candidates)
        given = {**made.inputs, "return_dict": False}
        took, plan = seconds(lambda: search_model(made.model, [((), given)], search, measured), device)
    result = {
        "machine": machine_of(device).to_dict(), "model": "HunyuanVideo", **BLOCKS, "step_s": step, "tune_s": took,
        "sites": len(plan.sites), "measured": len(of_sites), "measured_s": of_sites,
        "chosen": dict(Counter(site.chosen for site in plan.sites)),
    }  # fmt: skip
    print(f"{machine_of(device)}\nHunyuanVideo, {sum(BLOCKS.values())} blocks; a step: {step:.2f} s, uncompiled")
    print(
        f"tune: {took:.1f} s, of which {sum(of_sites):.1f} s for {len(of_sites)} of {len(plan.sites)} sites; "
        f"chosen: {result['chosen']}"
    )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
