"""`measure_site`: times every kernel that accepts a site, on the site's tensors, and compares its output with float64."""

from __future__ import annotations

import functools
import gc
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..graphs.inner_compilers import Inner, compile_with
from ..kernels.calls import AttentionCall
from ..kernels.machines import Machine
from ..kernels.records import Backend, Numerics
from ..kernels.shapes import rank4
from ..planning.measurements import Inexact, Measurement
from ..planning.policies import Candidate
from ..planning.sites import Site
from .capturing import Captured
from .choosing import choose, undecided
from .reference import Reference, reference
from .site_graphs import plan_site, site_graph
from .timing import Stopwatch, deviation
from .workers import OverdueError, Worker

SECONDS = 2.0  # time for the rounds of a site
FAR_BEHIND = 3.0  # slower than this multiple of the fastest: timed once
SHORT = 0.1  # seconds: a shorter call is sampled again before it may count as far behind
WRONG = 10.0  # above this multiple of native's error: more than rounding


@dataclass(frozen=True)
class Search:
    """The arguments of `attnrewrite.tune`, which documents them, and the numbers of rounds."""

    candidates: tuple[Candidate, ...]
    numerics: Numerics = Numerics.REORDERED
    max_error: float | None = None
    min_gain: float = 0.02
    inner: Inner = "inductor"
    time_limit: float = 60.0
    rounds: tuple[int, int] = (7, 25)  # least and most rounds of a site
    more: int = 3  # factor on the number of rounds where noise hides which kernel is worth choosing


@dataclass
class Runner:
    """A candidate that ran without an error.

    name: the kernel's name.
    call: runs the kernel once, with its backward if the call needs a gradient.
    error: the relative error against float64; None under dropout.
    seconds: time of one call, before the rounds.
    spent: seconds used up of the time limit.
    host: seconds that the host needs to launch one call on a GPU; 0 on a CPU.
    samples: seconds of one call, one sample a round.
    """

    name: str
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
    """Returns the site with every decision, every measurement and the choice. Raises only `KeyboardInterrupt` (Ctrl-C), and
    `RuntimeError` for a GPU that no longer answers.

    clock: times kernels on a device. free: returns the free memory of a device."""
    devices = [captured.query.device] if captured.query.device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # dropout and kernels draw random numbers
        return _Measuring(captured, machine, search, say, clock(captured.query.device), free).site()


