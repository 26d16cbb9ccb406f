"""Reach: which attentions of models from PyPI are found and swapped, how far from float64, what is left and why.

    python bench/reach.py [--only NAME ...] [--env DIR] [--json FILE]

The models stand in `reach_models.py`: classes of packages that nobody of this project wrote, random weights, small sizes. The
packages are installed at those versions in a virtual environment (`--env DIR`, kept; else in a temporary folder) that shares
the running interpreter's PyTorch; pip is held to that PyTorch. Each model runs in a process of its own.

attention  softmaxes whose scores come from a batched product and whose weights go into one, and calls of SDPA's kernels, in one
           uncompiled run of the model (below the graph, by PyTorch's operators: nothing of attnrewrite is asked)
found      attentions in the report, each times the runs of its graph
swapped    the same for those that have `_native_flash`, or `native` in the place of operations
error      |output - exact| / |exact|, the compiled model in float32, the unchanged one in float64 (in float32 where it does not
           run in float64, or draws random numbers, which are others there: the line says so)
seconds    of the first compiled run (`inner="eager"`: what the passes and Dynamo take)
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARK = "RESULT "  # before the line of JSON that a process prints
LIMIT = 240  # seconds for one model


def made(value: Any) -> Any:
    """An argument; a pair of an import path and arguments is an object that has to be made."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], dict):
        module, _, name = value[0].rpartition(".")
        return getattr(importlib.import_module(module), name)(
            **{key: made(argument) for key, argument in value[1].items()}
        )
    return value


def distance(found: list[Any], exact: list[Any]) -> float:
    """|found - exact| / |exact| of all tensors together."""
    apart = sum((one.double() - two.double()).norm().item() ** 2 for one, two in zip(found, exact, strict=True))
    norm: float = sum(each.double().norm().item() ** 2 for each in exact)
    return (apart / norm) ** 0.5


def measured(package: str, name: str) -> dict[str, Any]:
    """Measures one model in this process."""
    import torch
    from reach_models import PACKAGES
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torchvision_operators import import_torchvision

    import attnrewrite

    class Counter(TorchDispatchMode):
        """Follows scores from a batched product through a softmax to the next product."""

        KERNELS = ("_scaled_dot_product", "_transformer_encoder_layer_fwd", "_native_multi_head_attention")

        def __init__(self) -> None:
            super().__init__()
            self.scores: set[int] = set()
            self.weights: dict[int, set[int]] = {}
            self.used: set[int] = set()
            self.kernels = 0
            self.kept: list[Any] = []  # so that no storage's address is given twice

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            word = func.__name__.split(".")[0]
            given = [key for each in tree_leaves((args, kwargs)) if (key := self.key(each)) is not None]
            out = [key for each in tree_leaves(result) if (key := self.key(each)) is not None]
            self.kept.append((args, kwargs, result))
            if word.startswith(self.KERNELS):
                self.kernels += 1
            elif word in ("bmm", "baddbmm"):
                for each in given:
                    self.used |= self.weights.get(each, set())
                self.scores.update(out)
            elif word in ("_softmax", "_safe_softmax"):
                if self.scores & set(given):
                    self.weights.update((each, {len(self.kept)}) for each in out)
            elif word not in ("mm", "addmm", "convolution"):
                if self.scores & set(given):
                    self.scores.update(out)
                for each in given:
                    for other in out:
                        self.weights.setdefault(other, set()).update(self.weights.get(each, ()))
            return result

        @staticmethod
        def key(value: Any) -> int | None:
            return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None

    import_torchvision()
    path, kwargs, described = next(rest for known, *rest in PACKAGES[package] if known == name)
    torch.manual_seed(0)
    module = made((path, kwargs)).eval().requires_grad_(False)
    for parameter in module.parameters():  # a layer that begins with zeros would hide what is before it
        if parameter.is_floating_point() and not parameter.any():
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    inputs = [torch.randn(*rest) if kind == "real" else torch.randint(rest[0], rest[1:]) for kind, *rest in described]

    def run(model: Any, given: list[Any]) -> list[Any]:
        torch.manual_seed(1)
        return [
            each for each in tree_leaves(model(*given)) if isinstance(each, torch.Tensor) and each.is_floating_point()
        ]

    runs: list[int] = []

    def inner(graph_module: Any, example_inputs: Any) -> Any:
        place = len(runs)
        runs.append(0)

        def call(*given: Any) -> Any:
            runs[place] += 1
            return graph_module(*given)

        return call

    with torch.no_grad():
        with Counter() as counter:
            plain = run(module, inputs)
        exact_from = "float64"
        try:
            double = copy.deepcopy(module).double()
            exact = run(double, [each.double() if each.is_floating_point() else each for each in inputs])
        except Exception as error:
            exact, exact_from = plain, f"float32 ({type(error).__name__} in float64)"
        if distance(plain, exact) > 1e-2:
            exact, exact_from = plain, "float32 (draws other random numbers in float64)"
        backend = attnrewrite.with_backend("_native_flash", "native", inner=inner)
        started = time.perf_counter()
        outputs = run(torch.compile(module, backend=backend), inputs)
        seconds = time.perf_counter() - started
    graphs = backend.report.graphs
    times = runs if len(runs) == len(graphs) else [1] * len(graphs)
    left = [f"{site.name}: {site.call.obstacle or '; '.join(str(each) for _, each in site.refusals)}"
            for graph in graphs for site in graph.plan.sites if site.chosen is None]  # fmt: skip
    left += [str(near) for graph in graphs for near in graph.near_misses]
    left += [str(call) for call in backend.report.eager_calls]
    return {
        "attention": counter.kernels + len(counter.used),
        "found": sum(len(graph.plan.sites) * each for graph, each in zip(graphs, times, strict=True)),
        "swapped": sum(
            sum(site.swapped for site in graph.plan.sites) * each for graph, each in zip(graphs, times, strict=True)
        ),
        "error": distance(outputs, exact),
        "exact": exact_from,
        "seconds": seconds,
        "graphs": len(runs),
        "left": left,
    }


