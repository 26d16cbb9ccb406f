"""Finds the measured site that matches a call, and tells whether a plan was measured on a machine like this one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..graphs.sizes import Size, holds
from ..kernels.calls import SIZES, AttentionCall, Mask
from ..kernels.machines import Machine
from .measurements import worst
from .sites import Site

# The fields besides sizes and mask that change a kernel's time. The site's name, its role and the scale do not.
STATIC = ("dtype", "device", "dropout", "needs_grad", "deterministic", "written_as")


def find(sites: Sequence[Site], call: AttentionCall, names: Sequence[str] = ()) -> Site | None:
    """The measured site that matches the call, or None. Names decide only among alike sites that differ in their kernels, so a
    plan of a whole model also serves its repeated blocks compiled by themselves (`of_name`). A site with another memory layout
    of the query, or for which the graph proves something else about the same mask (a block knows less than its model), is used
    only if no site agrees in both. Of several sites those kernels count that none of them has dropped. The error of a
    quantised or sparse kernel depends on values: at an attention that was not measured, or with another scale, it is dropped,
    and `stale` says so.

    Sizes must be equal; a symbolic size must be in [p, 2p), with p the power of two at or below the measured size. `holds` asks
    for that last, and makes it a guard of the compiled code. The sites of all sizes in that range count.

    names: all names that count, of blocks that share the code. (): the call's.
    """
    like = [site for site in sites if all(getattr(site.call, name) == getattr(call, name) for name in STATIC)]
    exact = [site for site in like if site.call.layout == call.layout and _same(site.call.mask, call.mask)]
    loose = [site for site in like if site not in exact and _same_tensor(site.call.mask, call.mask)]
    first = next((site for site in (*exact, *loose) if _fits(call, site.call)), None)
    if first is None:
        return None
    group = exact if any(site is first for site in exact) else loose
    alike = [site for site in group if _in_one_range(call, site.call, first.call)]
    names = names or (call.site,)
    found = first
    if not _same_kernels(alike):
        chosen = {id(site): site for name in names for site in of_name(alike, name)}
        found = _agreed(list(chosen.values()))
    scaled = [site.name for site in alike if _scale(site.call) == _scale(call)]
    return found if all(_has(scaled, name) for name in names) else _steady(found)


def of_name(sites: Sequence[Site], name: str) -> list[Site]:
    """The sites of that name; if there are none, those whose name ends with it or is its end, as for a part of a pipeline or a
    block by itself; if there are none, all."""
    equal = [site for site in sites if site.name == name]
    return equal or [site for site in sites if same_end(site.name, name)] or list(sites)


def same_end(path: str, other: str) -> bool:
    """Whether one of two paths of modules is the end of the other: blocks.0 and transformer.blocks.0."""
    return f".{path}".endswith(f".{other}") or f".{other}".endswith(f".{path}")


def _agreed(sites: Sequence[Site]) -> Site:
    """A site that stands for several that are alike: a kernel that one of them has dropped is dropped, errors are the worst."""
    measured = []
    for name in dict.fromkeys(each.name for site in sites for each in site.measured):
        found = [each for site in sites for each in site.measured if each.name == name]
        dropped = next((each.dropped for each in found if each.dropped is not None), None)
        measured.append(replace(found[0], error=worst(each.error for each in found), dropped=dropped))
    able = {each.name: each.least for each in measured if each.dropped is None}
    chosen = [site for site in sites if site.chosen in able]
    if not chosen:
        return replace(sites[0], chosen="native", source=None, backend=None, measured=tuple(measured))
    return replace(min(chosen, key=lambda site: able[str(site.chosen)]), measured=tuple(measured))


def _has(measured: Sequence[str], name: str) -> bool:
    """Whether an attention is among those that were measured. One without a path, as of a block by itself, may be any of them
    with its number in its module."""
    if any(same_end(each, name) for each in measured):
        return True
    _, _, number = name.partition("#")
    return "." not in name and any(each.partition("#")[2] == number for each in measured)


def _scale(call: AttentionCall) -> float:
    """Rounded, since a model may compute the usual scale itself."""
    scale = float(call.head_dim) ** -0.5 if call.scale is None else float(call.scale)
    return float(f"{scale:.6g}")


def _steady(site: Site) -> Site:
    """The site without the kernels whose error depends on the values."""
    inexact = {each.name for each in site.measured if each.limit is not None}
    measured = tuple(
        replace(each, dropped=each.dropped or "not measured at this attention") if each.name in inexact else each
        for each in site.measured
    )
    if site.chosen not in inexact:
        return replace(site, measured=measured)
    able = [each for each in measured if each.dropped is None and each.milliseconds is not None]
    fastest = min(able, key=lambda each: each.least).name if able else "native"
    stale = f"{site.chosen} was not measured at this attention, or with another scale"
    return replace(site, chosen=fastest, source=None, backend=None, measured=measured, stale=stale)


def apart(sites: Sequence[Site]) -> list[Site]:
    """The sites whose kernels differ from those of another site with such a call."""
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(repr(like(site.call)), []).append(site)
    return [site for group in groups.values() if not _same_kernels(group) for site in group]


def _same_kernels(sites: Sequence[Site]) -> bool:
    return all((site.chosen, site.measured) == (sites[0].chosen, sites[0].measured) for site in sites)


def like(call: AttentionCall) -> AttentionCall:
    """The call without name, role and scale: equal for calls that take a kernel the same time."""
    return replace(call, site="", role="", scale=None)


def _in_one_range(call: AttentionCall, one: AttentionCall, other: AttentionCall) -> bool:
    """Whether the sizes of two measured calls are equal; where the call's is symbolic, whether they have one power of two."""

    def alike(size: Size, left: Size, right: Size) -> bool:
        numbers = isinstance(left, int) and isinstance(right, int)
        return left == right or (not isinstance(size, int) and numbers and floor(int(left)) == floor(int(right)))

    return all(alike(*(getattr(each, name) for each in (call, one, other))) for name in SIZES)


