"""Draws a result: kernels by sequence length below the matmul rate, kernels at named shapes, models by variant."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...kernels.records import Numerics
from ...reports.pictures import COLOURS, MARKERS, figure, save
from .model_level import best_peer
from .op_level import class_of
from .variants import AUTO, EAGER, PLAIN, QUANTISED, SPARSE, TUNED
from .variants import PEER as PREFIX

# The bars of a model, in order, with their colours: blue for kernels that only round, green for quantised ones, pink for sparse
# ones. The bar of diffusers' dispatcher is its fastest kernel.
PEER = "diffusers, best name"
BARS = {
    EAGER: "#999999", PLAIN: "#000000", PEER: "#E69F00", AUTO: "#56B4E9", TUNED: "#0072B2", QUANTISED: "#009E73",
    SPARSE: "#CC79A7",
}  # fmt: skip
LINES = {Numerics.QUANTISED: ":", Numerics.SPARSE: "-."}  # of a kernel by its class; "-" for one that only rounds


def plot(result: dict[str, Any], path: Path) -> None:
    """Draws one row each for lines, named shapes and models, if the result has them. Raises as reports/pictures.py does."""
    kernels, models = result.get("kernels", {}), result.get("models", {})
    lines = {name: shape for name, shape in kernels.items() if shape.get("line")}
    named = {name: shape for name, shape in kernels.items() if not shape.get("line")}
    rows = [(each, draw) for each, draw in ((lines, _lines), (named, _named), (models, _models)) if each]
    made = figure(12, 4.6 * max(len(rows), 1))
    made.suptitle(_title(result))
    for part, (content, draw) in zip(_column(made, len(rows)), rows, strict=True):
        draw(part, content, _ceiling(result))
    save(made, path)


def _column(made: Any, count: int) -> Iterable[Any]:
    return made.subfigures(count, 1, squeeze=False)[:, 0] if count else []


def _title(result: dict[str, Any]) -> str:
    packages = result["packages"]
    versions = [f"{name} {packages[name]}" for name in ("torch", "cuda", "cudnn", "diffusers") if name in packages]
    return f"{result['device']}, {', '.join(versions)}"


def _ceiling(result: dict[str, Any]) -> float | None:
    """The median, over all runs in the file, of the matmul rate at the largest size: the rate that the GPU can sustain."""
    found = sorted(list(rates.values())[-1] for rates in result.get("ceiling", []))
    return found[len(found) // 2] if found else None


def _lines(part: Any, shapes: dict[str, Any], ceiling: float | None) -> None:
    """Draws TFLOP/s by sequence length, one panel for each group of shapes."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for shape in shapes.values():
        groups.setdefault(shape["line"], []).append(shape)
    styles = _styles(name for shape in shapes.values() for name in shape["kernels"])
    axes = part.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axis, (group, members) in zip(axes, groups.items(), strict=True):
        members.sort(key=lambda shape: int(shape["call"]["q_len"]))
        for kernel, (colour, marker) in styles.items():
            points = [
                (shape["call"]["q_len"], shape["kernels"][kernel]["tflops"])
                for shape in members
                if "tflops" in shape["kernels"].get(kernel, {})
            ]
            if points:
                axis.plot(
                    *zip(*points, strict=True),
                    color=colour,
                    marker=marker,
                    markersize=4,
                    linewidth=2.5 if kernel == "native" else 1.2,
                    linestyle=LINES.get(class_of(kernel), "-"),
                    label=_label(kernel),
                )
        _ceiling_line(axis, ceiling)
        axis.set_xscale("log", base=2)
        lengths = [shape["call"]["q_len"] for shape in members]
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=30)
        axis.minorticks_off()
        axis.set_xlabel("sequence length (queries = keys); dotted: quantised, dash-dotted: sparse")
        axis.set_title(f"{group}, {members[0]['call']['dtype']}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("TFLOP/s (operations / time)")
    axes[-1].legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.01, 1.0))


