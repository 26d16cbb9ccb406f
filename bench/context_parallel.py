"""Measures steps of denoisers that several GPUs share: one GPU, attnrewrite, diffusers' own Ulysses attention.

    torchrun --nproc-per-node 2 bench/context_parallel.py [--models flux wan-14b] [--rounds 8] [--json FILE]

`--kinds ulysses ring gather` measures these kinds of `ContextParallel` in the place of "auto".

    python bench/context_parallel.py --alone 2

runs the first of two ranks on one device, without the other. Its exchanges return at once, with numbers of no meaning: a row
has what a rank computes, and the ratio to one GPU is the most that two can reach, however fast their link is.

Each step is timed with CUDA events behind a barrier; a row has the median, the error to the first row's step, what a rank
exchanges by the plan, and the peak of a rank's memory. NCCL's kernels have priority, for the peer too, unless
TORCH_NCCL_HIGH_PRIORITY=0 says otherwise. `--small` runs the sizes of a test over gloo on CPUs, to try the script.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import attnrewrite
from attnrewrite import pipeline
from attnrewrite.commands.bench import results
from attnrewrite.commands.bench.denoiser import Denoiser, Place
from attnrewrite.commands.bench.denoisers import MODELS
from attnrewrite.commands.ranks import PRIORITY, leave

ONE, PEER = "one GPU, torch.compile", "diffusers' Ulysses"
NATIVE, AUTO = "attnrewrite, native", "attnrewrite, auto"
WHOLE, GRAPHS = ", whole model", ", whole model, CUDA graphs"
DEFAULT = ("wan-14b", "hunyuan", "flux", "qwen-image", "sd3.5")


def plain(how: str) -> Callable[[Denoiser], Any]:
    return lambda denoiser: (parts(denoiser, how).compile("inductor", mode_of(how)), None)


def ours(choice: str, mesh: DeviceMesh, kind: str, how: str) -> Callable[[Denoiser], Any]:
    def prepared(denoiser: Denoiser) -> Any:
        backend = attnrewrite.with_backend(choice, context_parallel=attnrewrite.ContextParallel(mesh, kind))
        return parts(denoiser, how).compile(backend, mode_of(how)), backend

    return prepared


def parts(denoiser: Denoiser, how: str) -> Denoiser:
    return replace(denoiser, blocks=()) if how else denoiser


def mode_of(how: str) -> str | None:
    return "reduce-overhead" if how == GRAPHS else None


def peer(mesh: DeviceMesh, how: str) -> Callable[[Denoiser], Any]:
    def prepared(denoiser: Denoiser) -> Any:
        from diffusers import ContextParallelConfig

        model: Any = denoiser.model
        model.set_attention_backend("_native_cudnn" if mesh.device_type == "cuda" else "native")
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=mesh.size()))
        # Its hooks stand in front of the modules' own forwards, which `Denoiser.compile` compiles.
        regions = [module for module in model.modules() if type(module).__name__ in parts(denoiser, how).blocks]
        for region in regions or [model]:
            region.compile(dynamic=False, mode=mode_of(how))
        return denoiser.step, None

    return prepared


def variants(mesh: DeviceMesh, cuda_graphs: bool, kinds: Sequence[str]) -> dict[str, Callable[[Denoiser], Any]]:
    """What is measured, by its label. The first is what the others are compared with. kinds: of `ContextParallel`."""
    found: dict[str, Callable[[Denoiser], Any]] = {}
    named = [(kind, "" if kind == "auto" else f", {kind}") for kind in kinds]
    for label, prepared in (
        (ONE, plain),
        *((NATIVE + name, partial(ours, "native", mesh, kind)) for kind, name in named),
        *((AUTO + name, partial(ours, "auto", mesh, kind)) for kind, name in named),
        (PEER, partial(peer, mesh)),
    ):
        for how in ("", WHOLE, *((GRAPHS,) if cuda_graphs else ())):
            found[label + how] = prepared(how)
    return found


def timed(step: Callable[[], torch.Tensor], device: torch.device, rounds: int) -> tuple[float, torch.Tensor]:
    """The median duration of a step in ms, and its result in float32."""
    found = []
    with torch.no_grad():
        for _ in range(3):
            output = step().float()  # a copy: a CUDA graph writes each step's output to the same place
        for _ in range(rounds):
            dist.barrier()
            if device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                start.record()
                step()
                end.record()
                end.synchronize()
                found.append(start.elapsed_time(end))
            else:
                began = time.perf_counter()
                step()
                found.append((time.perf_counter() - began) * 1e3)
    return statistics.median(found), output


def measure(
    name: str,
    place: Place,
    mesh: DeviceMesh,
    rounds: int,
    chosen: dict[str, Callable[[Denoiser], Any]],
    alone: bool = False,
) -> dict[str, Any]:
    """A row for each of the chosen variants; each has a model of its own with the same weights. alone: whether the other ranks
    are not there."""
    rows: dict[str, Any] = {}
    reference: torch.Tensor | None = None
    for label, prepared in chosen.items():
        torch._dynamo.reset()
        if place.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            step, backend = prepared(MODELS[name](place))
            milliseconds, output = timed(step, place.device, rounds)
            reference = output if reference is None else reference
            error = None if alone else ((output - reference).norm() / reference.norm()).item()
        except Exception as error:
            rows[label] = {"error": f"{type(error).__name__}: {error}"[:400]}
        else:
            rows[label] = {
                "ms": round(milliseconds, 2),
                "relative_error": error,
                "gib": torch.cuda.max_memory_allocated() / 2**30 if place.device.type == "cuda" else None,
                "plan": [graph.parallel.lines() for graph in backend.report.graphs if graph.parallel]
                if backend
                else [],
            }
        step = backend = None
        if dist.get_rank() == 0:
            print(f"{name}: {label}: {json.dumps({**rows[label], 'plan': None})}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=DEFAULT, choices=tuple(MODELS))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--kinds", nargs="+", metavar="KIND", default=("auto",), help="of ContextParallel")
    parser.add_argument(
        "--only", nargs="+", metavar="LABEL", help="of the variants those with these labels, and the first"
    )
    parser.add_argument("--cuda-graphs", action="store_true", help="measure whole models in CUDA graphs too")
    parser.add_argument("--small", action="store_true", help="sizes of a test, over gloo on CPUs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE too")
    parser.add_argument("--alone", type=int, metavar="N", help="the first of N ranks, without the others")
    options = parser.parse_args()
    if not options.small and not torch.cuda.is_available():
        raise SystemExit("bench/context_parallel.py needs CUDA GPUs: --small tries the script on CPUs")
    kind = "cpu" if options.small else "cuda"
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
        os.environ.setdefault(PRIORITY, "1")
    if options.alone:
        pipeline.agree = lambda *_: None  # there is nobody to agree with
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=options.alone)
    mesh = init_device_mesh(kind, (options.alone or int(os.environ["WORLD_SIZE"]),))
    place = Place(device, torch.float32 if options.small else torch.bfloat16, options.small)
    result: dict[str, Any] = {**results.header(device, options.small), "ranks": mesh.size(), "rounds": options.rounds}
    if options.alone:
        result["alone"] = True
    result["models"] = {}
    chosen = variants(mesh, options.cuda_graphs, options.kinds)
    if options.only:
        if unknown := set(options.only) - set(chosen):
            raise SystemExit(f"--only has {sorted(unknown)}; the labels are {list(chosen)}")
        chosen = {label: each for label, each in chosen.items() if label == ONE or label in options.only}
    for name in options.models:
        result["models"][name] = measure(name, place, mesh, options.rounds, chosen, bool(options.alone))
        if options.json and dist.get_rank() == 0:
            options.json.write_text(json.dumps(result, indent=1) + "\n")
    leave()


if __name__ == "__main__":
    main()
