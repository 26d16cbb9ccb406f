"""`measure_site`: times every kernel that accepts a site, on the site's tensors, and compares its output with float64."""

from __future__ import annotations

import functools
import gc
import random
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernels.calls import AttentionCall
from ..kernels.machines import Machine
from ..kernels.records import Backend
from ..planning.measurements import Measurement
from ..planning.policies import Candidate
from ..planning.sites import Site
from .alike import Alike, Compiled, Errors, compiled_graph
from .capturing import Captured
from .choosing import undecided
from .comparing import Comparison, too_inexact
from .search import Search
from .site_graphs import plan_site
from .timing import Stopwatch, deviation
from .workers import Worker, said

SECONDS = 2.0  # time for the rounds of a site
# Slower than this multiple of the fastest kernel of its own class of numerics and those before it: timed once.
FAR_BEHIND = 3.0
SHORT = 0.1  # seconds: a shorter call is sampled again before it may count as far behind


@dataclass
class Runner:
    """A candidate that ran without an error.

    name: the kernel's name.
    record: the kernel's record for the machine.
    compiled: the kernel in the site's graph.
    call: runs the kernel once, with its backward if the call needs a gradient.
    error: the relative error against float64; None under dropout.
    seconds: time of one call, before the rounds.
    spent: seconds used up of the time limit.
    host: seconds that the host needs to launch one call on a GPU; 0 on a CPU.
    samples: seconds of one call, one sample a round.
    """

    name: str
    record: Backend
    compiled: Compiled
    call: Callable[[], Any]
    error: float | None
    seconds: float
    spent: float
    host: float = 0.0
    samples: list[float] = field(default_factory=list)


class Say(Protocol):
    def __call__(self, text: str, detail: bool = False) -> None:
        """Gets what is measured now. detail: too often for a log."""


def silent(text: str, detail: bool = False) -> None:
    return None


Clock = Callable[[torch.device], Stopwatch]
Free = Callable[[torch.device], int | None]