class _Measuring:
    def __init__(
        self, captured: Captured, machine: Machine, search: Search, say: Say, watch: Stopwatch, free: Free
    ) -> None:
        self.captured, self.machine, self.search, self.say = captured, machine, search, say
        self.watch, self.free = watch, free
        self.worker = Worker(captured.query.device)
        self.done: dict[str, Measurement] = {}
        self.reference: Reference | None = None
        self.nothing = _not_finite(captured)  # why nothing can be compared; "" if something can
        self.of_native: float | None = None

    def site(self) -> Site:
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
        if self.nothing:
            warnings.warn(
                f"attnrewrite.tune compared nothing at {call.site or 'a call'}: {self.nothing}. native stays there",
                stacklevel=2,
            )
        for runner in runners:
            middle = statistics.median(runner.samples)
            self.done[runner.name] = Measurement(
                runner.name, 1e3 * middle, deviation(runner.samples) / (middle or 1.0), runner.error, len(runner.samples),
                self._too_inexact(runner), 1e3 * runner.host or None,
            )  # fmt: skip
        measured = tuple(self.done[each.name] for each, _ in planned if each.name in self.done)
        chosen = choose(measured, {each.name: each.samples for each in runners}, self.search.min_gain)
        if chosen is None and any(candidate.name == "native" for candidate, _ in accepted):
            chosen = "native"  # the unchanged call is never wrong: only the limit may be too low for it
        taken = [each for _, site in planned if site is not None for each in site.decisions]
        decisions = tuple(sorted(taken, key=lambda each: each[0] == chosen))  # the choice comes last, as in every plan
        of_chosen = next((site for candidate, site in accepted if candidate.name == chosen), None)
        record = of_chosen.backend if of_chosen else None
        error = next((each.error for each in measured if each.name == chosen), None)
        return Site(
            replace(call), decisions, chosen, source=of_chosen.source if of_chosen else None,
            backend=record, measured=measured, inexact=Inexact.of(record, error) if record else None,
        )  # fmt: skip

    def _planned(self, candidate: Candidate) -> Site | None:
        """Plans one candidate. Returns None, and drops the kernel, if planning raises: a user's own record may."""
        try:
            return plan_site(self.captured.call, candidate, self.machine, self.search.numerics)
        except Exception as error:
            self.done[candidate.name] = Measurement(candidate.name, dropped=said(error))
            return None

    def _guarded(self, name: str, function: Callable[[], Any], spent: float, error: float | None = None) -> Any:
        """Returns the function's result. If the function raises or takes too long, drops the kernel and returns None."""
        limit = self.search.time_limit
        try:
            return self.worker.run(function, limit - spent)
        except OverdueError:
            dropped = f"not ready within its {limit:g} s, and left running"
        except Exception as problem:
            dropped = said(problem)
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
        graph = site_graph(self.captured, site, candidate, self.machine)
        with torch.set_grad_enabled(call.needs_grad):
            compiled = compile_with(self.search.inner, graph.module, list(graph.inputs))
        run = _with_backward(compiled, graph.inputs) if call.needs_grad else lambda: compiled(*graph.inputs)
        self.worker.check()
        with torch.set_grad_enabled(call.needs_grad):
            output = compiled(*graph.inputs)[0].detach()
        error = self._compared(output)
        del output
        if candidate.name == "native":
            self.of_native = error
        self.worker.check()
        run()
        self.worker.check()
        seconds = self.watch.sample(run, 1)
        for _ in range(4 if seconds < SHORT else 0):  # other load on the machine may have slowed down a single sample
            self.worker.check()
            seconds = min(seconds, self.watch.sample(run, min(3, self.watch.calls(seconds))))
        host = self.watch.host(run)
        return Runner(candidate.name, run, error, seconds, time.perf_counter() - started, host)

    def _compared(self, output: Tensor) -> float | None:
        """Returns the relative error, None under dropout, NaN if nothing can be compared. Raises `ValueError` for another
        shape, NaN or infinity."""
        captured, call = self.captured, self.captured.call
        batch, heads, q_len, value_dim = (int(each) for each in (call.batch, call.heads, call.q_len, call.value_dim))
        wanted = (batch, q_len, heads * value_dim) if captured.query.dim() == 4 else None
        if wanted is not None and tuple(output.shape) != wanted:
            raise ValueError(f"returns {tuple(output.shape)} where SDPA gives {wanted}")
        if captured.query.dim() == 4:
            whole = output.unflatten(2, (heads, value_dim)).transpose(1, 2)
        else:
            whole = rank4(output, tuple(output.shape[: -3 if output.dim() > 3 else -2]), heads)
        if self.reference is None:
            self.reference = reference(call, captured.query, captured.key, captured.value, captured.mask)
            self.nothing = self.nothing or ("" if self.reference.compared else "no row of it sees a key")
        if self.nothing:
            return None if call.dropout else math.nan
        wrong = ~torch.isfinite(whole).all(-1)
        if bool(wrong.any()) and (self.reference.seen is None or not bool(torch.isfinite(self._rows(whole)).all())):
            raise ValueError(f"returns NaN or infinity in {int(wrong.sum())} of {wrong.numel()} rows")
        return None if call.dropout else self.reference.error(whole)

    def _rows(self, whole: Tensor) -> Tensor:
        """The compared rows of the output, with zeros for rows that see no key."""
        assert self.reference is not None
        assert self.reference.seen is not None
        return torch.where(self.reference.seen[..., None], whole[:, :, self.reference.rows], 0.0)

    def _rounds(self, runners: list[Runner]) -> list[Runner]:
        """Times the kernels in rounds, each in another order. Returns the kernels that took part in every round."""
        if not runners:
            return []
        fastest = min(runner.seconds for runner in runners)
        near = [each for each in runners if each.seconds <= FAR_BEHIND * fastest or each.name == "native"]
        for each in runners:
            if each not in near:
                self.done[each.name] = Measurement(
                    each.name, 1e3 * each.seconds, None, each.error, 1, self._too_inexact(each) or
                    f"{each.seconds / fastest:.1f} times as slow as the fastest: measured once",
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
        """Why the error is not known or above the limit, or None. The limit: `max_error`; without it `WRONG` times native's
        error, and for a quantised or sparse kernel twice its stated error."""
        if runner.error is not None and math.isnan(runner.error):
            return None if runner.name == "native" else f"nothing was compared: {self.nothing}"
        limit, why = self.search.max_error, "max_error"
        if limit is None:
            record = next(each for each in self.search.candidates if each.name == runner.name).on(self.machine)
            if record.numerics.is_inexact:
                limit, why = 2 * record.tolerance.error, "twice its stated error"
            elif self.of_native is not None and runner.name != "native":
                last_bits = (
                    2 * torch.finfo(getattr(torch, self.captured.call.dtype)).eps
                )  # native's error may be 0, as for one key
                limit, why = max(WRONG * self.of_native, last_bits), f"{WRONG:g} times native's"
        if limit is None or runner.error is None or runner.error <= limit:
            return None
        return f"its error is above {limit:.1e}, {why}"


def _not_finite(captured: Captured) -> str:
    tensors = {"query": captured.query, "key": captured.key, "value": captured.value}
    bad = [name for name, each in tensors.items() if not bool(each.isfinite().all())]
    return f"values that are not finite come in by its {', '.join(bad)}" if bad else ""


def _with_backward(compiled: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    """A function that runs forward and backward, as training does."""
    learned = [each for each in inputs if each.requires_grad]

    def run() -> Any:
        with torch.enable_grad():
            output = compiled(*inputs)[0]
            return torch.autograd.grad(output, learned, torch.ones_like(output))

    return run


def said(error: BaseException) -> str:
    """The first line of an error as text, which keeps none of the error's frames and tensors alive."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}".rstrip(": ")


def enough_memory(record: Backend, call: AttentionCall, device: torch.device, free: Free = free_memory) -> None:
    """Raises `MemoryError` if a kernel keeps all scores and these do not fit: on a CPU the system would end the process."""
    if not record.all_scores:
        return
    wanted = 3 * 4 * int(call.batch) * int(call.heads) * int(call.q_len) * int(call.kv_len)
    left = free(device)
    if left is not None and wanted > 0.8 * left:
        raise MemoryError(f"needs about {wanted / 2**30:.1f} GiB for its scores, {left / 2**30:.1f} GiB are free")
