"""Rules that match nothing, and the errors that `strict` raises where a whole model is known."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Mapping, Sequence

from torch.nn import Module

from ..graphs.modules import named
from ..planning.planner import AttentionRefusedError, refuse
from ..planning.policies import KINDS, Policy, matches
from ..planning.sites import Site
from ..reports.report import Report
from .model_parts import _join


def without_sites(policy: Policy, sites: Sequence[Site]) -> list[str]:
    """The patterns of rules that match none of the sites."""
    return [pattern for pattern, _ in policy.rules if not any(matches(pattern, site.call) for site in sites)]


def without_modules(policy: Policy, roots: Mapping[str, Module]) -> dict[str, str]:
    """The patterns of rules that match no module, each with the remedy. roots: the compiled modules by path."""
    paths = [_join(path, name) for path, root in roots.items() for name, _ in named(root)]
    prefixes = {path.rsplit(".", depth)[0] for path in roots for depth in range(path.count(".") + 1)} - {""}
    found = {}
    for pattern, _ in policy.rules:
        if pattern in KINDS or _matches_any(pattern, paths):
            continue
        with_prefix = [f"{prefix}.{pattern}" for prefix in sorted(prefixes)]
        meant = [each for each in with_prefix if _matches_any(each, paths)]
        within = pattern.partition(".")[2]
        if meant:
            remedy = f"in a pipeline: {' or '.join(map(repr, meant))}"
        elif within and _matches_any(within, paths):
            remedy = f"paths begin at the model that is set: {within!r}"
        else:
            remedy = f"the nearest is {nearest(pattern, [*filter(None, paths), *KINDS])!r}"
        found[pattern] = remedy
    return found


def nearest(pattern: str, names: Collection[str]) -> str:
    return difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)[0]


def _matches_any(pattern: str, paths: Collection[str]) -> bool:
    plain = pattern.split("#")[0]  # '#': one of several calls of a module, known only from the graph
    return any(fnmatch.fnmatchcase(path, plain) for path in paths)


def hold_strictly(report: Report) -> None:
    """Raises `AttentionRefusedError` for a whole model that has no attention, or an attention that no choice may take, and
    `ValueError` for a path of a rule that matches nothing. A kind ("cross") that the model does not have is no slip."""
    if not report.sites:
        near = "".join(f"\n  near miss: {each}" for each in report.near_misses)
        eager = "".join(f"\n  in no graph: {each}" for each in report.eager_calls)
        raise AttentionRefusedError(f"strict=True, and no attention was found{near}{eager}")
    refuse(report.sites)
    names = [site.name for site in report.sites]
    unmatched = [pattern for pattern in report.unmatched_rules if pattern not in KINDS]
    if unmatched:
        lines = [f"  {pattern!r}; one of the sites is {nearest(pattern, names)!r}" for pattern in unmatched]
        raise ValueError(f"strict=True, and rules match none of the {len(names)} attention sites:\n" + "\n".join(lines))