def free_memory(device: torch.device) -> int | None:
    """Bytes; None if the system does not report them."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def measure_site(
    captured: Captured,
    machine: Machine,
    search: Search,
    say: Say = silent,
    clock: Clock = Stopwatch,
    free: Free = free_memory,
) -> Site:
    """Returns the site with every decision, every measurement and the choice. Raises as `measure_alike`."""
    alike = measure_alike(captured, machine, search, say, clock, free)
    return alike.site(captured.call, [alike.first])


def measure_alike(
    captured: Captured,
    machine: Machine,
    search: Search,
    say: Say = silent,
    clock: Clock = Stopwatch,
    free: Free = free_memory,
) -> Alike:
    """Measures the first of the attentions that are alike. Raises only `KeyboardInterrupt` (Ctrl-C), and `RuntimeError` for a
    GPU that no longer answers.

    clock: times kernels on a device. free: returns the free memory of a device."""
    devices = [captured.query.device] if captured.query.device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # dropout and kernels draw random numbers
        return _Measuring(captured, machine, search, say, clock(captured.query.device), free).alike()


class _Measuring:
    def __init__(
        self, captured: Captured, machine: Machine, search: Search, say: Say, watch: Stopwatch, free: Free
    ) -> None:
        self.captured, self.machine, self.search, self.say = captured, machine, search, say
        self.watch, self.free = watch, free
        self.worker = Worker(captured.query.device)
        self.done: dict[str, Measurement] = {}
        self.comparison = Comparison(captured)
        self.of_native: float | None = None
        self.finite = True  # native's gradients

    def alike(self) -> Alike:
        call = self.captured.call
        planned = [(each, self._planned(each)) for each in self.search.candidates]
        accepted = [(candidate, site) for candidate, site in planned if site is not None and site.chosen is not None]
        runners = []
        try:
            self.watch.settle()
            for place, (candidate, site) in enumerate(accepted):
                self.say(f"{candidate.name} ({place + 1}/{len(accepted)})")
                start = functools.partial(self._start, candidate, site)
                runner = self._guarded(candidate.name, start, 0.0)
                if runner is not None:
                    runners.append(runner)
            runners = self._rounds(runners)
        except KeyboardInterrupt:
            self.worker.interrupt()
            raise
        finally:
            self.worker.leave()
        if self.comparison.nothing:
            warnings.warn(
                f"attnrewrite.tune compared nothing at {call.site or 'a call'}: {self.comparison.nothing}. native stays there",
                stacklevel=2,
            )
        for runner in runners:
            middle = statistics.median(runner.samples)
            self.done[runner.name] = Measurement(
                runner.name, 1e3 * middle, deviation(runner.samples) / (middle or 1.0), runner.error, len(runner.samples),
                None if runner.record.numerics.is_inexact else self._too_inexact(runner), 1e3 * runner.host or None,
            )  # fmt: skip
        follow = [runner for runner in runners if runner.record.numerics.is_inexact]
        return Alike(
            self.machine,
            self.search,
            measured=tuple(self.done[each.name] for each, _ in planned if each.name in self.done),
            decisions=tuple(each for _, site in planned if site is not None for each in site.decisions),
            plans={candidate.name: site for candidate, site in accepted},
            samples={each.name: each.samples for each in runners},
            compiled={each.name: each.compiled for each in follow},
            of_native=self.of_native,
            first=Errors({each.name: each.error for each in follow}, {}, self.comparison.nothing),
        )

    def _planned(self, candidate: Candidate) -> Site | None:
        """Plans one candidate. Returns None, and drops the kernel, if planning raises: a user's own record may."""
        try:
            return plan_site(self.captured.call, candidate, self.machine, self.search.numerics)
        except Exception as error:
            self.done[candidate.name] = Measurement(candidate.name, dropped=said(error))
            return None

    def _guarded(self, name: str, function: Callable[[], Any], spent: float, error: float | None = None) -> Any:
        """Returns the function's result. If the function raises or takes too long, drops the kernel and returns None."""
        result, dropped = self.worker.attempt(function, self.search.time_limit, spent)
        if dropped is None:
            return result
        self.done[name] = Measurement(name, error=error, dropped=dropped)
        gc.collect()  # an error and its frames refer to each other, and the frames hold tensors
        self._still_there(name, dropped)
        return None

    def _still_there(self, name: str, dropped: str) -> None:
        """Raises `RuntimeError` if a failed launch has broken the CUDA context, or a kernel that hangs holds the GPU."""
        if self.watch.device.type != "cuda":
            return
        try:
            self.worker.run(self.watch.settle, 10.0)
        except Exception as error:
            raise RuntimeError(
                f"attnrewrite.tune: behind {name} ({dropped}) the GPU no longer answers: {said(error)}. Start the process "
                f"again and leave {name} out of candidates="
            ) from None
        torch.cuda.empty_cache()

    def _start(self, candidate: Candidate, site: Site) -> Runner:
        """Compiles, runs, compares and times a candidate. Called on the worker's thread."""
        started = time.perf_counter()
        call = self.captured.call
        assert site.backend is not None
        enough_memory(site.backend, call, self.watch.device, self.free)
        kept, graph = compiled_graph(self.captured, site, candidate, self.machine, self.search.inner)
        compiled = kept.run
        run = _with_backward(compiled, graph.inputs) if call.needs_grad else lambda: compiled(*graph.inputs)
        self.worker.check()
        with torch.set_grad_enabled(call.needs_grad):
            output = compiled(*graph.inputs)[0].detach()
        error = self.comparison.error(output)
        del output
        if candidate.name == "native":
            self.of_native = error
        self.worker.check()
        given = run()
        finite = not call.needs_grad or all(bool(gradient.isfinite().all()) for gradient in given)
        del given
        if candidate.name == "native":
            self.finite = finite
        elif self.finite and not finite:
            raise ValueError("returns NaN or infinity in its backward")
        self.worker.check()
        seconds = self.watch.sample(run, 1)
        for _ in range(4 if seconds < SHORT else 0):  # other load on the machine may have slowed down a single sample
            self.worker.check()
            seconds = min(seconds, self.watch.sample(run, min(3, self.watch.calls(seconds))))
        host = self.watch.host(run)
        return Runner(candidate.name, site.backend, kept, run, error, seconds, time.perf_counter() - started, host)

    def _rounds(self, runners: list[Runner]) -> list[Runner]:
        """Times the kernels in rounds, each in another order. Returns the kernels that took part in every round."""
        if not runners:
            return []
        # Only a kernel whose error does not depend on values drops others: a quantised or sparse one that is far ahead may be
        # too inexact at another site or input, or not allowed, and then the next one counts.
        steady = {each.seconds for each in runners if not each.record.numerics.is_inexact}
        fastest = {each.name: min({*steady, each.seconds}) for each in runners}
        near = [each for each in runners if each.seconds <= FAR_BEHIND * fastest[each.name] or each.name == "native"]
        for each in runners:
            if each not in near:
                self.done[each.name] = Measurement(
                    each.name, 1e3 * each.seconds, None, each.error, 1, self._too_inexact(each) or
                    f"{each.seconds / fastest[each.name]:.1f} times as slow as the fastest: measured once",
                )  # fmt: skip
        calls = {each.name: self.watch.calls(each.seconds) for each in near}
        a_round = sum(each.seconds * calls[each.name] for each in near)
        least, most = self.search.rounds
        rounds = max(least, min(most, int(SECONDS / max(a_round, 1e-9))))
        shuffle = random.Random(0).shuffle
        for number in range(-1, self.search.more * rounds):  # round -1 warms up
            if number >= rounds and not undecided([each.samples for each in near], self.search.min_gain):
                break
            self.say(f"round {number + 1}/{max(rounds, number + 1)}", detail=True)
            order = list(near)
            shuffle(order)
            for each in order:
                seconds = self._sample(each, calls[each.name])
                if seconds is None:
                    near.remove(each)
                elif number >= 0:
                    each.samples.append(seconds)
        return near

    def _sample(self, runner: Runner, calls: int) -> float | None:
        started = time.perf_counter()
        seconds: float | None = self._guarded(
            runner.name, lambda: self.watch.sample(runner.call, calls), runner.spent, runner.error
        )
        runner.spent += time.perf_counter() - started
        return seconds

    def _too_inexact(self, runner: Runner) -> str | None:
        return too_inexact(
            runner.error,
            runner.record,
            self.captured.call,
            self.search.max_error,
            self.of_native,
            self.comparison.nothing,
        )


def _with_backward(compiled: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    """A function that runs forward and backward, as training does."""
    learned = [each for each in inputs if each.requires_grad]

    def run() -> Any:
        with torch.enable_grad():
            output = compiled(*inputs)[0]
            return torch.autograd.grad(output, learned, torch.ones_like(output))

    return run


def enough_memory(record: Backend, call: AttentionCall, device: torch.device, free: Free = free_memory) -> None:
    """Raises `MemoryError` if a kernel keeps all scores and these do not fit: on a CPU the system would end the process."""
    if not record.all_scores:
        return
    wanted = 3 * 4 * int(call.batch) * int(call.heads) * int(call.q_len) * int(call.kv_len)
    left = free(device)
    if left is not None and wanted > 0.8 * left:
        raise MemoryError(f"needs about {wanted / 2**30:.1f} GiB for its scores, {left / 2**30:.1f} GiB are free")
