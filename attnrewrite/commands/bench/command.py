"""`attnrewrite bench`: measures kernels and models, prints tables, writes JSON and a picture."""

from __future__ import annotations

import argparse
import difflib
import functools
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...files import writable
from ...graphs.inner_compilers import known_inner
from ...planning.registry import canonical, separate
from ...planning.registry import names as all_kernels
from ...planning.selectors import usual_candidates
from ...reports import pictures as plotting
from ...reports.progress_line import ProgressLine
from . import model_level, op_level, plots, results, variants
from .denoiser import LOOSE, Denoiser, Place, imported
from .denoisers import MODELS
from .rounds import matmul_rate, words

ALL = "all"
# The names of diffusers' dispatcher that are fastest for some model. Its quantised kernels do not compile.
PEERS = {"cuda": "_flash_3,_flash_varlen_3", "cpu": "_native_flash"}

Builders = Mapping[str, Callable[[Place], Denoiser]]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="attnrewrite bench",
        description="Measures kernels by shape (--kernels) and denoiser steps by variant (--models), in turn in one process. "
        "Models are diffusers' own classes at published widths and token counts, with fewer layers and random weights. Options "
        "are part of a kernel's name, as in 'sol[tau=1.0,sinks=256]'.",
        epilog="attnrewrite bench --models flux,hunyuan --out b.json --plot b.png",
    )
    made.add_argument(
        "--models", nargs="?", const=ALL, metavar="A,B", help=f"models: {', '.join(MODELS)}; without names: all"
    )
    made.add_argument(
        "--kernels",
        nargs="?",
        const=ALL,
        metavar="A,B",
        help="names of kernels; without names: all that run here, except the kernels hub's",
    )
    made.add_argument(
        "--shapes",
        metavar="A;B",
        help=f"for --kernels: named (published models), lines (by length), or some of: {'; '.join(op_level.SHAPES)}",
    )
    made.add_argument(
        "--variants", metavar="A;B", help="for --models: only these variants, by their names in the table"
    )
    made.add_argument(
        "--numerics",
        choices=list(variants.ALLOW),
        default="quantised",
        help="for --models: tuned variants for the classes up to this one (default: quantised). sparse: queries and keys of "
        "wan-*, hunyuan and cogvideox follow position",
    )
    made.add_argument(
        "--max-error",
        type=float,
        metavar="E",
        help=f"for --models: the largest error at a site (default: {variants.SPARSE_ERROR:g} with --numerics sparse, otherwise "
        "the limits of attnrewrite.tune)",
    )
    made.add_argument(
        "--loose",
        type=float,
        default=LOOSE,
        metavar="L",
        help="for --numerics sparse: the random part of such queries and keys, relative to the part that follows position "
        f"(default: {LOOSE:g}); the smaller, the easier for a sparse kernel",
    )
    made.add_argument("--peers", metavar="A,B", help="kernels for diffusers' dispatcher (CUDA: " + PEERS["cuda"] + ")")
    made.add_argument(
        "--candidates",
        metavar="A,B",
        help="kernels that attnrewrite.tune tries in models (default: all except the kernels hub's)",
    )
    made.add_argument(
        "--rounds",
        type=int,
        default=10,
        help="timed rounds for models (default: 10); kernels use the rounds of attnrewrite.tune",
    )
    made.add_argument("--inner", default="inductor", help="the compiler of all compiled variants (default: inductor)")
    made.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is a GPU")
    made.add_argument("--small", action="store_true", help="tiny sizes, also on a CPU, to test that everything runs")
    made.add_argument("--out", type=Path, metavar="FILE", help="write the result to FILE, as JSON")
    made.add_argument(
        "--append", action="store_true", help="add to the result in the FILE of --out, of the same machine and versions"
    )
    made.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the result to FILE: .png, .svg or .pdf (needs the extra 'plot')"
    )
    made.add_argument("--quiet", action="store_true", help="no progress on stderr")
    made.add_argument(
        "--from", dest="source", type=Path, metavar="FILE", help="show or draw the result in FILE instead of measuring"
    )
    return made


