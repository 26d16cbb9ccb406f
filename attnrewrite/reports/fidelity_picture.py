"""Draws the picture of a `Fidelity`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .pictures import COLOURS, figure, save
from .site_fidelity import SiteFidelity


def draw(sites: Sequence[SiteFidelity], pictures: tuple[Tensor, ...], heading: str, file: Path) -> None:
    """Draws errors and images to `file`. pictures: the first image of the unchanged and of the swapped model, or ()."""
    made = figure(12, 9 if pictures else 5)
    made.suptitle(heading, fontsize="small")
    upper, *lower = made.subfigures(2, 1, height_ratios=(5, 4)) if pictures else [made]
    _errors(upper.subplots(), sites)
    for part in lower:
        _images(part, pictures)
    save(made, file)


def _errors(axis: Any, sites: Sequence[SiteFidelity]) -> None:
    """Draws errors on a logarithmic scale: non-finite ones at the upper edge, sites that go wrong with a red cross."""
    kernels = list(dict.fromkeys(site.kernel for site in sites))
    errors = [site.accuracy.relative_error for site in sites]
    finite = [error for error in errors if math.isfinite(error) and error > 0]
    floor = min([*finite, *(site.limit for site in sites)], default=1e-6) / 3
    top = max([*finite, *(site.limit for site in sites)], default=1.0) * 10
    for number, kernel in enumerate(kernels):
        points = [
            (place, min(max(error, floor), top) if math.isfinite(error) else top)
            for place, (site, error) in enumerate(zip(sites, errors, strict=True))
            if site.kernel == kernel
        ]
        # The space before the name: matplotlib leaves labels that begin with an underscore out of the legend.
        axis.plot(*zip(*points, strict=True), "o", color=COLOURS[number % len(COLOURS)], label=f" {kernel}")
    wrong = [(place, min(max(error, floor), top) if math.isfinite(error) else top)
             for place, (site, error) in enumerate(zip(sites, errors, strict=True)) if site.wrong]  # fmt: skip
    if wrong:
        axis.plot(*zip(*wrong, strict=True), "x", color="#D55E00", markersize=12, markeredgewidth=2, label="goes wrong")
    if sites:
        axis.step(range(len(sites)), [site.limit for site in sites], where="mid", color="#999999", label="limit")
        axis.set_yscale("log")
        axis.set_ylim(floor / 1.5, top * 1.5)
        axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1.0))
    every = max(1, len(sites) // 40)
    axis.set_xticks(
        range(0, len(sites), every), [site.name for site in sites[::every]], rotation=60, ha="right", fontsize=6
    )
    axis.set_ylabel("relative error to float64\n(not finite: at the upper edge)")
    axis.set_xlabel("attention site, in the order in which they run")
    axis.grid(alpha=0.3)


def _images(part: Any, pictures: tuple[Tensor, ...]) -> None:
    before, after = pictures
    low, high = before.min().item(), before.max().item()
    apart = (after - before).abs().nan_to_num(nan=math.inf)
    largest = max(apart[apart.isfinite()].max().item() if bool(apart.isfinite().any()) else 0.0, 1e-12)
    shown = (
        ("unchanged model", (before - low) / max(high - low, 1e-12)),
        ("swapped, compiled", ((after - low) / max(high - low, 1e-12)).nan_to_num(nan=0.0)),
        (f"difference, white is {largest:.1e}", apart / largest),
    )
    for axis, (title, image) in zip(part.subplots(1, 3), shown, strict=True):
        axis.imshow(image.clamp(0, 1).squeeze(-1).numpy(), cmap="gray")
        axis.set_title(title, fontsize="small")
        axis.set_axis_off()