def _same(one: Mask, other: Mask) -> bool:
    return (one.kind, one.dtype, one.needs_grad, one.window, _broadcasts(one)) == (
        other.kind, other.dtype, other.needs_grad, other.window, _broadcasts(other),
    )  # fmt: skip


def _same_tensor(one: Mask, other: Mask) -> bool:
    """Whether the model passes the same kind of mask, with the same broadcast dimensions."""
    if one.given is None or other.given is None:
        return one.given is other.given and one.kind is other.kind
    return one.given.kind is other.given.kind and _broadcasts(one) == _broadcasts(other)


def _broadcasts(mask: Mask) -> tuple[bool, ...]:
    """Which of the last four dimensions of a mask have size 1. A missing dimension counts as one of size 1."""
    ones = [isinstance(size, int) and size == 1 for size in mask.shape]
    return (True,) * (4 - len(ones)) + tuple(ones)


def _fits(call: AttentionCall, measured: AttentionCall) -> bool:
    return all(_like(getattr(call, name), getattr(measured, name)) for name in SIZES)


def _like(size: Size, measured: Size) -> bool:
    if isinstance(size, int) or not isinstance(measured, int):
        return size == measured if isinstance(size, int) else False
    first = floor(measured)
    return holds(size >= first) and holds(size < 2 * first)


def floor(size: int) -> int:
    """The power of two at or below a size."""
    return 1 << max(0, size.bit_length() - 1)


def foreign(machines: Sequence[Machine], here: Machine) -> str | None:
    """How the machines of a plan differ from `here`, in a property that changes every choice; None if `here` is like one of
    them."""
    there = next((each for each in machines if each.device == here.device), None)
    if there is None:
        return (
            f"it was measured on {' and '.join(each.device for each in machines) or 'nothing'}, this is {here.device}"
        )
    for what, was, now in (
        ("on", there.name or there.device, here.name or here.device),
        ("on compute capability", there.capability, here.capability),
        *((f"with {name}", there.packages.get(name), here.packages.get(name)) for name in ("torch", "cuda", "cudnn")),
    ):
        if was != now:
            return f"it was measured {what} {was}, this is {now}"
    return None
