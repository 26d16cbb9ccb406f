"""Hand-written attention (matmul and softmax), swapped and unswapped, on the CPU: seconds and peak memory.

    python bench/handwritten.py [--rounds 5] [--backend _native_flash] [--json FILE]

The model is the transformer block of SD 1.5's UNet at 64 x 64 latents (4,096 tokens, 8 heads of 40, a prompt of 77 tokens). Its
attention is diffusers' `AttnProcessor`: baddbmm, softmax, bmm. Inductor compiles it twice, in float32 with batch 1: "swapped"
with `with_backend(...)`, "unswapped" without. Both run in turn in one process.

ratio    the median over rounds of unswapped / swapped
peak     the growth of the process's largest resident size during a step, each variant in a process of its own
scores   the size of a tensor of all scores
error    |output - exact| / |exact|, where exact is computed in float64, uncompiled
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from step_ratio import processor

import attnrewrite

HEADS, DIM, SIDE, TEXT = 8, 40, 64, 77
SCORES = HEADS * SIDE**4 * 4 / 2**20


def block() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    module = Transformer2DModel(HEADS, DIM, in_channels=HEADS * DIM, cross_attention_dim=768).eval()
    for child in module.modules():
        if hasattr(child, "set_processor"):
            child.set_processor(AttnProcessor())
    return module, {
        "hidden_states": torch.randn(1, HEADS * DIM, SIDE, SIDE),
        "encoder_hidden_states": torch.randn(1, TEXT, 768),
    }


def compiled(backend: str | None) -> tuple[Callable[[], torch.Tensor], attnrewrite.AttentionCompiler | None]:
    module, inputs = block()
    chosen = attnrewrite.with_backend(backend) if backend else None

    def step(**given: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = module(**given, return_dict=False)[0]
        return output

    # Dynamo keeps compiled code by code object, so each variant gets a code object of its own.
    step.__code__ = step.__code__.replace(co_name=f"step_{backend}")
    run = torch.compile(step, backend=chosen or "inductor", fullgraph=True)
    return lambda: run(**inputs), chosen


def resident() -> float:
    """The process's largest resident size so far, in MiB (Linux only; getrusage's ru_maxrss starts at the parent's value)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def peak(backend: str | None) -> float:
    """Returns the MiB by which a step raises the largest resident size of this process."""
    run, _ = compiled(backend)
    module, inputs = block()
    small = {**inputs, "hidden_states": inputs["hidden_states"][..., :8, :8]}
    module(**small)  # libraries allocate memory at their first call
    before = resident()
    run()
    return resident() - before


def in_a_process(backend: str | None) -> float:
    """Runs `peak` in two processes, one after the other. Returns the second value: Inductor's cache is warm then, so that
    compiling allocates little."""
    for _ in range(2):
        command = [sys.executable, __file__, "--peak", backend or "unswapped"]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backend", default="_native_flash")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE too")
    parser.add_argument("--peak", metavar="VARIANT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with torch.no_grad():
        if options.peak:
            print(peak(None if options.peak == "unswapped" else options.peak))
            return
        module, inputs = block()
        exact = copy.deepcopy(module).double()(**{name: value.double() for name, value in inputs.items()})[0]
        steps = {"unswapped": compiled(None)[0]}
        steps["swapped"], chosen = compiled(options.backend)
        errors = {name: ((step() - exact).norm() / exact.norm()).item() for name, step in steps.items()}
        assert chosen is not None
        print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; {len(chosen.report.sites)} sites:")
        print(chosen.report)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(options.rounds):
            for name in list(steps)[:: 1 if turn % 2 else -1]:
                started = time.perf_counter()
                steps[name]()
                times[name].append(time.perf_counter() - started)
    peaks = {"unswapped": in_a_process(None), "swapped": in_a_process(options.backend)}
    ratios = [one / other for one, other in zip(times["unswapped"], times["swapped"], strict=True)]
    result = {
        "cpu": processor(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "backend": options.backend,
        "ratio": statistics.median(ratios),
        "scores_mib": SCORES,
        "variants": {
            name: {"seconds": statistics.median(times[name]), "peak_mib": peaks[name], "error": errors[name]}
            for name in steps
        },
    }
    for name in steps:
        print(
            "{:10} {seconds:7.3f} s  peak {peak_mib:6.0f} MiB  error {error:.1e}".format(
                name, **result["variants"][name]
            )
        )  # type: ignore[index]
    saved = peaks["unswapped"] - peaks["swapped"]
    print(f"ratio {result['ratio']:.2f}; peak lower by {saved:.0f} MiB, the scores take {SCORES:.0f} MiB")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