def _named(part: Any, shapes: dict[str, Any], ceiling: float | None) -> None:
    """Draws TFLOP/s at each named shape: a column of points, one for each kernel."""
    styles = _styles(name for shape in shapes.values() for name in shape["kernels"])
    axis = part.subplots()
    for kernel, (colour, marker) in styles.items():
        points = [
            (place, shape["kernels"][kernel]["tflops"])
            for place, shape in enumerate(shapes.values())
            if "tflops" in shape["kernels"].get(kernel, {})
        ]
        if points:
            axis.plot(
                *zip(*points, strict=True),
                color=colour,
                marker=marker,
                markersize=5,
                linestyle="none",
                label=_label(kernel),
            )
    _ceiling_line(axis, ceiling)
    axis.set_xticks(range(len(shapes)), list(shapes), rotation=35, ha="right", fontsize="small")
    axis.set_xlabel("attention of published models (sizes: in the JSON, by name)")
    axis.set_ylabel("TFLOP/s (hidden keys count)")
    axis.set_ylim(bottom=0)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.01, 1.0))


def _models(part: Any, models: dict[str, Any], ceiling: float | None) -> None:
    """Draws the speed of a step relative to torch.compile, by model and variant, with the milliseconds on each bar, and the
    error of the output where a variant allows quantised or sparse kernels."""
    axis = part.subplots()
    bars = {
        bar: colour
        for bar, colour in BARS.items()
        if bar != SPARSE or any(bar in _ways(each) for each in models.values())
    }
    width = 0.8 / len(bars)
    for place, (bar, colour) in enumerate(bars.items()):
        found = []
        for position, model in enumerate(models.values()):
            name = best_peer(model["variants"]) if bar == PEER else bar
            row = model["variants"].get(name)
            where = position + (place - (len(bars) - 1) / 2) * width
            if row is not None and "ratio" in row:
                found.append((where, row["ratio"], f"{row['ms']:.3g}" + _error(bar, row)))
            elif name in model["failed"] or (bar == PEER and any(each.startswith(PREFIX) for each in model["failed"])):
                axis.text(
                    where, 0.02, "raises", rotation=90, fontsize="xx-small", ha="center", va="bottom", color=colour
                )
        if not found:
            continue
        places, ratios, words = zip(*found, strict=True)
        drawn = axis.bar(places, ratios, width, color=colour, label=bar)
        axis.bar_label(drawn, words, fontsize="xx-small", rotation=90, padding=2)
    for position, model in enumerate(models.values()):
        if "limit" in model:
            axis.hlines(model["limit"], position - 0.42, position + 0.42, color="#D55E00", linestyle="--", linewidth=1)
    if any("limit" in model for model in models.values()):
        axis.plot([], [], color="#D55E00", linestyle="--", linewidth=1, label="attention at the\nmatmul rate")
    axis.axhline(1.0, color="#000000", linewidth=0.8, linestyle=":")
    axis.set_xticks(range(len(models)), [_title_of(model) for model in models.values()])
    axis.set_ylabel("speed of a step, torch.compile = 1\n(on the bars: milliseconds, error)")
    axis.set_xlabel("model (published widths and tokens, fewer layers)")
    axis.margins(y=0.15)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1.0))


def _ways(model: dict[str, Any]) -> set[str]:
    return {*model["variants"], *model["failed"]}


def _error(bar: str, row: dict[str, Any]) -> str:
    return f", {row['error']:.0e}" if bar in (QUANTISED, SPARSE) else ""


def _title_of(model: dict[str, Any]) -> str:
    """A model's name, and below it that its inputs were given structure."""
    name: str = model["about"].split(",")[0]
    inputs = model.get("inputs", "random")
    return name if inputs == "random" else f"{name}\n({inputs})"


def _ceiling_line(axis: Any, ceiling: float | None) -> None:
    if ceiling is not None:
        axis.axhline(ceiling, color="#000000", linewidth=1, linestyle="--", label=f"matmul, {ceiling:.3g} TFLOP/s")


def _label(kernel: str) -> str:
    """A space comes first: matplotlib leaves labels that begin with an underscore out of legends."""
    return f" {kernel}"


def _styles(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each kernel. No two kernels share both."""
    return {
        name: (COLOURS[place % len(COLOURS)], MARKERS[(place + 2 * (place // len(COLOURS))) % len(MARKERS)])
        for place, name in enumerate(dict.fromkeys(names))
    }
