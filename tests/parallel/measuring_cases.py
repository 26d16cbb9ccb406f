"""Cases of worker.py that measure: what a rank has of each attention is measured, and all ranks choose alike."""

import os
import tempfile
from dataclasses import replace

import torch
import torch.nn.functional as F

import attnrewrite
from attnrewrite import ContextParallel, MaskKind, records_of, with_backend
from attnrewrite.entrances import tuning
from attnrewrite.entrances.choices import candidates_of
from attnrewrite.entrances.compilers import AttentionCompiler
from attnrewrite.measuring import cache
from attnrewrite.measuring.first_use import Tune
from attnrewrite.measuring.measure_site import measure_alike, measure_site
from attnrewrite.planning.measurements import Measurement
from attnrewrite.planning.policies import Policy

RANK = int(os.environ["RANK"])
QUICK = {"rounds": (1, 2)}


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(24, 72)

    def forward(self, tokens):
        query, key, value = (each.unflatten(-1, (6, 4)).transpose(1, 2) for each in self.qkv(tokens).chunk(3, -1))
        return tokens + F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def model():
    torch.manual_seed(4)
    return torch.nn.Sequential(Layer(), Layer()).double().eval(), torch.randn(1, 12, 24, dtype=torch.float64)


def fast_on(name, rank):
    """Times by which `_native_math` is much faster than `native` on one rank, and a little slower on the others."""
    milliseconds = {"native": 5.0, "_native_math": 1.0 if rank == RANK else 9.0}[name]
    return Measurement(name, milliseconds, 0.0, 1e-16, 3)


def error(one, other):
    return ((one - other).norm() / other.norm()).item()


def sites(plan):
    return [[site.name, site.chosen, site.call.heads, site.call.q_len] for site in plan.sites]


def tuned(mesh):
    """Rank 0 alone would choose `_native_math`."""
    layers, x = model()

    def measured(captured, machine, search, say):
        alike = measure_alike(captured, machine, replace(search, **QUICK), say)
        times = tuple(fast_on(each.name, 0) for each in alike.measured)
        return replace(alike, measured=times, samples={each.name: [each.milliseconds / 1e3] * 3 for each in times})

    search = tuning.read_search(layers, ["native", "_native_math"], inner="eager")
    alone = tuning.search_model(layers, [((x,), {})], search, measured, progress=False)
    ranks = ContextParallel(mesh)
    plan = tuning.search_model(layers, [((x,), {})], search, measured, progress=False, parallel=ranks)
    backend = with_backend(plan, context_parallel=mesh, inner="eager")
    output = torch.compile(layers, backend=backend)(x)
    times = {each.name: each.milliseconds for each in plan.sites[0].measured}
    return {
        "alone": [site.chosen for site in alone.sites],
        "sites": sites(plan),
        "times": times,
        "error": error(output, layers(x)),
        "used": [[site.chosen, site.note, site.stale] for site in backend.report.sites],
    }


def tuned_by_its_name(mesh):
    layers, x = model()
    plan = attnrewrite.tune(
        layers, x, candidates=["native", "_native_math"], inner="eager", context_parallel=mesh, progress=False
    )
    try:
        attnrewrite.tune(layers, x, context_parallel=mesh, max_output_error=0.1)
    except ValueError as raised:
        refused = str(raised)
    return {"sites": sites(plan), "refused": refused}


def tuned_on_first_use(mesh):
    """Here the last rank alone would choose `_native_math`; what one rank knows from its cache the others measure."""
    layers, x = model()
    measured = []

    def measure(captured, machine, search):
        measured.append(captured.call)
        site = measure_site(captured, machine, replace(search, **QUICK))
        times = tuple(fast_on(each.name, mesh.size() - 1) for each in site.measured)
        return replace(site, measured=times, chosen=min(times, key=lambda each: each.milliseconds).name)

    chosen, errors = [], []
    with tempfile.TemporaryDirectory() as folder:
        os.environ[cache.FOLDER] = folder
        tune = Tune(candidates=lambda: candidates_of(["native", "_native_math"], ""), measure=measure)
        for again in (False, True):
            if again and RANK == 0:
                cache._KNOWN.clear()
                os.environ[cache.FOLDER] = f"{folder}/empty"
            backend = AttentionCompiler(Policy((tune,)), "eager", context_parallel=ContextParallel(mesh))
            torch.compiler.reset()
            errors.append(error(torch.compile(layers, backend=backend)(x), layers(x)))
            chosen.append([site.chosen for site in backend.report.sites])
        del os.environ[cache.FOLDER]
    return {"chosen": chosen, "error": max(errors), "measured": len(measured)}


def told(fidelity):
    return {
        "sites": [[site.site.name, site.site.call.heads, site.wrong] for site in fidelity.sites],
        "output": fidelity.output.relative_error,
        "right": fidelity.ok,
    }


def checked(mesh):
    """Right kernels, and one that is wrong on rank 1."""
    layers, x = model()

    def op(query, key, value, prepared, *, call):
        output = F.scaled_dot_product_attention(query, key, value, scale=call.scale)
        return output + 1e-3 * (RANK == 1)

    (math,) = records_of("_native_math")
    wrong = replace(math, name="wrong", op=op, masks=frozenset({MaskKind.NONE}), prepare=None)
    return {
        name: told(
            attnrewrite.check(
                layers, x, backend=with_backend(kernel, context_parallel=mesh, inner="eager"), progress=False
            )
        )
        for name, kernel in (("right", "native"), ("wrong", wrong))
    }


CASES = (tuned, tuned_by_its_name, tuned_on_first_use, checked)
