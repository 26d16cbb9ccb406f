"""Finds the measured site that matches a call, and tells whether a plan was measured on a machine like this one."""

from __future__ import annotations

from collections.abc import Sequence

from ..graphs.sizes import Size, holds
from ..kernels.calls import SIZES, AttentionCall, Mask
from ..kernels.machines import Machine
from .sites import Site

# The fields besides sizes and mask that change a kernel's time. The site's name, its role and the scale do not.
STATIC = ("dtype", "device", "dropout", "needs_grad", "deterministic", "written_as")


def find(sites: Sequence[Site], call: AttentionCall) -> Site | None:
    """The measured site that matches the call, or None. Names are not compared, so a plan of a whole model also serves its
    repeated blocks compiled by themselves. A site with another memory layout of the query, or for which the graph proves
    something else about the same mask (a block knows less than its model), is used only if no site agrees in both.

    Sizes must be equal; a symbolic size must be in [p, 2p), with p the power of two at or below the measured size. `holds` asks
    for that last, and makes it a guard of the compiled code.
    """
    like = [site for site in sites if all(getattr(site.call, name) == getattr(call, name) for name in STATIC)]
    exact = [site for site in like if site.call.layout == call.layout and _same(site.call.mask, call.mask)]
    loose = [site for site in like if site not in exact and _same_tensor(site.call.mask, call.mask)]
    return next((site for site in (*exact, *loose) if _fits(call, site.call)), None)


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
