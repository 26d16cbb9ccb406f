"""Formats sites as text: the table of a plan, and the cells and names that all tables share."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..graphs.eager_calls import EagerCall
from ..kernels.calls import AttentionCall
from .measurements import Measurement, Tuning, worst
from .sites import NearMiss, Site


def tuned_table(sites: Sequence[Site], tuning: Tuning | None) -> str:
    """A row for each group of sites that differ only in their names; below it the timed kernels, the fastest first, then the
    dropped and the refused kernels."""
    groups: dict[object, list[Site]] = {}
    for site in sites:
        numerics = site.inexact and site.inexact.numerics
        key = (repr({**vars(site.call), "site": "", "role": ""}), site.chosen, site.measured, numerics)
        groups.setdefault(key, []).append(site)
    lines = [_heading(len(sites), len(groups), tuning)]
    if not groups:
        return "\n".join([*lines, "no attention found"])
    rows = [("site", "query (B, H, S, D)", "key, value", "dtype", "mask", "kernel")]
    rows += [
        (folded([site.name for site in group]), *cells(group[0].call), group[0].chosen or "(unchanged)")
        for group in groups.values()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    texts = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append(texts[0])
    everywhere = set.intersection(*(_refused(group[0]) for group in groups.values()))
    for text, group in zip(texts[1:], groups.values(), strict=True):
        lines.append(text)
        coarse = [site.inexact for site in group if site.inexact]
        lines += [f"    {group[0].chosen} is {max(coarse, key=lambda each: each.error)}"] if coarse else []
        lines += [f"    {line}" for line in (*_measured(group), *_by_code(_refused(group[0]) - everywhere))]
    lines += (["refused at every site:"] if everywhere else []) + [f"    {line}" for line in _by_code(everywhere)]
    return "\n".join(lines)


def _heading(number: int, groups: int, tuning: Tuning | None) -> str:
    sites = count(number, "attention site")
    if tuning is None:
        return f"plan of {sites}, not measured"
    what = f"plan of {tuning.model}: {sites}, {groups} of them distinct, measured in {tuning.seconds:.1f} s"
    limit = f", errors up to {tuning.max_error:g}" if tuning.max_error is not None else ""
    ended = "" if tuning.complete else "; ended by Ctrl-C, not all of it was measured"
    gain = f"a kernel is worth changing to from {tuning.min_gain:.0%} on"
    lines = [f"{what} ({tuning.numerics}{limit}; {gain}){ended}"]
    lines += [f"{tuning.output}"] if tuning.output is not None else []
    return "\n".join([*lines, *(f"on {machine}" for machine in tuning.machines)])


def _measured(group: Sequence[Site]) -> list[str]:
    """The kernels of sites that share times. Errors are the largest of the group."""
    of_all = [{each.name: each.error for each in site.measured} for site in group]
    site = replace(
        group[0],
        measured=tuple(
            replace(each, error=worst(errors.get(each.name) for errors in of_all)) for each in group[0].measured
        ),
    )
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


def cells(call: AttentionCall) -> tuple[str, str, str, str]:
    """The table cells of a call: query, key and value, dtype, mask."""
    keys = f"{call.kv_heads} x {call.kv_len} x {call.head_dim}"
    if call.value_dim != call.head_dim:
        keys += f"/{call.value_dim}"
    mask = str(call.mask) + (f", dropout {call.dropout:g}" if call.dropout else "")
    return f"({call.batch}, {call.heads}, {call.q_len}, {call.head_dim})", keys, call.dtype, mask


def folded(names: list[str]) -> str:
    """blocks.0.attn, blocks.1.attn, blocks.2.attn -> blocks.0-2.attn (3)"""
    if len(names) == 1:
        return names[0]
    patterns: dict[str, list[int]] = {}
    for name in names:
        numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", name)
        shape = re.sub(r"(?<=\.)\d+(?=\.|$)", "{}", name, count=1)
        patterns.setdefault(shape, []).extend(int(number) for number in numbers[:1])
    parts = [shape.replace("{}", _ranges(numbers)) if numbers else shape for shape, numbers in patterns.items()]
    text = ", ".join(parts)
    return (text if len(text) <= 60 else f"{parts[0]}, ...") + f" ({len(names)})"


def _ranges(numbers: list[int]) -> str:
    """0, 1, 2, 5 -> 0-2,5"""
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def eager_lines(calls: Iterable[EagerCall]) -> list[str]:
    """A line for each place that called attention outside of every graph."""
    return [line for each in calls for line in textwrap.wrap(f"in no graph: {each}", 116, subsequent_indent="    ")]


def near_miss_lines(near_misses: Iterable[NearMiss]) -> list[str]:
    """A line for each reason, with all modules that have it."""
    modules: dict[str, list[str]] = {}
    for each in near_misses:
        modules.setdefault(each.reason, []).append(each.site)
    return [
        line
        for reason, names in modules.items()
        for line in textwrap.wrap(
            f"not recognised as attention: softmax at {folded(names)}: {reason}", 116, subsequent_indent="    "
        )
    ]