def main(arguments: Sequence[str], builders: Builders = MODELS) -> None:
    """Runs the command. Wrong arguments are reported before anything is measured. builders: the models by name."""
    options = parser()
    given = options.parse_args(arguments)
    line = ProgressLine("attnrewrite bench", not given.quiet)
    try:
        if given.source is not None:
            _show_earlier(given)
            return
        line.say("importing what is measured")
        run = _checked(given, builders)
    except (ValueError, OSError, ImportError) as error:
        options.error(str(error))
    with line:
        _measure(given, *run, builders=builders, command=shlex.join(["attnrewrite", "bench", *arguments]), line=line)


def _show_earlier(given: argparse.Namespace) -> None:
    if given.models or given.kernels or given.out:
        raise ValueError("--from shows an earlier result: leave out --models, --kernels and --out")
    found = results.read(given.source)
    if given.plot is not None:
        plots.plot(found, plotting.possible(given.plot))
    _say(f"{found['device']}, torch {found['packages']['torch']}")
    for record in found.get("kernels", {}).values():
        op_level.show(record, _say)
    for record in found.get("models", {}).values():
        _say(f"\n{record['about']}")
        model_level.show(record, _say)


def _checked(
    given: argparse.Namespace, builders: Builders = MODELS
) -> tuple[torch.device, list[str], list[str], dict[str, op_level.Shape], list[variants.Variant], dict[str, Any]]:
    """Checks the arguments. Returns the device, models, kernels, shapes, variants, and the result so far (of --append)."""
    if not given.models and not given.kernels:
        raise ValueError("nothing to measure: give --models, --kernels or both (without names: all of them)")
    if given.rounds < 1:
        raise ValueError(f"--rounds is {given.rounds}: it must be at least 1")
    if given.max_error is not None and not 0 <= given.max_error < math.inf:
        raise ValueError(f"--max-error is {given.max_error}: give a number from 0 on, as 0.02")
    if not 0 <= given.loose < math.inf:
        raise ValueError(f"--loose is {given.loose}: give a number from 0 on, as {LOOSE:g}")
    if given.loose != LOOSE and given.numerics != "sparse":
        raise ValueError(f"--loose is {given.loose:g}, but only --numerics sparse gives queries and keys structure")
    if given.append and given.out is None:
        raise ValueError("--append needs --out FILE, the result to add to")
    kind = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but PyTorch sees no CUDA GPU here")
    if kind == "cpu" and not given.small:
        raise ValueError("published sizes need a CUDA GPU; --small runs everything at tiny sizes on a CPU")
    device = torch.device(kind)
    models = _picked("--models", _spelled(given.models, builders), builders)
    usual = [each.name for each in usual_candidates()]  # without kernels of the hub, which would be downloaded
    kernels = usual if given.kernels == ALL else _picked_kernels("--kernels", given.kernels)
    known = op_level.SMALL if given.small else op_level.SHAPES
    groups = {"named": False, "lines": True}
    if given.shapes in groups:
        shapes = {name: shape for name, shape in known.items() if bool(shape.line) is groups[given.shapes]}
    else:
        shapes = {name: known[name] for name in _picked("--shapes", given.shapes or ALL, known, ";")}
    known_inner(given.inner)
    peers = separate(given.peers or PEERS[kind])
    candidates = _picked_kernels("--candidates", given.candidates) or None
    ways = variants.usual(peers, given.inner, candidates, not given.quiet, given.numerics, given.max_error)
    by_name = {each.name: each for each in ways}
    chosen = [by_name[name] for name in _picked("--variants", given.variants or ALL, by_name, ";")]
    if models:
        imported()
    if given.plot is not None:
        plotting.possible(given.plot)
    result = results.header(device, given.small)
    if given.out is not None:
        writable(given.out)
        if given.out.exists() and not given.append:
            raise ValueError(f"--out {given.out} exists: name another file, or add to it with --append")
        if given.append and given.out.exists():
            try:
                result = results.joined(results.read(given.out), result)
            except ValueError as error:
                raise ValueError(f"--append to {given.out}: {error}") from error
    return device, models, kernels, shapes, chosen, result


def _picked(option: str, given: str | None, known: Iterable[str], separator: str = ",") -> list[str]:
    """Returns the names that the option lists; "all" means every known name. Raises `ValueError` for an unknown name."""
    every = list(known)
    if not given:
        return []
    if given == ALL:
        return every
    found = separate(given) if separator == "," else [name.strip() for name in given.split(separator) if name.strip()]
    for name in found:
        if name not in every:
            near = difflib.get_close_matches(name, every, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(every)}"
            raise ValueError(f"{option} names {name!r}, which is unknown; {hint}")
    if not found:
        raise ValueError(f"{option} is {given!r}: it names nothing")
    return list(dict.fromkeys(found))


