"""`with_backend("tune")`: measures kernels when a call is compiled for the first time."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..graphs.inner_compilers import Inner
from ..graphs.sizes import UnbackedSizeError
from ..kernels.calls import AttentionCall
from ..kernels.machines import Machine
from ..kernels.records import Numerics
from ..planning.policies import Candidate
from ..planning.selectors import AUTO, candidate, measured_candidates, usual_candidates
from ..planning.sites import Site
from ..planning.this_machine import machine_of
from . import cache
from .example_tensors import example, numbers
from .measure_site import measure_site
from .of_all_ranks import chosen_together
from .search import Search

logger = logging.getLogger("attnrewrite")


@dataclass(frozen=True)
class Tune:
    """`with_backend("tune")`: measures a call the first time it is compiled, and keeps the result on disk (cache.py)."""

    name: str = "tune"
    inner: Inner = "inductor"  # the compiler of the graphs in which kernels are measured
    candidates: Callable[[], tuple[Candidate, ...]] = usual_candidates
    measure: Callable[..., Site] = measure_site

    def select(self, call: AttentionCall, machine: Machine, limit: Numerics, measure: bool) -> tuple[Candidate, ...]:
        auto = functools.partial(AUTO.select, call, machine, limit)
        if call.obstacle is not None:
            return (candidate("native"),)
        try:
            asked = numbers(call)
        except UnbackedSizeError:
            return auto()
        search = Search(self.candidates(), limit, inner=self.inner)
        site = cache.load(asked, machine, search)
        if site is None and measure and not call.needs_grad and _is_here(machine):
            logger.info("measuring kernels for %s", call.described())
            site = self.measure(example(asked, torch.device(machine.torch_device)), machine, search)
            cache.save(site, machine, search)
        if site is None:
            return auto()
        return (*measured_candidates(chosen_together(site, search.min_gain), "tune"), *auto())

    def compiled_by(self, inner: Inner) -> Tune:
        return replace(self, inner=inner)

    def libraries(self, machine: Machine) -> None:
        return None


def _is_here(machine: Machine) -> bool:
    """Whether `machine` is this one. A described machine (`explain(machine=...)`) is not here to measure on."""
    return machine.device in ("cpu", "cuda", "rocm") and machine_of(torch.device(machine.torch_device)) == machine
