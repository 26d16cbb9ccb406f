"""A tuned plan as a table to read."""

from __future__ import annotations

import textwrap

from .measurements import Measurement
from .plans import Plan, Site
from .reports import cells, count, folded


def table(plan: Plan) -> str:
    """A row for each group of sites that differ in their names alone; under it every kernel, the fastest first, then what
    was dropped and what was refused."""
    groups: dict[object, list[Site]] = {}
    for site in plan.sites:
        key = (repr({**vars(site.call), "site": "", "role": ""}), site.chosen, site.measured)
        groups.setdefault(key, []).append(site)
    lines = [_heading(plan, len(groups))]
    rows = [("site", "query (B, H, S, D)", "key, value", "dtype", "mask", "kernel")]
    rows += [
        (folded([site.name for site in sites]), *cells(sites[0].call), sites[0].chosen or "(unchanged)")
        for sites in groups.values()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    texts = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append(texts[0])
    everywhere = set.intersection(*(_refused(sites[0]) for sites in groups.values())) if groups else set()
    for text, sites in zip(texts[1:], groups.values(), strict=True):
        lines.append(text)
        lines += [f"    {line}" for line in (*_measured(sites[0]), *_by_code(_refused(sites[0]) - everywhere))]
    lines += (["refused at every site:"] if everywhere else []) + [f"    {line}" for line in _by_code(everywhere)]
    return "\n".join(lines)


def _heading(plan: Plan, groups: int) -> str:
    sites = count(len(plan.sites), "attention site")
    if plan.tuning is None:
        return f"plan of {sites}, not measured"
    tuning = plan.tuning
    what = f"plan of {tuning.model}: {sites}, {groups} of them distinct, measured in {tuning.seconds:.1f} s"
    limit = f", errors up to {tuning.max_error:g}" if tuning.max_error is not None else ""
    ended = "" if tuning.complete else "; ended by Ctrl-C, not all of it was measured"
    gain = f"a kernel is worth changing to from {tuning.min_gain:.0%} on"
    return f"{what} ({tuning.numerics}{limit}; {gain}){ended}\n" + "\n".join(
        f"on {machine}" for machine in tuning.machines
    )


def _measured(site: Site) -> list[str]:
    timed = sorted(
        (each for each in site.measured if each.milliseconds is not None), key=lambda each: each.milliseconds or 0.0
    )
    native = next((each.milliseconds for each in timed if each.name == "native"), None)
    width = max((len(each.name) for each in timed), default=0)
    lines = [_timed(each, native, width) for each in timed]
    for each in site.measured:
        if each.milliseconds is None:
            lines += textwrap.wrap(f"{each.name} dropped: {each.dropped}", 112, subsequent_indent="  ")
    return lines


def _refused(site: Site) -> set[tuple[str, str]]:
    return {(refused.code.value, name) for name, refused in site.refusals}


def _by_code(refused: set[tuple[str, str]]) -> list[str]:
    codes = sorted({code for code, _ in refused})
    texts = [f"{code}: {', '.join(sorted(name for each, name in refused if each == code))}" for code in codes]
    return [line for text in texts for line in textwrap.wrap(text, 98, subsequent_indent="  ")]


def _timed(each: Measurement, native: float | None, width: int) -> str:
    assert each.milliseconds is not None
    parts = [f"{each.name:<{width}}  {each.milliseconds:9.4g} ms"]
    parts.append(f"+- {each.spread:5.1%}" if each.spread is not None else " " * 9)
    parts.append(f"{native / each.milliseconds:5.2f}x" if native else " " * 6)
    parts.append(f"error {each.error:.1e}" if each.error is not None else "")
    parts.append(each.dropped or "")
    return "  ".join(parts).rstrip()