def environment(folder: Path) -> Path:
    """Makes a virtual environment beside the running interpreter's packages, or takes one. Returns its Python."""
    import torch

    if not (folder / "pyvenv.cfg").exists():
        venv.create(folder, with_pip=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    shared = Path(torch.__file__).parents[1]
    (folder / "lib" / version / "site-packages" / "shared.pth").write_text(f"{shared}\n")
    (folder / "constraints.txt").write_text(f"torch=={torch.__version__}\n")
    return folder / "bin" / "python"


def install(python: Path, package: str) -> str | None:
    """Installs a package, unless its version is there. Returns pip's error, None where all went well."""
    constraints = python.parents[1] / "constraints.txt"
    command = [str(python), "-m", "pip", "install", "-q", "-c", str(constraints), package]
    done = subprocess.run(command, capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["pip failed"])[-1]


def in_a_process(python: Path, package: str, name: str) -> dict[str, Any]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "bench")])
    command = [str(python), "-W", "ignore", __file__, "--measure", package, name]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT, env={**os.environ, "PYTHONPATH": path}
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"no result after {LIMIT} s"}
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            result: dict[str, Any] = json.loads(line.removeprefix(MARK))
            return result
    return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}


def told(package: str, name: str, row: dict[str, Any]) -> str:
    about = f"{package.split('=')[0]:28.28} {name:26.26} "
    if "failed" in row:
        return about + f"failed: {row['failed'][:120]}"
    line = about + "{attention:5} {found:5} {swapped:7}  {error:.1e}  {seconds:6.1f}".format(**row)
    if row["exact"] != "float64":
        line += f"  error to {row['exact']}"
    reasons = collections.Counter(reason.partition(": ")[2] or reason for reason in row["left"])
    return "\n".join([line, *(f"    {count} x {reason[:180]}" for reason, count in reasons.items())])


def main() -> None:
    from reach_models import PACKAGES

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these packages alone, by name without version")
    parser.add_argument("--env", type=Path, metavar="DIR", help="the virtual environment, kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE too")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(MARK + json.dumps(measured(*options.measure)), flush=True)
        return
    names = {package.split("=")[0] for package in PACKAGES}
    if unknown := set(options.only or ()) - names:
        parser.error(f"--only: no package is called {', '.join(sorted(unknown))}. Known: {', '.join(sorted(names))}")
    rows: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        folder = options.env or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        python = environment(folder)
        print(f"{'package':28} {'class':26} attention found swapped  error  seconds")
        for package, models in PACKAGES.items():
            if options.only and package.split("=")[0] not in options.only:
                continue
            fault = install(python, package)
            for name, *_ in models:
                row = {"failed": fault} if fault else in_a_process(python, package, name)
                rows[f"{package}: {name}"] = row
                print(told(package, name, row), flush=True)
    ran = [row for row in rows.values() if "failed" not in row]
    total = {key: sum(row[key] for row in ran) for key in ("attention", "found", "swapped")}
    worst = max((row["error"] for row in ran), default=0.0)
    print(
        f"{len(ran)} of {len(rows)} models ran: {total['attention']} attentions, {total['found']} found, "
        f"{total['swapped']} swapped; largest error {worst:.1e}"
    )
    if options.json:
        import torch

        about = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
        options.json.write_text(json.dumps({**about, "total": total, "models": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
