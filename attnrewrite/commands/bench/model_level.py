"""Measures denoiser steps by variant: eager, torch.compile, diffusers' dispatcher under torch.compile, attnrewrite.

All variants of a model run in turn in one process, each round in another order, and all compile the same regions. The kernel of
diffusers' dispatcher is global to the process. It is set before each step, to "native" unless the variant tests the dispatcher.

ms      the median step, by CUDA events (on a CPU by the wall clock)
ratio   the median over rounds of (torch.compile / variant) in the same round
error   |output - exact| / |exact|, where exact is the output of the unchanged, uncompiled model in float32. The error of
        torch.compile is therefore the error of the model's dtype
site    the largest error of the chosen kernels at a site, against float64 on the site's own tensors, as `tune` measured it
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ...entrances.compilers import AttentionCompiler
from ...graphs.tracing import compiled_graphs, recompilations
from ...graphs.trees import mapped
from ...kernels.calls import SIZES
from ...kernels.records import Numerics
from ...measuring.timing import Stopwatch
from ...planning.measurements import worst
from ...planning.plans import Plan
from ...planning.selectors import Planned
from ...planning.sites import Site
from .denoiser import Denoiser
from .op_level import class_of, products
from .rounds import by_rounds, in_turn, words
from .variants import AGAIN, PLAIN, Variant

RunStep = Callable[[], torch.Tensor]


def exact(denoiser: Denoiser) -> torch.Tensor:
    """The output of the unchanged, uncompiled model in float32."""

    def wide(value: Any) -> Any:
        return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    inputs = mapped(wide, denoiser.inputs)
    output: torch.Tensor = copy.deepcopy(denoiser.model).float()(**inputs, return_dict=False)[0]
    return output


def measure(
    denoiser: Denoiser,
    variants: Iterable[Variant],
    rounds: int,
    say: Callable[[str], object] = print,
    ceiling: float | None = None,
    progress: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Measures all variants of one model and returns its record.

    say: gets the lines of the table at the end.
    ceiling: TFLOP/s of a matmul, for "limit".
    progress: gets what is measured now.

    The record has, among others,
    "inputs": "structured ..." if queries and keys follow position (structure.py), otherwise "random"
    "variants": name -> {"ms", "ratio", "error", ...}; of attnrewrite's also "numerics", the class of its kernels, and, where
        a variant was tuned, "site_error" and "worst_site" (`worst_site`)
    "failed": name -> error, for variants that cannot run
    "again": the ratio of torch.compile to itself, which is the noise
    "limit": `limit_of`, where `ceiling` is given and a variant was tuned
    """
    torch.compiler.reset()
    device = next(denoiser.model.parameters()).device
    started = time.perf_counter()
    say(f"\n{denoiser.about}")
    rows: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    steps: dict[str, tuple[RunStep, str]] = {}
    sites: dict[str, list[Site]] = {}
    plan: Plan | None = None
    # Where a variant raises while traced, Dynamo compiles parts of blocks, which share their code among all variants.
    with torch.no_grad(), recompilations(256):
        progress("a step in float32, the reference")
        reference = exact(denoiser)
        for variant in variants:
            progress(f"compiling {variant.name}")
            try:
                _choose(denoiser, "native")
                backend = variant.backend(denoiser)
                plan = plan or _plan_of(backend)
                step = denoiser.step if backend is None else denoiser.compile(backend)
                output, graphs = _warm(denoiser, step, variant.peer)
                rows[variant.name] = {**_row(variant, backend, output, reference), "graphs": graphs}
                steps[variant.name] = (step, variant.peer)
                if isinstance(backend, AttentionCompiler):
                    sites[variant.name] = list(backend.report.sites)
            except Exception as error:
                failed[variant.name] = words(error)
                torch.compiler.reset()
            finally:
                _choose(denoiser, "native")
        if failed:
            # Where code raises while traced, Dynamo never compiles that frame again, for any backend. After a reset all other
            # variants are compiled again, as if nothing had failed.
            torch.compiler.reset()
            progress("compiling all variants again, since one failed")
            for name, (step, peer) in steps.items():
                _, rows[name]["graphs"] = _warm(denoiser, step, peer)
        progress(f"{rounds} rounds of {len(steps)} variants")
        timed = {name: _timed(denoiser, device, *each) for name, each in steps.items()}
        in_turn(timed, 1)  # not counted: variants with common code may compile again in turn
        before = compiled_graphs()
        times = in_turn(timed, rounds)
        late = compiled_graphs() - before
        _choose(denoiser, "native")
    for name, row in rows.items():
        if plan is not None and (largest := worst_site(sites.get(name, ()), plan)):
            row["worst_site"], row["site_error"] = largest
        row["ms"] = statistics.median(times[name])
        if PLAIN in times:
            row["ratio"] = by_rounds(times[PLAIN], times[name])
        rows[name] = {key: row[key] for key in sorted(row, key=_order)}
    record = {
        "about": denoiser.about,
        "inputs": denoiser.data,
        "variants": rows,
        "failed": failed,
        "rounds": rounds,
        "compiled_while_timed": late,
    }
    if "ratio" in rows.get(AGAIN, {}):
        record["again"] = rows.pop(AGAIN)["ratio"]
    if plan is not None:
        record["plan"] = plan.to_dict()
        if ceiling is not None and PLAIN in rows:
            record["limit"] = limit_of(plan, rows[PLAIN]["ms"], ceiling)
    record["seconds"] = time.perf_counter() - started
    show(record, say)
    return record


