"""`Fidelity`: what `check` found, as a table, as JSON, as a picture."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import plotting
from .accuracy import Accuracy, relative_error
from .files import writable, write_whole
from .plans import Site
from .reports import cells, count, folded
from .reproducing import Layout, script


@dataclass(frozen=True)
class SiteFidelity:
    """One attention, one run of it. limit: the relative error that its kernel's numerics explain, and why. bad_inputs: how many
    values of query, key or value are not finite, where any is. run: 1, or more where the site runs several times."""

    site: Site
    accuracy: Accuracy
    limit: float
    limit_reason: str
    bad_inputs: dict[str, int] = field(default_factory=dict)
    run: int = 1
    layouts: tuple[Layout, ...] = ()

    @property
    def call(self) -> Any:
        return self.site.call

    @property
    def name(self) -> str:
        return self.site.name if self.run == 1 else f"{self.site.name} (run {self.run})"

    @property
    def kernel(self) -> str:
        return self.site.chosen or "(unchanged)"

    @property
    def wrong(self) -> str:
        """What is wrong with it, "" if nothing is."""
        of = self.accuracy
        if self.bad_inputs:
            what = ", ".join(f"{number} in its {name}" for name, number in self.bad_inputs.items())
            return f"values that are not finite come in: {what}. What stands before it is wrong"
        if not of.finite:
            return f"its output is not finite, its inputs are: {of.nan} NaN, {of.inf} infinite"
        if self.call.dropout:
            return ""
        if not of.relative_error <= self.limit:
            return f"relative error {of.relative_error:.1e}, where {self.limit_reason} explains {self.limit:.1e}"
        return ""

    def to_json(self) -> dict[str, Any]:
        return {
            "site": self.site.to_json(),
            "run": self.run,
            "accuracy": self.accuracy.to_json(),
            "limit": self.limit,
            "limit_reason": self.limit_reason,
            "bad_inputs": self.bad_inputs,
            "wrong": self.wrong,
            "layouts": [[list(shape), list(strides)] for shape, strides in self.layouts],
        }


@dataclass(frozen=True)
class Outputs:
    """The whole output, compiled and swapped, beside that of the unchanged model.

    relative_error: over all floating tensors together. psnr_db: of the first that is an image or a video (rank 4 or 5, as
    latents are too): 20 log10 of (largest - smallest value of the unchanged model) / root mean square error; None for others.
    bad, bad_before: how many values are not finite, and how many of the unchanged model. pictures: a first image of both.
    """

    relative_error: float
    psnr_db: float | None
    bad: int
    bad_before: int
    pictures: tuple[Tensor, ...] = field(default=(), compare=False, repr=False)

    @staticmethod
    def of(expected: Sequence[Tensor], output: Sequence[Tensor]) -> Outputs:
        """Raises `ValueError` where the two are not of the same shapes."""
        shapes, theirs = [tuple(each.shape) for each in output], [tuple(each.shape) for each in expected]
        if shapes != theirs:
            raise ValueError(
                f"the compiled model returns tensors {shapes}, the unchanged one {theirs}: nothing to compare"
            )
        if not output:
            return Outputs(0.0, None, 0, 0)
        pairs = list(zip(output, expected, strict=True))
        wide = [torch.cat([each.double().flatten().cpu() for each in side]) for side in (output, expected)]
        image = next((pair for pair in pairs if pair[0].dim() in (4, 5)), None)
        bad, bad_before = (int((~each.isfinite()).sum()) for each in wide)
        psnr = None if image is None else _psnr(*image)
        pictures = () if image is None else (_picture(image[1]), _picture(image[0]))
        return Outputs(relative_error(*wide), psnr, bad, bad_before, pictures)

    def __str__(self) -> str:
        parts = [f"relative error {self.relative_error:.2e} to the unchanged model"]
        parts += [f"PSNR {self.psnr_db:.1f} dB"] if self.psnr_db is not None else []
        if self.bad or self.bad_before:
            parts.append(f"{self.bad} values are not finite ({self.bad_before} of the unchanged model)")
        return ", ".join(parts)


@dataclass(frozen=True)
class Fidelity:
    """What `check` found. sites: in the order in which they ran. missing: sites that could not be looked at, torch.nn's fused
    layers and what stands inside torch.func transforms. `str()` is a table, `plot` a picture, `to_json` has everything."""

    policy: str
    sites: tuple[SiteFidelity, ...]
    output: Outputs
    missing: tuple[str, ...] = ()
    machine: str = ""

    @property
    def first_wrong(self) -> SiteFidelity | None:
        """The first site that goes wrong: not finite, or further from float64 than its kernel's numerics explain."""
        return next((site for site in self.sites if site.wrong), None)

    @property
    def ok(self) -> bool:
        """No site goes wrong, and what is not finite in the output is not so in the unchanged model either."""
        return self.first_wrong is None and self.output.bad <= self.output.bad_before

    def __str__(self) -> str:
        wrong = sum(bool(site.wrong) for site in self.sites)
        said = f"{wrong} of them wrong" if wrong else "none of them wrong"
        lines = [f"attnrewrite check ({self.policy}): {count(len(self.sites), 'attention site')}, {said}"]
        lines += [f"on {self.machine}"] if self.machine else []
        lines.append(f"output: {self.output}")
        if not self.sites and not self.missing:
            return "\n".join([*lines, "no attention was found that could be looked at"])
        if (first := self.first_wrong) is not None:
            text = f"first site that goes wrong: {first.name} ({first.kernel}): {first.wrong}"
            lines += textwrap.wrap(text, 120, subsequent_indent="    ")
        lines += self._table()
        lines += [f"not looked at: {', '.join(self.missing)}"] if self.missing else []
        return "\n".join(lines)

    def _table(self) -> list[str]:
        """A row for each group of sites whose calls, kernels and verdicts agree: the worst of each number."""
        groups: dict[Any, list[SiteFidelity]] = {}
        for site in self.sites:
            groups.setdefault((cells(site.call), site.kernel, bool(site.wrong)), []).append(site)
        head = (
            "site",
            "query (B, H, S, D)",
            "kernel",
            "error",
            "limit",
            "SQNR dB",
            "cosine",
            "worst row",
            "NaN",
            "inf",
        )
        rows = [head]
        for (of_call, kernel, wrong), members in groups.items():
            worst = max(members, key=_badness)
            found = worst.accuracy
            rows.append((
                folded([site.name for site in members]) + (" !" if wrong else ""), of_call[0], kernel,
                f"{found.relative_error:.1e}", f"{worst.limit:.1e}", f"{found.sqnr_db:.1f}", f"{found.cosine:.6f}",
                f"{found.worst_row}: {found.worst_error:.1e}", str(max(site.accuracy.nan for site in members)),
                str(max(site.accuracy.inf for site in members)),
            ))  # fmt: skip
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

    def to_json(self) -> str:
        data = {
            "version": 1,
            "policy": self.policy,
            "machine": self.machine,
            "first_wrong": self.first_wrong.name if self.first_wrong is not None else None,
            "output": {
                "relative_error": _number(self.output.relative_error),
                "psnr_db": _number(self.output.psnr_db),
                "not_finite": self.output.bad,
                "not_finite_before": self.output.bad_before,
            },
            "missing": list(self.missing),
            "sites": [site.to_json() for site in self.sites],
        }
        return json.dumps(data, indent=1)

    def repro(self, site: str | SiteFidelity, path: str | os.PathLike[str] | None = None) -> str:
        """As `Report.repro`, with the shapes and strides that the site's tensors had in this run."""
        from . import __version__

        known = {each.name: each for each in self.sites}
        if isinstance(site, str) and site not in known:
            raise ValueError(f"site is {site!r}: it is one of {', '.join(map(repr, known))}")
        chosen = known[site] if isinstance(site, str) else site
        text = script(chosen.site, __version__, chosen.layouts)
        if path is not None:
            writable(file := Path(path))
            write_whole(file, text)
        return text

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the error of every site, in the order in which they run, beside its limit; for images also a first image of the
        unchanged model, of the swapped one, and their difference. path: .png, .svg or .pdf.

        Raises `ImportError` without matplotlib (extra `plot`), `ValueError` for another ending, `OSError` for a place that
        cannot be written to.
        """
        from .fidelity_plot import draw

        draw(self, plotting.possible(path))


def _badness(site: SiteFidelity) -> float:
    error = site.accuracy.relative_error
    return math.inf if math.isnan(error) else error


def _number(value: float | None) -> float | str | None:
    return str(value) if value is not None and not math.isfinite(value) else value


def _psnr(output: Tensor, expected: Tensor) -> float:
    span = (expected.double().max() - expected.double().min()).item()
    apart = (output.double() - expected.double()).square().mean().sqrt().item()
    if not (math.isfinite(span) and math.isfinite(apart)):
        return math.nan
    return math.inf if apart == 0 else 20 * math.log10(span / apart) if span else -math.inf


def _picture(tensor: Tensor) -> Tensor:
    """The first image, or frame, with at most three channels and 512 rows and columns: (rows, columns, channels) in float32."""
    image = tensor[0] if tensor.dim() == 4 else tensor[0, :, 0]
    steps = [max(1, math.ceil(size / 512)) for size in image.shape[1:]]
    channels = 3 if image.shape[0] >= 3 else 1
    return image[:channels, :: steps[0], :: steps[1]].float().permute(1, 2, 0).cpu().clone()
