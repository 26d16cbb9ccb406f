"""Hand-written attention (matmul and softmax), swapped and unswapped, on the CPU: seconds and peak memory.

    python bench/handwritten.py [--model sd15 ...] [--rounds 5] [--backend _native_flash] [--json FILE]
    OMP_NUM_THREADS=1 python bench/handwritten.py --model swin_v2 xcit mvit_v2 --backend auto --rounds 15

`MODELS` says what is compiled. All but the first need timm. Weights are random, as drawn; all is float32. Inductor compiles a
model twice, as one graph: "swapped" with `with_backend(...)`, "unswapped" without. Both run in turn in one process. (Inductor
takes a minute or two for each of the last three: two of them have fewer blocks.)

ratio    the median over rounds of unswapped / swapped
peak     the growth of the process's largest resident size during a step, each variant in a process of its own
scores   the size of the scores of the largest attention
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
from typing import Any

import torch
from torchvision_operators import import_torchvision

import attnrewrite

HEADS, DIM, SIDE, TEXT = 8, 40, 64, 77
Model = tuple[torch.nn.Module, dict[str, torch.Tensor]]


def sd15() -> Model:
    from diffusers.models.attention_processor import AttnProcessor
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    module = Transformer2DModel(HEADS, DIM, in_channels=HEADS * DIM, cross_attention_dim=768)
    for child in module.modules():
        if hasattr(child, "set_processor"):
            child.set_processor(AttnProcessor())
    return module, {
        "hidden_states": torch.randn(1, HEADS * DIM, SIDE, SIDE),
        "encoder_hidden_states": torch.randn(1, TEXT, 768),
    }


def swin_v2_window() -> Model:
    from timm.models.swin_transformer_v2 import WindowAttention

    return WindowAttention(96, (16, 16), 3), {"x": torch.randn(64, 256, 96)}


def xcit_channels() -> Model:
    from timm.models.xcit import XCA

    return XCA(192, num_heads=4, qkv_bias=True), {"x": torch.randn(4, 196, 192)}


def images(name: str, count: int, side: int, **blocks: Any) -> Callable[[], Model]:
    def build() -> Model:
        import timm

        module = timm.create_model(name, **blocks)
        for parameter in module.parameters():  # Swin V2 begins with blocks that add nothing
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, 1.0, 0.1)
        return module, {"x": torch.randn(count, 3, side, side)}

    return build


# By name: what is compiled, in words for the record, and the function that builds it.
MODELS: dict[str, tuple[str, Callable[[], Model]]] = {
    "sd15": (
        "the transformer block of SD 1.5's UNet at 64 x 64 latents (4,096 tokens, 8 heads of 40, a prompt of 77 tokens) with "
        "diffusers' AttnProcessor: baddbmm, softmax, bmm",
        sd15,
    ),
    "swin_v2_window": (
        "one window attention of Swin V2 (timm): 64 windows of 16 x 16 tokens, 3 heads of 32, a learned temperature and a bias",
        swin_v2_window,
    ),
    "xcit_channels": (
        "one attention of XCiT (timm): 4 images of 196 tokens, 4 heads of 48 channels, which attend to each other: 48 queries "
        "and keys, 196 wide, a learned temperature",
        xcit_channels,
    ),
    "swin_v2": (
        "timm's swinv2_tiny_window16_256 with 8 of its 12 blocks, two images: windows, a learned temperature, a bias",
        images("swinv2_tiny_window16_256", 2, 256, depths=(2, 2, 2, 2)),
    ),
    "xcit": (
        "timm's xcit_tiny_12_p16_224 with 3 of its 12 blocks and both blocks of class attention, four images",
        images("xcit_tiny_12_p16_224", 4, 224, depth=3),
    ),
    "mvit_v2": (
        "timm's mvitv2_tiny, two images: a bias that is written into a part of the scores",
        images("mvitv2_tiny", 2, 224),
    ),
}


def built(model: str) -> Model:
    import_torchvision()  # timm does and, through transformers, diffusers
    torch.manual_seed(0)
    module, inputs = MODELS[model][1]()
    return module.eval(), inputs


def output_of(module: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    output = module(**inputs)
    tensor: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return tensor


def compiled(
    model: str, backend: str | None
) -> tuple[Callable[[], torch.Tensor], attnrewrite.AttentionCompiler | None]:
    module, inputs = built(model)
    chosen = attnrewrite.with_backend(backend) if backend else None

    def step(**given: torch.Tensor) -> torch.Tensor:
        return output_of(module, given)

    # Dynamo keeps compiled code by code object, so each variant gets a code object of its own.
    step.__code__ = step.__code__.replace(co_name=f"step_{model}_{backend}")
    run = torch.compile(step, backend=chosen or "inductor", fullgraph=True)
    return lambda: run(**inputs), chosen


def resident() -> float:
    """The process's largest resident size so far, in MiB (Linux only; getrusage's ru_maxrss starts at the parent's value)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def peak(model: str, backend: str | None) -> float:
    """Returns the MiB by which a step raises the largest resident size of this process."""
    run, _ = compiled(model, backend)
    if model == "sd15":  # libraries allocate memory at their first call
        module, inputs = built(model)
        output_of(module, {**inputs, "hidden_states": inputs["hidden_states"][..., :8, :8]})
    before = resident()
    run()
    return resident() - before