def show(record: dict[str, Any], say: Callable[[str], object]) -> None:
    """Passes the table of a record to `say`, line by line."""
    if "inputs" in record:
        say(f"{'queries and keys':24} {record['inputs']}")
    for name, row in record["variants"].items():
        ratio = f"  ratio {row['ratio']:5.3f}" if "ratio" in row else ""
        at_site = f", {row['site_error']:.1e} at the worst site" if "site_error" in row else ""
        say(f"{name:24} {row['ms']:8.2f} ms{ratio}  error {row['error']:.1e}{at_site}  {_kernels(row)}".rstrip())
    if "again" in record:
        say(f"{AGAIN:24} {'':11}  ratio {record['again']:5.3f}")
    for name, text in record["failed"].items():
        say(f"{name:24} {text}")
    if late := record.get("compiled_while_timed"):
        say(f"! {late} graphs were compiled while steps were timed: the times are not valid")
    if "plan" in record:
        plan = Plan.from_dict(record["plan"])
        if plan.tuning is not None:
            limit = (
                ""
                if plan.tuning.max_error is None
                else f", with an error of at most {plan.tuning.max_error:g} at a site"
            )
            say(f"{'tuned':24} in {plan.tuning.seconds:.0f} s{limit}")
        if times := worst_choice(plan):
            say(f"{'tuned':24} at its worst site {times:.3f} times the time of the fastest kernel")
    if "limit" in record:
        say(f"{'limit':24} {'':11}  ratio {record['limit']:5.3f}, attention at the rate of a matmul")


def limit_of(plan: Plan, plain: float, ceiling: float) -> float:
    """The ratio if each attention that is slower than a matmul with as many operations took that matmul's time.

    plain: milliseconds of a step with torch.compile.
    ceiling: TFLOP/s of a matmul. Operations on masked keys count.
    """
    saved = 0.0
    for site in plan.sites:
        bound = products(site.call) / ceiling / 1e9
        native = next((each.milliseconds for each in site.measured if each.name == "native"), None)
        saved += max(0.0, (native or 0.0) - bound)
    return plain / max(plain - saved, 1e-9)


def worst_choice(plan: Plan) -> float | None:
    """The largest ratio, over all sites, of the time of the chosen kernel to the time of the fastest kernel that was not
    dropped. The time of a call is at least the time of its launch."""
    found = []
    for site in plan.sites:
        able = {each.name: each.least for each in site.measured if each.milliseconds and each.dropped is None}
        if site.chosen in able:
            found.append(able[site.chosen] / min(able.values()))
    return max(found, default=None)


