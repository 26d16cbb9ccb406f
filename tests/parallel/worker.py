"""One rank of test_ranks.py: runs every case over gloo, and writes what it found to a file."""

import json
import os
import sys
import traceback

import measuring_cases
import torch
import torch.distributed as dist
import training_cases
from model_zoo import small_flux
from torch.distributed.device_mesh import init_device_mesh

import attnrewrite
from attnrewrite import ContextParallel, attention_backend, set_attention_backend, with_backend

WIDTH, HEADS = 24, 6
RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class Block(torch.nn.Module):
    """A block on text and image tokens, with the mask of the text."""

    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH)
        self.out = torch.nn.Linear(WIDTH, WIDTH)
        self.norm = torch.nn.LayerNorm(WIDTH)

    def forward(self, text, image, mask=None):
        both = torch.cat([text, image], 1)
        query, key, value = (
            each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in self.qkv(self.norm(both)).chunk(3, -1)
        )
        if mask is not None:
            there = torch.cat([mask, mask.new_ones(mask.shape[0], image.shape[1])], 1)
            mask = there[:, None, None]
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
        both = both + self.out(output.transpose(1, 2).flatten(2))
        return both[:, : text.shape[1]], both[:, text.shape[1] :]


def block():
    torch.manual_seed(1)
    return Block().double().eval()


def inputs(batch=1, text=6, image=18, masked=False):
    torch.manual_seed(2)
    given = [torch.randn(batch, length, WIDTH, dtype=torch.float64) for length in (text, image)]
    return [*given, torch.arange(text) < torch.tensor([[text], [3]])[:batch]] if masked else given


def error(results, references):
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(results, references, strict=True))


def same(backend, *given, **options):
    """The error to this rank alone, and the plan of the graph."""
    model = block()
    expected = model(*given)
    results = torch.compile(model, backend=backend, fullgraph=True, **options)(*given)
    return {"error": error(results, expected)}


def planned(backend, **more):
    (graph,) = backend.report.graphs
    return {
        **more,
        "exchanges": [site.exchange for site in graph.parallel.sites],
        "chosen": [site.chosen for site in graph.plan.sites],
        "heads": [site.call.heads for site in graph.plan.sites],
        "text": str(backend.report),
        "round trip": attnrewrite.Report.from_json(backend.report.to_json()).to_json() == backend.report.to_json(),
    }


def tokens(mesh):
    backend = with_backend("native", context_parallel=mesh, inner="eager")
    return planned(backend, **same(backend, *inputs()))


def uneven(mesh):
    backend = with_backend("native", context_parallel=mesh, inner="aot_eager")
    return planned(backend, **same(backend, *inputs(1, 7, 13)))


def a_mask(mesh):
    backend = with_backend("flex", "native", context_parallel=ContextParallel(mesh, "ulysses"), inner="aot_eager")
    return planned(backend, **same(backend, *inputs(2, masked=True)))


def gathered(mesh):
    backend = with_backend("native", context_parallel=ContextParallel(mesh, "gather"), inner="eager")
    return planned(backend, **same(backend, *inputs(2)))


def batch(mesh):
    backend = with_backend("native", context_parallel=mesh, inner="eager")
    return planned(backend, **same(backend, *inputs(WORLD)))


def inductor(mesh):
    backend = with_backend("native", context_parallel=mesh)
    return planned(backend, **same(backend, *inputs()))


def ring(mesh):
    backend = with_backend("native", context_parallel=ContextParallel(mesh, "ring"), inner="eager")
    return planned(backend, **same(backend, *inputs(2, 7, 13)))


def ring_with_a_mask(mesh):
    backend = with_backend("_native_flash", context_parallel=ContextParallel(mesh, "ring"), inner="aot_eager")
    return planned(backend, **same(backend, *inputs(2, masked=True)))


def ring_by_inductor(mesh):
    backend = with_backend("native", context_parallel=ContextParallel(mesh, "ring"))
    return planned(backend, **same(backend, *inputs(1, 6, 21)))


def ring_of_groups(mesh):
    """Of 4 ranks, two divide the 6 heads."""
    backend = with_backend("native", context_parallel=ContextParallel(mesh, "ulysses+ring"), inner="aot_eager")
    return planned(backend, **same(backend, *inputs(2, 7, 19, masked=True)))