def in_a_process(model: str, backend: str | None) -> float:
    """Runs `peak` in two processes, one after the other. Returns the second value: Inductor's cache is warm then, so that
    compiling allocates little."""
    for _ in range(2):
        command = [sys.executable, __file__, "--model", model, "--peak", backend or "unswapped"]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.split()[-1])


def measured(model: str, backend: str, rounds: int) -> dict[str, Any]:
    """Measures one model, and prints it."""
    module, inputs = built(model)
    from step_ratio import processor

    exact = output_of(copy.deepcopy(module).double(), {name: value.double() for name, value in inputs.items()})
    steps = {"unswapped": compiled(model, None)[0]}
    steps["swapped"], chosen = compiled(model, backend)
    errors = {name: ((step() - exact).norm() / exact.norm()).item() for name, step in steps.items()}
    assert chosen is not None
    sites = chosen.report.sites
    print(f"{model}: {torch.get_num_threads()} threads, torch {torch.__version__}; {len(sites)} sites:")
    print(chosen.report)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        for name in list(steps)[:: 1 if turn % 2 else -1]:
            started = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - started)
    peaks = {"unswapped": in_a_process(model, None), "swapped": in_a_process(model, backend)}
    ratios = [one / other for one, other in zip(times["unswapped"], times["swapped"], strict=True)]
    calls = [site.call for site in sites]
    scores = max(int(call.batch * call.heads * call.q_len * call.kv_len) for call in calls) * 4 / 2**20
    variants = {
        name: {"seconds": statistics.median(times[name]), "peak_mib": peaks[name], "error": errors[name]}
        for name in steps
    }
    for name, about in variants.items():
        print("{:10} {seconds:7.3f} s  peak {peak_mib:6.0f} MiB  error {error:.1e}".format(name, **about))
    ratio = statistics.median(ratios)
    saved = peaks["unswapped"] - peaks["swapped"]
    print(f"ratio {ratio:.2f}; peak lower by {saved:.0f} MiB, the scores take {scores:.0f} MiB", flush=True)
    return {
        "compiled": MODELS[model][0],
        "cpu": processor(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "backend": backend,
        "ratio": ratio,
        "scores_mib": scores,
        "variants": variants,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=["sd15"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backend", default="_native_flash")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the results to FILE too, by model; those of other models stay"
    )
    parser.add_argument("--peak", metavar="VARIANT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with torch.no_grad():
        if options.peak:
            print(peak(options.model[0], None if options.peak == "unswapped" else options.peak))
            return
        results = {model: measured(model, options.backend, options.rounds) for model in options.model}
    if options.json:
        known = json.loads(options.json.read_text()) if options.json.exists() else {}
        options.json.write_text(json.dumps(known | results, indent=1) + "\n")


if __name__ == "__main__":
    main()
