"""Compiles random attention calls through every kernel of this machine, and compares outputs and gradients with float64.

    python bench/fuzz.py --seconds 600 --seed 1 [--inner inductor] [--kernels flex _native_flash]

A call that is wrong is made as simple as it can be while it stays wrong, and is printed as a script that exits with 1. The exit
status is the number of wrong calls, at most 100. Equal seeds give equal calls, in every version of attnrewrite.

Calls vary in memory (parts of one tensor by chunk, split, unbind and stack; slices, expanded and transposed tensors), in dtype,
sizes, grouped heads, rank, scale and mask, in the ways to write them (SDPA or tensor operations), and in what is computed
around them. One compilation holds several calls, all with or all without a gradient; Dynamo traces them once, and each kernel
gets a copy of the graph. Calls with dynamic sizes run with a second size too; half of them are compiled for one kernel alone,
since the guards of one kernel could hide that another lacks them.

A call passes if its error is one that rounding explains (`ROUNDING`, the record's tolerance for a quantised kernel), or at most
four times that of the unchanged function and ten times what rounding explains (more where rounding takes the scores: rows of
keys that a finite number hides). Where PyTorch's kernel stayed, and the unchanged function is far off itself, the call
counts as PyTorch's own; so does one that nothing is swapped in and that the compiler gets wrong without attnrewrite.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import itertools
import math
import multiprocessing
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from fuzz_calls import Call, drawn, loses_scores, simpler, sizes, written_out
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnrewrite

# The relative errors that rounding explains, by dtype. Gradients sum up more of it.
ROUNDING = {"float64": 1e-12, "float32": 1e-5, "float16": 3e-3, "bfloat16": 2e-2}
GRADIENT = 10.0
# Whether the calls of a compilation need a gradient, whether sizes are dynamic, and whether one kernel is alone: in turn.
STATIC, LEARNED = (False, False, False), (True, False, False)
KINDS = (
    *(STATIC, LEARNED, STATIC, (False, True, False), LEARNED, (True, True, True), STATIC, LEARNED),
    *(STATIC, LEARNED, STATIC, (True, True, False), LEARNED, (False, True, True), STATIC, LEARNED),
)


@dataclass
class Counts:
    """What has been tried: calls, and those that the kernel took, by kernel; calls that PyTorch's own kernel gets wrong; the
    scripts of calls that are wrong."""

    calls: Counter[str] = field(default_factory=Counter)
    swapped: Counter[str] = field(default_factory=Counter)
    own: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def all(self) -> int:
        return sum(self.calls.values())

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.calls + other.calls, self.swapped + other.swapped, self.own + other.own, self.wrong + other.wrong
        )

    def __str__(self) -> str:
        kernels = ", ".join(f"{name} {self.swapped[name]} of {count}" for name, count in sorted(self.calls.items()))
        own = f"; {self.own} that PyTorch gets wrong itself" if self.own else ""
        return f"{self.all} calls, {len(self.wrong)} wrong{own}; swapped: {kernels}"


@dataclass(frozen=True)
class Setting:
    """What holds for all calls of a search: the device, and the compiler behind attnrewrite."""

    device: str = "cpu"
    inner: str = "eager"

    def backend(self, kernel: str) -> Any:
        return attnrewrite.with_backend(kernel, inner=self.inner, numerics="quantised")


@dataclass(frozen=True)
class Verdict:
    """What one kernel does with one call. wrong: what is wrong; "" if nothing is. chosen: None where the kernel was refused.
    own: PyTorch's kernel or compiler is wrong by itself."""

    wrong: str = ""
    chosen: str | None = None
    own: bool = False


# -- the functions of a script, which a script repeats


def results(function, tensors):
    """The output, and the gradients of all tensors that require one."""
    learned = [tensor for tensor in tensors if tensor.requires_grad]
    with torch.set_grad_enabled(bool(learned)):
        output = function(*tensors)
        return [output.detach(), *(torch.autograd.grad(weighted(output), learned) if learned else ())]


def weighted(output):
    """A sum of the output, whose gradient is another for each element."""
    weights = torch.arange(output.numel(), device=output.device, dtype=torch.float64).cos()
    return (output.double() * weights.view(output.shape)).sum()


def doubled(tensor):
    return tensor.detach().double().requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor


