"""Measures what the rewrite costs when the compiled model runs: `with_backend("native")` against plain torch.compile.

    python bench/step_ratio.py                                  # on the GPU if there is one, else on the CPU
    python bench/step_ratio.py --device cpu --json FILE         # writes the results as JSON too
    python bench/step_ratio.py --device cpu --threads 1         # on a machine whose cores are busy

A FluxTransformer2DModel of diffusers, with random weights, is compiled by Inductor: twice by plain torch.compile
(plain, plain again), once with `with_backend("native")` and once with `with_backend("_native_flash")`. On the CPU the
model is small, in float32; on a GPU it has FLUX.1's widths and tokens and a fifth of its blocks, in bfloat16.
Their steps are timed in turn in one process, each round in another order:

/ plain         the median step / the median step of plain
by rounds       median and quartiles of (step / step of plain in the same round): less sensitive to other load on the machine
ratio, noise    both figures for native (the goal is 1) and for plain again (the distance between two equal programs)

Then the code that runs for an attention is counted, without timing:

attention ops   calls of attention ops in Inductor's code, for each attention of the model
same code       whether Inductor's code equals the code of plain torch.compile, without comments
attnrewrite     occurrences of the word in that code, and calls into the package during one step (sys.setprofile)
Python calls    calls of Python functions during one step
C calls         calls of builtins during one step, among them every op
"""

import argparse
import json
import platform
import re
import statistics
import sys
import time
from unittest import mock

import diffusers
import torch
from diffusers import FluxTransformer2DModel
from torch._inductor.graph import GraphLowering

import attnrewrite

PLAIN, AGAIN, NATIVE, FLASH = "plain", "plain again", "native", "_native_flash"


def flux(device):
    """Returns the model, its inputs, and a description for the header."""
    if device.type == "cuda":  # FLUX.1's widths and tokens
        heads, width, double, single, axes = 24, 128, 4, 8, (16, 56, 56)
        channels, joint, pooled, image, text, dtype = 64, 4096, 768, 4096, 512, torch.bfloat16
    else:
        heads, width, double, single, axes = 4, 64, 2, 4, (16, 24, 24)
        channels, joint, pooled, image, text, dtype = 16, 128, 64, 128, 32, torch.float32
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with device:
        model = FluxTransformer2DModel(
            num_layers=double, num_single_layers=single, num_attention_heads=heads, attention_head_dim=width,
            in_channels=channels, joint_attention_dim=joint, pooled_projection_dim=pooled, axes_dims_rope=axes,
        ).eval()  # fmt: skip
        inputs = {
            "hidden_states": torch.randn(1, image, channels),
            "encoder_hidden_states": torch.randn(1, text, joint),
            "pooled_projections": torch.randn(1, pooled),
            "timestep": torch.ones(1),
            "img_ids": torch.randn(image, 3),
            "txt_ids": torch.randn(text, 3),
        }
    torch.set_default_dtype(torch.float32)
    described = f"FluxTransformer2DModel, {double} double and {single} single blocks, {heads} heads of {width}"
    return model, inputs, f"{described}, {image} + {text} tokens, {dtype}"


