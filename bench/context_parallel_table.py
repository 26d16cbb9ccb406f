"""Prints and draws what bench/context_parallel.py measured: ratios to one GPU, within each run.

    python bench/context_parallel_table.py bench/results/context_parallel_2xh200.json [--draw docs/context_parallel_2xh200.png]
    python bench/context_parallel_table.py bench/results/context_parallel_2xh200.json --estimates

`--estimates` compares what `explain` estimates of exchanges with the time that was lost: no GPU is needed, and diffusers is.

The file has {"runs": [...]}: one or several results that bench/context_parallel.py wrote with `--json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from context_parallel import AUTO, GRAPHS, NATIVE, ONE, PEER, WHOLE

from attnrewrite.reports.pictures import COLOURS, figure, save

VARIANTS = [who + how for who in (ONE, PEER, NATIVE, AUTO) for how in ("", WHOLE, GRAPHS)]


def rows(runs: list[dict[str, Any]]) -> list[tuple[str, dict[str, dict[str, Any]]]]:
    """(model, its variants) of each run; a model that several runs measured is there several times."""
    return [(model, run["models"][model]) for run in runs for model in run["models"]]


def table(runs: list[dict[str, Any]]) -> str:
    lines = ["| model | variant | ms | ratio | error to one GPU | GiB a rank |", "|---|---|---|---|---|---|"]
    for model, found in rows(runs):
        for label in (*VARIANTS, *(label for label in found if label not in VARIANTS)):  # last those of a kind
            row = found.get(label)
            if row is None:
                continue
            if "ms" not in row:
                lines.append(f"| {model} | {label} | | | {row['error'].splitlines()[0][:90]} | |")
                continue
            ratio, error = found[ONE]["ms"] / row["ms"], row["relative_error"]
            told = "" if error is None else f"{error:.1e}"  # None: a rank without the others
            lines.append(f"| {model} | {label} | {row['ms']:.1f} | {ratio:.2f}x | {told} | {row['gib']:.1f} |")
    return "\n".join(lines)


def draw(runs: list[dict[str, Any]], title: str, path: Path) -> None:
    """One group of bars a model: the ratio of each variant to one GPU's regional compilation, each of the last run that has it.
    Variants of kinds are left out."""
    groups: dict[str, dict[str, float]] = {}
    for model, found in rows(runs):
        ratios = {label: found[ONE]["ms"] / row["ms"] for label, row in found.items() if "ms" in row}
        groups.setdefault(model, {}).update(ratios)
    made = figure(12, 5)
    axis = made.subplots()
    width = 0.85 / len(VARIANTS)
    for place, label in enumerate(VARIANTS):
        colour, hatch = COLOURS[place // 3 % len(COLOURS)], ("", "//", "xx")[place % 3]
        points = [
            (number + place * width, ratios[label]) for number, ratios in enumerate(groups.values()) if label in ratios
        ]
        if points:
            axis.bar(*zip(*points, strict=True), width, color=colour, hatch=hatch, edgecolor="white", label=label)
    axis.set_xticks([number + 0.4 for number in range(len(groups))], list(groups))
    axis.set_ylabel("times as fast as one GPU with torch.compile")
    axis.axhline(2.0, color="#999999", linewidth=1)
    made.legend(loc="outside lower center", fontsize=8, ncols=4)
    axis.set_title(title)
    save(made, path)


def estimates(runs: list[dict[str, Any]]) -> str:
    """Whole models with PyTorch's own attention: what `explain` estimates, and what two GPUs take beyond half of one's time."""
    import torch

    import attnrewrite
    from attnrewrite.commands.bench.denoiser import Place
    from attnrewrite.commands.bench.denoisers import MODELS

    place = Place(torch.device("meta"), torch.bfloat16)
    lines = [
        "| | MiB | exchanges | products | share | one GPU | shared | lost | share |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        machine = attnrewrite.Machine.from_dict(run["machine"])
        for name, found in run["models"].items():
            hows = [how for how in (WHOLE, GRAPHS) if {ONE + how, NATIVE + how} <= found.keys()]
            if not hows:
                continue
            denoiser = MODELS[name](place)
            try:
                with torch.no_grad():
                    report = attnrewrite.explain(
                        denoiser.model,
                        **denoiser.inputs,
                        return_dict=False,
                        backend="native",
                        machine=machine,
                        context_parallel=run["ranks"],
                    )
            except RuntimeError as error:
                lines.append(f"| {name} | {str(error).partition(' (')[0]} | | | | | | | |")
                continue
            (graph,) = report.graphs
            sharing = graph.parallel
            assert sharing is not None
            assert sharing.estimate is not None
            assert sharing.estimate.share is not None
            estimate = sharing.estimate
            for how in hows:
                one, shared = found[ONE + how]["ms"], found[NATIVE + how]["ms"]
                lost = shared - one / run["ranks"]
                lines.append(
                    f"| {name}{how} | {sharing.mib:.3g} | {estimate.exchanges:.2g} ms | {estimate.products:.3g} ms | "
                    f"{estimate.share:.1%} | {one:.1f} ms | {shared:.1f} ms | {lost:.1f} ms | {lost / shared:.0%} |"
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--draw", type=Path, metavar="PICTURE")
    parser.add_argument("--estimates", action="store_true")
    options = parser.parse_args()
    runs = json.loads(options.results.read_text())["runs"]
    print(estimates(runs) if options.estimates else table(runs))
    if options.draw:
        first, packages = runs[0], runs[0]["packages"]
        title = f"{first['ranks']} x {first['device']}, torch {packages['torch']}, diffusers {packages['diffusers']}"
        draw(runs, title, options.draw)


if __name__ == "__main__":
    main()
