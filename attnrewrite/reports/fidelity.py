"""`Fidelity`: the result of `check` as a table, as JSON and as a picture."""

from __future__ import annotations

import json
import math
import os
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files import writable, write_whole
from ..graphs.eager_calls import EagerCall
from ..planning.sites import NearMiss
from ..planning.tables import cells, count, eager_lines, folded, near_miss_lines
from ..version import __version__
from .fidelity_picture import draw
from .pictures import possible
from .reproducing import script
from .site_fidelity import Outputs, SiteFidelity

COMPILED = (
    "Each attention was right by itself, on the tensors of an uncompiled run, so the fault lies in what the compiler makes "
    "of a kernel in this model. Give some sites another kernel (rules=) to see which one it is, or compile with inner='eager'"
)


@dataclass(frozen=True)
class Fidelity:
    """The result of `attnrewrite.check`: the error of each attention against float64, and of the model's output.

        print(fidelity)                  # a table, and the first site that goes wrong
        fidelity.plot("check.png")       # a picture

    `to_json` has everything.

    policy: the choices of kernels.
    sites: a `SiteFidelity` for each attention, in the order in which they ran.
    output: the model's output, compared with the unchanged model's.
    missing: names of sites that were not compared: torch.nn's fused layers, and sites inside torch.func transforms.
    machine: the machine of the first graph with attention; "" without one.
    near_misses: softmaxes that resemble an attention and were not recognised as one.
    eager_calls: the places at which the compiled model called attention outside of every graph, where nothing is swapped.
    """

    policy: str
    sites: tuple[SiteFidelity, ...]
    output: Outputs
    missing: tuple[str, ...] = ()
    machine: str = ""
    near_misses: tuple[NearMiss, ...] = ()
    eager_calls: tuple[EagerCall, ...] = ()

    @property
    def first_wrong(self) -> SiteFidelity | None:
        """The first site that goes wrong: its values are not finite, or its error is above its limit. None if there is none."""
        return next((site for site in self.sites if site.wrong), None)

    @property
    def ok(self) -> bool:
        """True if no site goes wrong and the output is not wrong: it has no more non-finite values than that of the unchanged
        model, and its error is one that rounding and the kernels explain (`Outputs.limit`)."""
        return self.first_wrong is None and not self.output.wrong

    def __str__(self) -> str:
        wrong = sum(bool(site.wrong) for site in self.sites)
        alone = " by itself, but the output is" if self.output.wrong else ""
        said = f"{wrong} of them wrong" if wrong else f"none of them wrong{alone}"
        lines = [f"attnrewrite check ({self.policy}): {count(len(self.sites), 'attention site')}, {said}"]
        lines += [f"on {self.machine}"] if self.machine else []
        lines.append(f"output: {self.output}")
        if not self.sites and not self.missing:
            rest = [*near_miss_lines(self.near_misses), *eager_lines(self.eager_calls)]
            return "\n".join([*lines, "no attention was found that could be looked at", *rest])
        if (first := self.first_wrong) is not None:
            text = f"first site that goes wrong: {first.name} ({first.kernel}): {first.wrong}"
            lines += textwrap.wrap(text, 120, subsequent_indent="    ")
        elif self.output.wrong:
            lines += textwrap.wrap(
                f"the output is wrong: {self.output.wrong}. {COMPILED}", 120, subsequent_indent="    "
            )
        lines += self._table()
        if empty := [site.name for site in self.sites if not site.accuracy.rows]:
            lines.append(f"nothing to compare, no row sees a key: {folded(empty)}")
        lines += [f"not looked at: {', '.join(self.missing)}"] if self.missing else []
        lines += [*near_miss_lines(self.near_misses), *eager_lines(self.eager_calls)]
        return "\n".join(lines)

    def _table(self) -> list[str]:
        """A row for each group of sites with equal calls, kernels and verdicts: the site with the largest error stands for it,
        with the group's largest counts of NaN and infinity."""
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

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": 1,
            "policy": self.policy,
            "machine": self.machine,
            "first_wrong": self.first_wrong.name if self.first_wrong is not None else None,
            "output": {
                "relative_error": _number(self.output.relative_error),
                "psnr_db": _number(self.output.psnr_db),
                "not_finite": self.output.bad,
                "not_finite_before": self.output.bad_before,
                "limit": _number(self.output.limit),
                "wrong": self.output.wrong,
            },
            "missing": list(self.missing),
            "near_misses": [asdict(each) for each in self.near_misses],
            "eager_calls": [asdict(each) for each in self.eager_calls],
            "sites": [site.to_dict() for site in self.sites],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def repro(
        self, site: str | SiteFidelity, path: str | os.PathLike[str] | None = None, inner: str = "inductor"
    ) -> str:
        """Returns a stand-alone script for one site, as `Report.repro`, with tensors that lie in memory as the site's own
        in this run.

        site: a name or an entry of `sites`.
        path: a file to which the script is written, too.
        inner: as in `Report.repro`.

        Raises the errors of `Report.repro`.
        """
        known = {each.name: each for each in self.sites}
        if isinstance(site, str) and site not in known:
            raise ValueError(f"site is {site!r}: it is one of {', '.join(map(repr, known))}")
        chosen = known[site] if isinstance(site, str) else site
        text = script(chosen.site, __version__, chosen.layouts, inner)
        if path is not None:
            writable(file := Path(path))
            write_whole(file, text)
        return text

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the error of every site beside its limit, in the order in which the sites run. If the output holds images, it
        also draws the first image of the unchanged model, that of the swapped model, and their difference.

        path: a .png, .svg or .pdf file.

        Raises `ImportError` without matplotlib (extra `plot`), `ValueError` for another ending, `OSError` for a path that
        cannot be written.
        """
        heading = f"attnrewrite check ({self.policy})\n{self.machine}\noutput: {self.output}"
        draw(self.sites, self.output.pictures, heading, possible(path))


def _badness(site: SiteFidelity) -> float:
    error = site.accuracy.relative_error
    return math.inf if math.isnan(error) else error


def _number(value: float | None) -> float | str | None:
    return str(value) if value is not None and not math.isfinite(value) else value