def errors(found, exact):
    """|found - exact| / |exact| (2-norms) of the output and of each gradient, where `exact` is finite. A small gradient counts
    relative to a hundredth of all gradients together (a sixth in half precision, of which a hundredth is less than rounding),
    and one that vanishes (those of query and key where there is one key) relative to all: it is the difference of equal
    numbers, and nothing but their rounding. Where no gradient is finite and not zero, the output stands for all."""
    known = [tensor.isfinite() for tensor in exact]
    apart = [(one.double() - two)[at].norm().item() for one, two, at in zip(found, exact, known, strict=True)]
    norms = [two[at].norm().item() for two, at in zip(exact, known, strict=True)]
    together = math.hypot(*norms[1:]) or norms[0]
    small = 0.16 if any(torch.finfo(one.dtype).eps > 1e-6 for one in found) else 0.01
    least = [0.0, *(together * (small if norm > 1e-12 * together else 1.0) for norm in norms[1:])]
    return [error / max(norm, floor, 1e-30) for error, norm, floor in zip(apart, norms, least, strict=True)]


TEMPLATE = '''\
"""A random attention call, on {kernel}: {said}. Written by bench/fuzz.py of attnrewrite {version}.

    python THIS_FILE

Computes attention under torch.compile, by the kernel, and in float64. Exits with 1 if they differ by more than rounding.
"""

import math
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnrewrite

{call}

{helpers}

backend = attnrewrite.with_backend({kernel!r}{options})
compiled = torch.compile(attention, backend=backend, dynamic={dynamic})
wrong = False
for size in {sizes}:
    given = tensors(*size)
    given = given if isinstance(given, tuple) else (given,)
    with sdpa_kernel(SDPBackend.MATH):
        exact = results(attention, [doubled(tensor) for tensor in given])
    exact = exact if exact[0].isfinite().all() else exact[:1]  # a row of NaN makes every gradient NaN
    unchanged, found = (errors(results(each, given)[: len(exact)], exact) for each in (attention, compiled))
    wrong |= not all(error <= limit for error, limit in zip(found, {limits}))
    print("relative errors of the output and of gradients, compiled:", *(f"{{error:.1e}}" for error in found))
    print("unchanged:", *(f"{{error:.1e}}" for error in unchanged))
print(backend.report)
sys.exit(wrong)
'''


def script(call: Call, kernel: str, said: str, setting: Setting) -> str:
    """A stand-alone script of one call."""
    numerics = attnrewrite.records_of(kernel)[0].numerics
    options = f', numerics="{numerics.word}"' if numerics.is_inexact else ""
    options += f", inner={setting.inner!r}" if setting.inner != "inductor" else ""
    helpers = "\n\n".join(inspect.getsource(each) for each in (results, weighted, doubled, errors))
    return TEMPLATE.format(
        kernel=kernel, said=said, version=attnrewrite.__version__, helpers=helpers, options=options,
        call=written_out(call, setting.device), dynamic=call.dynamic, sizes=sizes(call),
        limits=limits(call, kernel, 5 if call.needs_grad else 1),
    )  # fmt: skip


def limits(call: Call, kernel: str, outputs: int) -> list[float]:
    """The largest relative errors of the output and of each gradient."""
    record, rounding = attnrewrite.records_of(kernel)[0], ROUNDING[call.dtype]
    if record.numerics.is_inexact:
        rounding = max(rounding, record.tolerance.error)
    if call.dtype == "float64" and loses_scores(call) and call.fill in ("-1e4", "-1e9"):
        rounding = max(
            rounding, 2.0**-51 * abs(float(call.fill))
        )  # of each score, and the exact function rounds as well
    found = [rounding, *[GRADIENT * rounding] * (outputs - 1)]
    if call.mask == "additive_float32" and call.learned_mask and outputs > 1:
        found[-1] = max(found[-1], GRADIENT * ROUNDING["float32"])
    return found


# -- several calls at once


class One(torch.nn.Module):
    """One call as a module. The module's path is the name of the attention."""

    def __init__(self, call: Call, device: str) -> None:
        super().__init__()
        names: dict[str, Any] = {"torch": torch, "F": F}
        exec(compile(written_out(call, device), "<call>", "exec"), names)
        self.call, self.attention, self._tensors = call, names["attention"], names["tensors"]

    def forward(self, given: Sequence[Any]) -> Any:
        return self.attention(*given)

    def tensors(self, size: tuple[int, int, int]) -> tuple[Any, ...]:
        made = self._tensors(*size)
        return made if isinstance(made, tuple) else (made,)


class Several(torch.nn.Module):
    """Calls that are compiled together."""

    def __init__(self, calls: Sequence[Call], device: str) -> None:
        super().__init__()
        self.calls = torch.nn.ModuleList(One(call, device) for call in calls)

    def forward(self, given: Sequence[Sequence[Any]]) -> list[Any]:
        return [one(tensors) for one, tensors in zip(self.calls, given, strict=True)]