def causal_ring(mesh):
    """Each rank computes another number of steps."""
    torch.manual_seed(3)
    weight = torch.randn(3 * WIDTH, WIDTH, dtype=torch.float64) * 0.4

    def function(x):
        query, key, value = (
            each.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for each in torch.nn.functional.linear(x, weight).chunk(3, -1)
        )
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return x + output.transpose(1, 2).flatten(2)

    backend = with_backend("native", context_parallel=ContextParallel(mesh, "ring"), inner="aot_eager")
    x = inputs(2)[1][:, :17]
    return planned(backend, error=error([torch.compile(function, backend=backend)(x)], [function(x)]))


def dynamic(mesh):
    backend = with_backend("native", context_parallel=ContextParallel(mesh, "ulysses"), inner="eager")
    model = block()
    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    lengths = [(6, 18), (12, 24), (6, 30), (7, 13), (9, 17)]
    errors = [error(compiled(*given), model(*given)) for given in (inputs(1, *each) for each in lengths)]
    return {"error": max(errors), "graphs": len(backend.report.graphs)}


def regional(mesh):
    model, kwargs = small_flux()
    expected = model(**kwargs)[0]
    kind = ContextParallel(mesh, "ulysses")
    backend = set_attention_backend(model, "native", context_parallel=kind, inner="eager", fullgraph=True)
    found = error([model(**kwargs)[0]], [expected])
    return {"error": found, "sharings": [graph.parallel.lines() for graph in backend.report.graphs]}


def entry_point(mesh):
    return same("attnrewrite", *inputs(), options={"context_parallel": mesh, "inner": "eager"})


def a_context(mesh):
    backend = with_backend("native", context_parallel=mesh, inner="eager")
    with attention_backend("native"):
        return same(backend, *inputs())


def raised(function):
    try:
        function()
    except Exception as error:
        return {"raised": f"{type(error).__name__}: {error}"}
    return {"raised": ""}


def other_lengths(mesh):
    backend = with_backend("native", context_parallel=mesh, inner="eager")
    return raised(lambda: same(backend, *inputs(1, 6, 18 + 6 * RANK)))


def other_kernels(mesh):
    backend = with_backend("native" if RANK == 0 else "flex", context_parallel=mesh, inner="eager")
    return raised(lambda: same(backend, *inputs()))


def one_fails(mesh):
    backend = with_backend("_flash_3" if RANK == 1 else "native", context_parallel=mesh, inner="eager", strict=True)
    return raised(lambda: same(backend, *inputs()))


def bad_meshes(mesh):
    two = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("data", "context"))
    given = {
        "two dimensions": lambda: with_backend("native", context_parallel=two),
        "one device": lambda: with_backend("native", context_parallel=two["data"]),
        "no mesh": lambda: with_backend("native", context_parallel="cuda"),
        "kind": lambda: ContextParallel(mesh, "sideways"),
        "timeout": lambda: ContextParallel(mesh, timeout=0),
        "beside an object": lambda: set_attention_backend(block(), with_backend("native"), context_parallel=mesh),
        "a part of a mesh": lambda: with_backend("native", context_parallel=two["context"]),
    }
    return {name: raised(function)["raised"] for name, function in given.items()}


def one_does_not_come(mesh):
    """The last case: from here on the ranks have compiled unlike numbers of graphs."""
    if RANK == 1:
        return {"raised": ""}
    kind = ContextParallel(mesh, timeout=2)
    return raised(lambda: same(with_backend("native", context_parallel=kind, inner="eager"), *inputs()))


CASES = (
    tokens, uneven, a_mask, gathered, ring, ring_with_a_mask, causal_ring, batch, dynamic, regional, entry_point, a_context,
    other_lengths, other_kernels, one_fails, bad_meshes, inductor, *measuring_cases.CASES, *training_cases.CASES,
    one_does_not_come,
)  # fmt: skip
if os.environ.get("ATTNREWRITE_SLOW"):
    CASES = (ring_by_inductor, ring_of_groups, *CASES)


def main(path, *names):
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (WORLD,))
    found = {}
    chosen = [case for case in CASES if not names or case.__name__ in names]
    for case in chosen:
        torch.compiler.reset()
        print(case.__name__, flush=True)
        try:
            with torch.set_grad_enabled(case in training_cases.CASES):
                found[case.__name__] = case(mesh)
        except Exception:
            found[case.__name__] = {"failed": traceback.format_exc()}
    with open(path, "w") as file:
        json.dump(found, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