def worst_site(sites: Sequence[Site], plan: Plan) -> tuple[str, float] | None:
    """The site at which the chosen kernels have their largest error, by its name in the plan, and that error; None if none of
    them was measured.

    sites: of what was compiled, where equal blocks share one site. The plan has the sites of each block, and what was compiled
    with a site's own kernel stands for it.
    """
    found: dict[str, float | None] = {}
    for place in plan.sites:
        alike = [site for site in sites if all(getattr(place.call, size) == getattr(site.call, size) for size in SIZES)]
        kernels = {site.chosen for site in alike}
        kernels = kernels & {place.chosen} or kernels
        errors = [each.error for each in place.measured if each.name in kernels and each.error is not None]
        if errors:
            found[place.name] = worst(errors)
    largest = worst(found.values())
    return None if largest is None else (next(name for name, error in found.items() if error is largest), largest)


def _plan_of(backend: Any) -> Plan | None:
    choices = backend.policy.choices if isinstance(backend, AttentionCompiler) else ()
    return next((choice.plan for choice in choices if isinstance(choice, Planned)), None)


def _warm(denoiser: Denoiser, step: RunStep, peer: str) -> tuple[torch.Tensor, int]:
    """Runs three steps. Returns the output and the number of graphs compiled."""
    _choose(denoiser, peer)
    before = compiled_graphs()
    for _ in range(3):
        output = step()
    return output, compiled_graphs() - before


def _timed(denoiser: Denoiser, device: torch.device, step: RunStep, peer: str) -> Callable[[], float]:
    def timed() -> float:
        _choose(denoiser, peer)
        return 1e3 * Stopwatch(device).span(step)

    return timed


def _row(variant: Variant, backend: Any, output: torch.Tensor, reference: torch.Tensor) -> dict[str, Any]:
    row: dict[str, Any] = {"error": ((output.float() - reference).norm() / reference.norm()).item()}
    if variant.peer != "native":
        row["peer"] = variant.peer
    if isinstance(backend, AttentionCompiler):
        sites = backend.report.sites
        row["sites"] = _by_name(sites)
        row["numerics"] = max((class_of(each.chosen) for each in sites if each.chosen), default=Numerics.EXACT).word
    return row


def _by_name(sites: Iterable[Site]) -> dict[str, str | None]:
    """The kernel of each site. Blocks of several classes have sites of one name: "attn", and "attn (2)" with another kernel."""
    found: dict[str, str | None] = {}
    for site in sites:
        name, number = site.name, 2
        while found.get(name, site.chosen) != site.chosen:
            name, number = f"{site.name} ({number})", number + 1
        found[name] = site.chosen
    return found


def _choose(denoiser: Denoiser, name: str) -> None:
    """Sets the kernel of diffusers' dispatcher. Not part of the timed step."""
    if hasattr(denoiser.model, "set_attention_backend"):
        with contextlib.ExitStack() as quiet:
            from diffusers.utils import logging  # type: ignore[import-untyped, unused-ignore]

            level = logging.get_verbosity()  # it warns at every call that the feature is experimental
            logging.set_verbosity_error()
            quiet.callback(logging.set_verbosity, level)
            model: Any = denoiser.model
            model.set_attention_backend(name)


def best_peer(variants: dict[str, dict[str, Any]]) -> str | None:
    """The name of the fastest variant of diffusers' dispatcher."""
    peers = [name for name, row in variants.items() if "peer" in row]
    return min(peers, key=lambda name: float(variants[name]["ms"]), default=None)


def _kernels(row: dict[str, Any]) -> str:
    return ", ".join(sorted({kernel or "(unchanged)" for kernel in row.get("sites", {}).values()}))


def _order(key: str) -> int:
    known = ("ms", "ratio", "error")
    return known.index(key) if key in known else len(known)
