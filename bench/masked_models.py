"""Steps of denoisers whose prompts are padded: torch.compile, the peer's dispatcher and torch.compile, attnrewrite. On a GPU.

    python bench/masked_models.py [--models qwen_image ltx_video] [--rounds 20] [--json bench/results/masked_models_h200.json]

Variants of one model run in turn in one process, each round in another order; the peer's process-wide choice is set before
each step. ms: the median step by CUDA events. ratio: the median over rounds of (torch.compile / variant) in the same round.
error: |output - exact| / |exact|, where exact is the unchanged model in float32, uncompiled: that of torch.compile is the
rounding of bfloat16. A variant that raises is named with its error.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import denoisers
import diffusers
import torch

import attnrewrite
from attnrewrite.machines import machine_of

MODELS = ("hunyuan_video", "qwen_image", "ltx_video", "lumina2")
PLAIN = "torch.compile"
PEER = {"peer, _flash_3": "_flash_3", "peer, _flash_varlen_3": "_flash_varlen_3"}
# The choices for sites that a tensor masks, and for the others.
OURS = {
    "PyTorch alone": (["_native_varlen", "native"], ["native"]),
    "FA2": (["flash_varlen", "native"], ["flash", "native"]),
    "FA3": (["_flash_varlen_3", "native"], ["_flash_3", "native"]),
}


def variants(denoiser: denoisers.Denoiser) -> dict[str, Callable[[], torch.Tensor]]:
    plain = denoiser.compile("inductor")

    def of_the_peer(name: str, step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            denoiser.model.set_attention_backend(name)
            try:
                return step()
            finally:
                denoiser.model.set_attention_backend("native")

        return run

    steps = {PLAIN: plain}
    steps |= {name: of_the_peer(backend, denoiser.compile("inductor")) for name, backend in PEER.items()}
    for name, (masked, others) in OURS.items():
        steps[name] = denoiser.compile(attnrewrite.with_backend(*others, rules={"masked": masked}))
    return steps


def exact(denoiser: denoisers.Denoiser) -> torch.Tensor:
    wide = {
        name: value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value
        for name, value in denoiser.inputs.items()
    }
    output: torch.Tensor = copy.deepcopy(denoiser.model).float()(**wide, return_dict=False)[0]
    return output


def milliseconds(step: Callable[[], torch.Tensor]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def measure(name: str, rounds: int) -> dict[str, Any]:
    torch.compiler.reset()
    denoiser = getattr(denoisers, name)()
    print(f"\n{denoiser.about}", flush=True)
    reference = exact(denoiser)
    steps, errors, failed = variants(denoiser), {}, {}
    for variant, step in list(steps.items()):
        try:
            for _ in range(3):
                output = step()
            errors[variant] = ((output.float() - reference).norm() / reference.norm()).item()
        except Exception as error:  # a variant that cannot run is a result
            failed[variant] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
            del steps[variant]
    times: dict[str, list[float]] = {variant: [] for variant in steps}
    order = list(steps)
    for _ in range(rounds):
        random.shuffle(order)
        for variant in order:
            times[variant].append(milliseconds(steps[variant]))
    rows = {}
    for variant in steps:
        ratios = [one / other for one, other in zip(times[PLAIN], times[variant], strict=True)]
        rows[variant] = {
            "ms": statistics.median(times[variant]),
            "ratio": statistics.median(ratios),
            "error": errors[variant],
        }
        print("{:24} {ms:8.2f} ms  ratio {ratio:5.3f}  error {error:.1e}".format(variant, **rows[variant]), flush=True)
    for variant, words in failed.items():
        print(f"{variant:24} {words}", flush=True)
    return {"about": denoiser.about, "variants": rows, "failed": failed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64  # all variants share the code of a block
    random.seed(0)
    machine = machine_of(torch.device("cuda"))
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "packages": {**machine.packages, "diffusers": diffusers.__version__},
        "rounds": options.rounds,
        "models": {},
    }
    with torch.no_grad():
        for name in options.models:
            result["models"][name] = measure(name, options.rounds)
            torch.cuda.empty_cache()
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