def _picked_kernels(option: str, given: str | None) -> list[str]:
    """The kernels that the option lists, as `_picked`, each in the one spelling of its name with its options."""
    plain = [re.split(r"[\[@]", name)[0].strip() for name in separate(given or "")]
    known = _picked(option, given and ",".join(plain), all_kernels())
    if given in (None, "", ALL):
        return known
    try:
        return list(dict.fromkeys(canonical(name) for name in separate(given)))
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


def _spelled(given: str | None, known: Iterable[str]) -> str | None:
    """The names with hyphens as the known ones have them: "wan14b_720p" is "wan-14b-720p"."""
    right = {re.sub("[-_]", "", name): name for name in known}
    return given and ",".join(right.get(re.sub("[-_]", "", name), name) for name in given.split(","))


def _measure(
    given: argparse.Namespace,
    device: torch.device,
    models: list[str],
    kernels: list[str],
    shapes: Mapping[str, op_level.Shape],
    compared: list[variants.Variant],
    result: dict[str, Any],
    builders: Builders,
    command: str,
    line: ProgressLine,
) -> None:
    """Measures one shape or model after the other. Each record is written at once, so an interruption loses only the rest."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    say = functools.partial(_say_behind, line)

    def keep(**found: Any) -> None:
        nonlocal result
        result = results.joined(result, {**{key: result[key] for key in results.SAME}, **found})
        if given.out is not None:
            results.write(given.out, result)

    say(f"attnrewrite bench on {result['device']}, torch {result['packages']['torch']}")
    keep(commands=[command])
    try:
        if kernels:
            _kernels(given, device, dtype, kernels, shapes, keep, line)
        rate, made = None, None
        if models:
            line.say("matmuls")
            keep(ceiling=[matmul_rate(device, dtype)])
            rate = list(result["ceiling"][-1].values())[-1]
        for name in models:
            try:
                line.say(f"{name}: making the model")
                made = builders[name](
                    Place(device, dtype, given.small, structured=given.numerics == "sparse", loose=given.loose)
                )
                found = model_level.measure(
                    made, compared, given.rounds, say, rate, functools.partial(_about, line, name)
                )
            except torch.OutOfMemoryError as error:  # continue: the next model may be smaller
                found = {"about": name, "variants": {}, "failed": {"all": words(error)}}
                say(f"{name}: {words(error)}")
            made = None  # frees its memory for the next model
            keep(models={name: found})
            if device.type == "cuda":
                torch.cuda.empty_cache()
    except KeyboardInterrupt:
        print("interrupted" + (f"; what was measured is in {given.out}" if given.out else ""), file=sys.stderr)
        sys.exit(130)
    finally:
        if given.plot is not None and (result.get("models") or result.get("kernels")):
            plots.plot(result, given.plot)


def _kernels(
    given: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype,
    kernels: list[str],
    shapes: Mapping[str, op_level.Shape],
    keep: Callable[..., None],
    line: ProgressLine,
) -> None:
    """Measures all shapes. The matmul rate is measured before and after: on a cold and on a hot GPU."""
    say = functools.partial(_say_behind, line)
    here, missing = op_level.kernels(kernels, device)
    for name, why in missing.items():
        say(f"{name}: {why}")
    if not here:
        raise SystemExit(f"attnrewrite bench: none of {', '.join(kernels)} runs on this machine")
    line.say("matmuls")
    keep(ceiling=[matmul_rate(device, dtype)], missing=missing)
    for name, shape in shapes.items():
        about = functools.partial(_about, line, name)
        found = op_level.measure(name, shape, here, device, dtype, given.inner, say, about)
        keep(kernels={name: found})
    rates = matmul_rate(device, dtype)
    keep(ceiling=[rates])
    say("\nmatmul: " + ", ".join(f"{size}: {rate:.1f} TFLOP/s" for size, rate in rates.items()))


def _about(line: ProgressLine, name: str, text: str, detail: bool = False) -> None:
    line.say(f"{name}: {text}", detail)


def _say_behind(line: ProgressLine, text: str) -> None:
    line.end()
    _say(text)


def _say(line: str) -> None:
    print(line, flush=True)
