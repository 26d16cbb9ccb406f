"""Ahead of time: the cost of rewriting, loading, checking and packaging on a CPU, and the speed of packages on a GPU.

    python bench/aot.py                                 # on a CPU, about five minutes
    python bench/aot.py --export out/aot                # on any machine with diffusers: programs for a described Hopper GPU
    python bench/aot.py --run out/aot --json bench/results/aot_h200.json      # on the GPU: needs no diffusers

rewrite   seconds of `attnrewrite.rewrite` on FLUX.1's export at published widths with fake weights, by number of blocks
load      seconds of `attnrewrite.load` / `torch.export.load` of one file, in turn; the median of the ratios
checks    microseconds of each check in a call, and their share of a packaged step
package   a packaged step with `native`, and with `_native_flash`, / one of the unrewritten program, in turn; medians

The packaged block is a WanTransformerBlock at the widths of Wan 2.1 1.3B (12 heads of 128, ffn 8960). With --run it has 32,760
tokens (81 frames of 480 x 832) in bfloat16. "package": AOTInductor. "jit": torch.compile of the same exported program with
`with_backend`. Each line has the median over rounds of (native / kernel) in the same round, and the relative error to `native`
in float32. `--packages` lists the package versions of the described machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import torch

import attnrewrite
from attnrewrite.aot.check_ops import CHECK_INPUTS, CHECK_SIZE
from attnrewrite.aot.programs import record_of
from attnrewrite.commands.bench.rounds import by_rounds, in_turn
from attnrewrite.planning.this_machine import machine_of

PACKAGES = ("torch=2.11.0", "cudnn=9.19.0", "fa3-fwd=0.0.3", "flash-attn-4=4.0.0b36")
KERNELS = ("_flash_3", "flash_4", "_native_cudnn", "_native_flash")


def block(frames, rows, columns, dtype, text=512, heads=12):
    """A block of Wan 2.1 1.3B, and its inputs: hidden states (1, tokens, 1536), text, modulation, rotary embedding. With fewer
    than 12 heads it is narrower."""
    import diffusers
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock

    torch.manual_seed(0)
    width = 128 * heads
    made = WanTransformerBlock(width, 8960 * heads // 12, heads, qk_norm="rms_norm_across_heads", cross_attn_norm=True)
    made = made.to(dtype).eval().requires_grad_(False)
    rotary = WanRotaryPosEmbed(128, (1, 2, 2), 1024)(torch.empty(1, 16, frames, rows, columns))
    tokens = frames * (rows // 2) * (columns // 2)
    print(f"WanTransformerBlock of diffusers {diffusers.__version__}, {heads} heads of 128, {tokens} tokens, {dtype}")
    return made, (
        torch.randn(1, tokens, width, dtype=dtype),
        torch.randn(1, text, width, dtype=dtype),
        torch.randn(1, 6, width),
        rotary,
    )


def seconds(function, *args):
    started = time.perf_counter()
    function(*args)
    return time.perf_counter() - started


def by_turns(steps, rounds):
    """Returns the seconds of each step in each round."""
    for step in steps.values():
        step()
    return in_turn({name: partial(seconds, step) for name, step in steps.items()}, rounds)


def rewriting(depths):
    from pass_cost import flux
    from torch._subclasses import FakeTensorMode

    print("rewrite of FLUX.1's export, fake weights, _native_flash")
    for blocks in depths:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            model, inputs = flux(blocks)
            program = torch.export.export(model, (), {**inputs, "return_dict": False}, strict=False)
        took = [seconds(attnrewrite.rewrite, program, "_native_flash") for _ in range(3)]
        swapped = attnrewrite.report_of(attnrewrite.rewrite(program, "_native_flash")).swapped
        print(
            f"  {blocks:3d} blocks, {len(program.graph.nodes):6d} nodes, {swapped:3d} swapped: first {took[0]:.2f} s, "
            f"median {statistics.median(took):.2f} s, {1000 * statistics.median(took) / blocks:.1f} ms a block",
            flush=True,
        )


def packaging(rounds):
    model, inputs = block(2, 16, 16, torch.float32, text=64)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        program = torch.export.export(model, inputs)
        made = {
            "unrewritten": program,
            "native": attnrewrite.rewrite(program, "native"),
            "_native_flash": attnrewrite.rewrite(program, "_native_flash"),
        }
        path = Path(folder) / "saved.pt2"
        attnrewrite.save(made["_native_flash"], path)
        times = by_turns(
            {"torch": lambda: torch.export.load(path), "attnrewrite": lambda: attnrewrite.load(path)}, rounds
        )
        print(
            f"load: {statistics.median(times['attnrewrite']):.3f} s and {statistics.median(times['torch']):.3f} s by "
            f"torch.export.load, ratio {by_rounds(times['attnrewrite'], times['torch']):.3f} ({path.stat().st_size >> 20} MiB)"
        )
        steps = {}
        for name, each in made.items():
            attnrewrite.aot_compile(each, Path(folder) / f"{name}.pt2")
            package = attnrewrite.load_package(Path(folder) / f"{name}.pt2")
            steps[name] = lambda package=package: package(*inputs)
        steps["unrewritten again"] = steps["unrewritten"]
        times = by_turns(steps, 3 * rounds)
    step = statistics.median(times["unrewritten"])
    for name in ("native", "_native_flash", "unrewritten again"):
        found = by_rounds(times[name], times["unrewritten"])
        print(f"package: {name} / unrewritten: ratio {found:.3f} (a step: {1000 * step:.1f} ms)")
    checking(record_of(made["_native_flash"]), inputs, step)


def checking(record, inputs, step):
    tensors = [tensor for tensor in torch.utils._pytree.tree_leaves(inputs)]
    names, kinds = [f"input_{number}" for number in range(len(tensors))], ["cpu"] * len(tensors)
    rows = [1] * len(tensors)
    dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in tensors]
    shape = [size for tensor in tensors for size in tensor.shape]
    asked = {
        "names": names, "dtypes": dtypes, "kinds": kinds, "rows": rows, "ranks": [tensor.dim() for tensor in tensors],
        "least": shape, "most": shape,
    }  # fmt: skip

    def each(calls=20_000):
        took = seconds(lambda: [CHECK_INPUTS(tensors, **asked, sites="") for _ in range(calls)])
        sizes = seconds(lambda: [CHECK_SIZE(tensors[0], 0, 0, relation="==", says="", sites="") for _ in range(calls)])
        return took / calls, sizes / calls

    of_inputs, of_size = each()
    share = of_inputs * len(record.checks) / step
    print(
        f"checks: {1e6 * of_inputs:.1f} us for {len(tensors)} inputs, {1e6 * of_size:.1f} us a condition on sizes; "
        f"{100 * share:.4f} % of that step; of one of 100 ms {100 * of_inputs / 0.1:.4f} %, 10 conditions more "
        f"{100 * 10 * of_size / 0.1:.4f} %"
    )


def exporting(folder, packages, device, small, kernels):
    machine = None  # this machine
    if device != "cpu":
        machine = attnrewrite.Machine(device, (9, 0), dict(pair.split("=", 1) for pair in packages))
    folder.mkdir(parents=True, exist_ok=True)
    sizes, heads = ((3, 16, 24), 2) if small else ((21, 60, 104), 12)
    model, inputs = block(*sizes, torch.bfloat16, heads=heads)
    with torch.no_grad():
        program = torch.export.export(model, inputs)
    for kernel in ("native", *kernels):
        made = attnrewrite.rewrite(program, kernel, machine=machine)
        attnrewrite.save(made, folder / f"{kernel}.pt2")
        print(f"{kernel}: {attnrewrite.report_of(made).swapped} of {len(attnrewrite.report_of(made).sites)} sites")
    torch.save(inputs, folder / "inputs.pt")
    print(f"for {machine or 'this machine'}; wrote {folder}")


def running(folder, rounds, target, device, kernels):
    sys.modules["diffusers"] = None
    warnings.filterwarnings("ignore", message=".*made with")
    to = {"device": device}
    inputs = torch.utils._pytree.tree_map(lambda tensor: tensor.to(**to), torch.load(folder / "inputs.pt"))
    plain = attnrewrite.load(folder / "native.pt2", **to)
    steps, errors, reports = {}, {}, {}
    with torch.no_grad(), tempfile.TemporaryDirectory() as made:
        exact = _in_float32(plain, inputs)
        for kernel in ("native", *kernels):
            try:
                program = attnrewrite.load(folder / f"{kernel}.pt2", **to)
                output = program.module()(*inputs)
                errors[kernel] = ((output.float() - exact).norm() / exact.norm()).item()
                package = attnrewrite.aot_compile(program, Path(made) / f"{kernel}.pt2")
                run = attnrewrite.load_package(package.path)
                reports[kernel] = str(package.report)
                steps[f"{kernel}, package"] = lambda run=run: run(*inputs)
                jit = torch.compile(
                    plain.module(), backend=attnrewrite.with_backend(*dict.fromkeys([kernel, "native"]))
                )
                steps[f"{kernel}, jit"] = lambda jit=jit: jit(*inputs)
            except Exception as error:  # a kernel that cannot run is a result too
                print(f"{kernel}: {type(error).__name__}: {str(error).splitlines()[0]}")
        for name, step in steps.items():
            output = step()
            errors[name] = ((output.float() - exact).norm() / exact.norm()).item()
        times = {
            name: [1000 * each for each in found] for name, found in by_turns(_synchronised(steps), rounds).items()
        }
    rows = []
    for name, found in times.items():
        base = times.get(f"native, {name.partition(', ')[2]}", found)
        ms = statistics.median(found)
        rows.append({"step": name, "ms": ms, "gain": by_rounds(base, found), "error": errors[name]})
    print(machine_of(torch.device(device)))
    for row in rows:
        print(f"  {row['step']:24} {row['ms']:8.3f} ms  gain {row['gain']:.3f}  error {row['error']:.2e}")
    for kernel in kernels:
        if kernel in reports:
            print(reports[kernel])
    if target is not None:
        machine = machine_of(torch.device(device)).to_dict()
        result = {"machine": machine, "rounds": rounds, "rows": rows, "eager errors": errors, "reports": reports}
        target.write_text(json.dumps(result, indent=1) + "\n")


def _synchronised(steps):
    def run(step):
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return {name: (lambda step=step: run(step)) for name, step in steps.items()}


def _in_float32(program, inputs):
    """The output of the program computed in float32: the inputs and results of all nodes are converted from bfloat16."""

    class Wide(torch.fx.Interpreter):
        def run_node(self, node):
            result = super().run_node(node)
            return torch.utils._pytree.tree_map(_wide, result)

        def call_function(self, target, args, kwargs):
            args, kwargs = torch.utils._pytree.tree_map(_wide, (args, kwargs))
            return super().call_function(target, args, {k: _wide_dtype(v) for k, v in kwargs.items()})

    return Wide(program.module()).run(*inputs)


def _wide(value):
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else _wide_dtype(value)


def _wide_dtype(value):
    return torch.float32 if value is torch.bfloat16 else value


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", type=Path, metavar="DIR")
    parser.add_argument("--run", type=Path, metavar="DIR")
    parser.add_argument("--device", default="cuda", help="for --export and --run; cpu: this machine, to try the script")
    parser.add_argument(
        "--small", action="store_true", help="for --export: 288 tokens and 2 heads, to try the script or the files"
    )
    parser.add_argument(
        "--kernels", nargs="+", default=KERNELS, metavar="NAME", help="for --export and --run, besides native"
    )
    parser.add_argument("--packages", nargs="+", default=PACKAGES, metavar="NAME=VERSION")
    parser.add_argument(
        "--blocks", type=int, nargs="*", default=[8, 16, 32, 57], help="numbers of blocks for the rewrite figures"
    )
    parser.add_argument("--only-rewrite", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch.export's and diffusers' own
    if options.export:
        exporting(options.export, options.packages, options.device, options.small, options.kernels)
    elif options.run:
        running(options.run, options.rounds, options.json, options.device, options.kernels)
    else:
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
        if options.blocks:
            rewriting(options.blocks)
        if not options.only_rewrite:
            packaging(options.rounds)


if __name__ == "__main__":
    main()