def compiled(model, inputs, number, backend):
    """Returns the warm compiled step, and the Python code that Inductor wrote for it, without comments."""

    def step():
        return model(**inputs, return_dict=False)[0]

    # Dynamo keeps compiled code by code object. Each step has its own, or each call would search the code of all backends.
    step.__code__ = step.__code__.replace(co_name=f"step_{number}")
    codes = []
    with (
        mock.patch.object(GraphLowering, "save_output_code", codes.append),
        torch._inductor.config.patch(fx_graph_cache=False),  # code from a cache is not passed to save_output_code
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        run = torch.compile(step, backend=backend, fullgraph=True)
        for _ in range(3):
            run()
    lines = [line for code in codes for line in code.splitlines() if not line.lstrip().startswith("#")]
    return run, "\n".join(lines)


def seconds(run, device):
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def python_calls(run):
    """Counts the calls of Python functions, of builtins, and of attnrewrite's functions during one step."""
    counts = {"python": 0, "c": 0, "attnrewrite": 0}

    def count(frame, event, argument):
        if event == "call":
            counts["python"] += 1
            counts["attnrewrite"] += frame.f_globals.get("__name__", "").split(".")[0] == "attnrewrite"
        elif event == "c_call":
            counts["c"] += 1

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return counts


def processor():
    try:
        with open("/proc/cpuinfo") as file:
            return re.search(r"model name\s*: (.*)", file.read()).group(1)
    except (OSError, AttributeError):
        return platform.processor() or platform.machine()


def main():
    parser = argparse.ArgumentParser(
        description="Ratio of a compiled step with with_backend('native') to plain torch.compile."
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=60, help="timed steps of each variant")
    parser.add_argument(
        "--threads",
        type=int,
        help="CPU threads of PyTorch; use few on a busy machine, where threads wait for each other",
    )
    parser.add_argument("--json", metavar="FILE", help="write the results to FILE too")
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)

    model, inputs, described = flux(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    result = {
        "model": described, "device": device.type, "device_name": name, "cpu": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__, "cuda": torch.version.cuda, "diffusers": diffusers.__version__,
        "python": platform.python_version(), "rounds": options.rounds,
    }  # fmt: skip
    print(described)
    print(
        f"on {name}, {result['threads']} threads; torch {torch.__version__}, diffusers {diffusers.__version__}", end=""
    )
    print(f", python {result['python']}; {options.rounds} rounds", flush=True)

    backends = {
        PLAIN: "inductor",
        AGAIN: "inductor",
        NATIVE: attnrewrite.with_backend("native"),
        FLASH: attnrewrite.with_backend(FLASH),
    }
    with torch.no_grad():
        made = {
            name: compiled(model, inputs, number, backend) for number, (name, backend) in enumerate(backends.items())
        }
        times = {name: [] for name in made}
        order = list(made)
        for _ in range(options.rounds):
            for name in order:
                times[name].append(seconds(made[name][0], device))
            order = order[1:] + order[:1]  # no step always comes first
        calls = {name: python_calls(run) for name, (run, _) in made.items()}

    sites = len(backends[NATIVE].report.sites)
    medians = {name: statistics.median(values) for name, values in times.items()}
    result |= {"attentions": sites, "swapped": {FLASH: backends[FLASH].report.swapped}, "steps": {}}
    print("\n                median ms   quartiles ms         / plain  by rounds  quartiles")
    for name, values in times.items():
        low, _, high = statistics.quantiles(values, n=4)
        ratio = medians[name] / medians[PLAIN]
        rounds = statistics.quantiles([step / plain for step, plain in zip(values, times[PLAIN], strict=True)], n=4)
        print(
            f"{name:15} {1e3 * medians[name]:9.3f}  {1e3 * low:8.3f} {1e3 * high:8.3f}  {ratio:10.4f} "
            f"{rounds[1]:10.4f}  {rounds[0]:.4f} {rounds[2]:.4f}"
        )
        result["steps"][name] = {
            "median_s": medians[name], "quartiles_s": [low, high], "to_plain": ratio, "to_plain_by_rounds": rounds
        }  # fmt: skip
    for key, name in {"ratio": NATIVE, "noise": AGAIN}.items():
        result[key] = result["steps"][name]["to_plain"]
        result[f"{key}_by_rounds"] = result["steps"][name]["to_plain_by_rounds"][1]
    print(f"ratio {result['ratio']:.4f} (by rounds {result['ratio_by_rounds']:.4f}), ", end="")
    print(f"noise {result['noise']:.4f} (by rounds {result['noise_by_rounds']:.4f})")

    print(f"\n{sites} attentions; {FLASH} takes {backends[FLASH].report.swapped}")
    print("                attention ops each  same code  attnrewrite in code, called  Python calls   C calls")
    plain_code = made[PLAIN][1]
    for name, (_, code) in made.items():
        ops = re.findall(r"(_scaled_dot_product_\w+)\.default\(", code)
        own, called = code.count("attnrewrite"), calls[name]["attnrewrite"]
        print(
            f"{name:15} {len(ops) / sites:19.2f} {code == plain_code!s:>10} {own:20d} {called:7d} "
            f"{calls[name]['python']:13d} {calls[name]['c']:9d}  {', '.join(sorted(set(ops)))}"
        )
        result["steps"][name] |= {
            "attention_ops": len(ops), "same_code": code == plain_code, "attnrewrite_in_code": own, "calls": calls[name]
        }  # fmt: skip
    lines = made[FLASH][1].splitlines()
    first = next(
        (index for index, line in enumerate(lines) if re.search(r"_scaled_dot_product_\w+\.default\(", line)), None
    )
    if first is not None:
        print(f"\none attention in the code of {FLASH}:")
        print("\n".join(line.strip()[:118] for line in lines[first : first + 4]))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