class EveryKernel:
    """A backend of torch.compile that gives a copy of each graph to the backend of each kernel: Dynamo traces a model once for
    all of them. `now` names the kernel that runs."""

    def __init__(self, backends: dict[str, Any]) -> None:
        self.backends = backends
        self.now = next(iter(backends))

    def __call__(self, graph_module: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        compiled: dict[str, Any] = {}
        context = torch._guards.TracingContext.get()
        for name, backend in self.backends.items():
            # AOTAutograd notes in the context which saved tensors a backward may overwrite, and compiles it when it is first
            # called. In a common context the notes of the last kernel would hold for all, and inputs be overwritten.
            try:
                with torch._guards.tracing(copy.copy(context)):
                    compiled[name] = backend(copy.deepcopy(graph_module), example_inputs)
            except Exception as error:
                compiled[name] = error

        def run(*inputs: Any) -> Any:
            found = compiled[self.now]
            if isinstance(found, Exception):
                raise found
            return found(*inputs)

        return run


def together(calls: Sequence[Call], kernels: Sequence[str], setting: Setting) -> dict[str, list[Verdict]]:
    """Compiles calls and compares them: for each kernel the verdicts. Where a kernel raises for several calls, each call is
    tried by itself."""
    torch._dynamo.reset()
    model, backend = Several(calls, setting.device), EveryKernel({name: setting.backend(name) for name in kernels})
    compiled = torch.compile(model, backend=backend)
    found: dict[str, list[Verdict]] = {}
    every = [
        [one.tensors(each) for one, each in zip(model.calls, size, strict=True)]
        for size in zip(*map(sizes, calls), strict=True)
    ]
    if len(every) > 1:
        for tensor, other in zip(itertools.chain(*every[0]), itertools.chain(*every[1]), strict=True):
            for dim in range(tensor.dim()):
                if tensor.shape[dim] != other.shape[dim]:
                    torch._dynamo.maybe_mark_dynamic(tensor, dim)
    for given in every:
        unchanged = [results(one.attention, tensors) for one, tensors in zip(model.calls, given, strict=True)]
        with sdpa_kernel(SDPBackend.MATH):
            exact = [
                results(one.attention, [*map(doubled, tensors)])
                for one, tensors in zip(model.calls, given, strict=True)
            ]
        for kernel in kernels:
            backend.now = kernel
            try:
                given_back = compiled_results(compiled, given)
            except Exception as error:
                if len(calls) > 1:
                    found[kernel] = [together([call], [kernel], setting)[kernel][0] for call in calls]
                    continue
                said, one = words(error), model.calls[0]
                without = compiler_alone(calls[0], one, given[0], exact[0], unchanged[0], kernel, setting)
                found[kernel] = [Verdict(own=True) if without.wrong == said else Verdict(said)]
                continue
            sites = {site.call.site: site.chosen for site in backend.backends[kernel].report.sites}
            chosen = [sites.get(f"calls.{number}") for number in range(len(calls))]
            now = list(map(compared, calls, [kernel] * len(calls), chosen, given_back, exact, unchanged))
            now = [
                Verdict(own=True)
                if verdict.wrong and verdict.chosen is None and compiler_alone(*rest, kernel, setting).wrong
                else verdict
                for verdict, *rest in zip(now, calls, model.calls, given, exact, unchanged, strict=True)
            ]
            before = found.get(kernel, now)
            found[kernel] = [one if one.wrong else two for one, two in zip(before, now, strict=True)]
    return found


def words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def compiler_alone(
    call: Call, one: One, given: Sequence[Any], exact: list[Any], unchanged: list[Any], kernel: str, setting: Setting
) -> Verdict:
    """The verdict on a call that nothing is swapped in, under the compiler without attnrewrite."""
    torch._dynamo.reset()
    try:
        found = results(torch.compile(one.attention, backend=setting.inner, dynamic=call.dynamic), given)
    except Exception as error:
        return Verdict(words(error))
    return compared(call, kernel, None, found, exact, unchanged)


def compiled_results(compiled: Callable[..., Any], given: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """`results` of all calls at once."""
    learned = [[tensor for tensor in tensors if tensor.requires_grad] for tensors in given]
    every = [tensor for tensors in learned for tensor in tensors]
    with torch.set_grad_enabled(bool(every)):
        outputs = compiled(given)
        gradients = iter(torch.autograd.grad(sum(map(weighted, outputs)), every) if every else ())
    return [[output.detach(), *(next(gradients) for _ in of)] for output, of in zip(outputs, learned, strict=True)]


def compared(
    call: Call, kernel: str, chosen: str | None, found: list[Any], exact: list[Any], unchanged: list[Any]
) -> Verdict:
    if not bool(exact[0].isfinite().all()):
        found, exact, unchanged = found[:1], exact[:1], unchanged[:1]  # a row of NaN makes every gradient NaN
    error, before, limit = errors(found, exact), errors(unchanged, exact), limits(call, kernel, len(exact))
    cap = math.inf if loses_scores(call) else 10.0
    if all(one <= max(most, min(4 * two, cap * most)) for one, two, most in zip(error, before, limit, strict=True)):
        return Verdict(chosen=chosen)
    if chosen in (None, "native") and not all(two <= 10 * most for two, most in zip(before, limit, strict=True)):
        return Verdict(chosen=chosen, own=True)
    said = f"relative errors {', '.join(f'{each:.1e}' for each in error)} of the output and the gradients"
    return Verdict(said[: None if len(error) > 1 else said.index(" and")], chosen)


# -- the search


def simplest(call: Call, kernel: str, said: str, setting: Setting, seconds: float) -> tuple[Call, str]:
    """The simplest call that is found by changing one field after the other and is still wrong, and what is wrong with it."""
    end = time.perf_counter() + seconds
    again = True
    while again:
        again = False
        for other in simpler(call):
            if time.perf_counter() > end:
                return call, said
            if found := together([other], [kernel], setting)[kernel][0].wrong:
                call, said, again = other, found, True
                break
    return call, said


def usable(setting: Setting) -> list[str]:
    """The kernels that take a plain call on this machine."""
    plain = Call(dtype="bfloat16", heads=2, kv_heads=2, q_len=128, kv_len=128, head_dim=64)
    verdicts = together([plain], attnrewrite.names(), setting)
    return [name for name, (verdict,) in verdicts.items() if verdict.chosen == name or verdict.wrong]


def differentiable(kernel: str, device: str) -> bool:
    return any(record.backward for record in attnrewrite.records_of(kernel) if device in record.devices)


def search(
    seed: int,
    kernels: Sequence[str],
    setting: Setting,
    seconds: float = math.inf,
    calls: float = math.inf,
    size: int = 12,
    job: tuple[int, int] = (0, 1),
) -> Counts:
    """Tries random calls until the time or the number of calls is used up, prints the script of each wrong call, and once a
    minute the counts.

    size: calls of one compilation. job: the number of this process, and how many processes share the work.
    """
    counts, started, told = Counts(), time.perf_counter(), 0.0
    for turn in itertools.count(*job):
        passed = time.perf_counter() - started
        if passed > seconds or counts.all >= calls:
            return counts
        if passed - told > 60:
            told = passed
            print(f"{passed:.0f} s: {counts}", flush=True)
        needs_grad, dynamic, alone = KINDS[turn % len(KINDS)]
        able = [name for name in kernels if not needs_grad or differentiable(name, setting.device)] or ["native"]
        tried = [able[turn // len(KINDS) % len(able)]] if alone else able
        some = [
            drawn(f"{seed}/{turn}/{number}", setting.device, needs_grad=needs_grad, dynamic=dynamic)
            for number in range(size)
        ]
        for kernel, verdicts in together(some, tried, setting).items():
            for call, verdict in zip(some, verdicts, strict=True):
                counts.calls[kernel] += 1
                counts.swapped[kernel] += verdict.chosen == kernel
                counts.own += verdict.own
                if verdict.wrong:
                    counts.wrong.append(_script_of(call, kernel, verdict.wrong, setting))
                    print(counts.wrong[-1], flush=True)
    raise AssertionError("the loop has no end")


def _script_of(call: Call, kernel: str, said: str, setting: Setting) -> str:
    alone = together([call], [kernel], setting)[kernel][0].wrong
    if not alone:
        return script(call, kernel, f"{said}, but right when it is compiled by itself", setting)
    call, said = simplest(call, kernel, alone, setting, 20.0 if setting.inner == "eager" else 120.0)
    return script(call, kernel, said, setting)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to try calls (60)")
    parser.add_argument("--calls", type=float, default=math.inf, help="end after so many calls")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inner", default="eager", help="the compiler behind attnrewrite: eager, aot_eager, inductor")
    parser.add_argument("--kernels", nargs="+", help="names; without it, those that this machine can run")
    parser.add_argument("--together", type=int, help="calls of one compilation (12, under Inductor 4)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, help="processes (on a CPU as many as cores, on a GPU 1)")
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    setting = Setting(given.device, given.inner)
    kernels = given.kernels or usable(setting)
    jobs = given.jobs or (len(os.sched_getaffinity(0)) if given.device == "cpu" else 1)
    size = given.together or (4 if given.inner == "inductor" else 12)
    options = (given.seed, kernels, setting, given.seconds, given.calls / jobs, size)
    started = time.perf_counter()
    if jobs == 1:
        counts = search(*options)
    else:
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _quiet) as pool:
            parts = [pool.submit(search, *options, (job, jobs)) for job in range(jobs)]
            counts = sum((part.result() for part in parts), Counts())
    passed = time.perf_counter() - started
    print(f"{counts}; {passed:.0f} s, {counts.all / passed:.1f} calls a second")
    return min(100, len(counts.wrong))


def _quiet() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())
