"""Cases of worker.py with a gradient."""

import os

import torch
from torch.nn.functional import dropout
from trained import WIDTH, Block, Joint, gradients, loss_of, randn, worst

from attnrewrite import ContextParallel, with_backend
from attnrewrite.commands.bench import denoisers


def compared(model, inputs, backend, dynamic=False):
    model = model.double()
    expected = gradients(model, model, inputs)
    found = gradients(model, torch.compile(model, backend=backend, dynamic=dynamic), inputs)
    error, name = worst(found, expected)
    plans = [graph.parallel for graph in backend.report.graphs]
    exchanges = sorted({site.exchange for plan in plans for site in plan.sites})
    return {"error": error, "name": name, "exchanges": exchanges, "refused": [plan.refused for plan in plans]}


def block(mesh, kind, inner, batch=2, length=13, dynamic=False):
    torch.manual_seed(0)
    model, inputs = Block(length), [randn(batch, length, WIDTH), randn(batch, 7, 10), randn(batch, 5)]
    inputs.append(torch.arange(length) < torch.tensor([[length], [5]] * batch)[:batch])
    backend = with_backend("native", context_parallel=ContextParallel(mesh, kind), inner=inner)
    return compared(model, inputs, backend, dynamic)


def trained_ulysses(mesh):
    return block(mesh, "ulysses", "eager")


def trained_gather(mesh):
    return block(mesh, "gather", "aot_eager")


def trained_batch(mesh):
    return block(mesh, "auto", "aot_eager", batch=2 * mesh.size())


def trained_joint(mesh):
    torch.manual_seed(0)
    backend = with_backend("native", context_parallel=ContextParallel(mesh, "ulysses"), inner="aot_eager")
    return compared(Joint(), [randn(2, 7, WIDTH), randn(2, 13, WIDTH), randn(2, 5)], backend)


def trained_dynamic(mesh):
    """Symbolic lengths, which the ranks divide and do not divide."""
    torch.manual_seed(0)
    model, found = Joint().double(), {"error": 0.0}
    backend = with_backend("native", context_parallel=ContextParallel(mesh, "ulysses"), inner="aot_eager")
    for lengths in ((6, 12), (12, 18), (7, 13)):
        inputs = [*(randn(2, length, WIDTH) for length in lengths), randn(2, 5)]
        found = max(found, compared(model, inputs, backend, dynamic=True), key=lambda each: each["error"])
    return found


def trained_by_inductor(mesh):
    torch.manual_seed(0)
    backend = with_backend("native", context_parallel=ContextParallel(mesh, "ulysses"))
    return compared(Joint(), [randn(2, 6, WIDTH), randn(2, 12, WIDTH), randn(2, 5)], backend)


def denoiser(mesh, name, kind, regional=True):
    """A model of diffusers, by its repeated blocks or whole."""
    built = denoisers.MODELS[name](denoisers.Place(torch.device("cpu"), torch.float64, small=True))
    backend = with_backend("native", context_parallel=ContextParallel(mesh, kind), inner="eager")
    if not regional:
        built.blocks = ()
    step = built.compile(backend)
    found = {}
    for which, run in (("alone", built.step), ("shared", step)):
        built.model.zero_grad()
        loss_of(run()).backward()
        found[which] = {key: each.grad for key, each in built.model.named_parameters()}
    error, key = worst(found["shared"], found["alone"])
    plans = [graph.parallel for graph in backend.report.graphs]
    exchanges = sorted({site.exchange for plan in plans for site in plan.sites})
    return {"error": error, "name": key, "exchanges": exchanges, "refused": [plan.refused for plan in plans]}


def trained_flux(mesh):
    return denoiser(mesh, "flux", "ulysses")


def trained_wan(mesh):
    return denoiser(mesh, "wan-1.3b", "ulysses")


def trained_sd3(mesh):
    return denoiser(mesh, "sd3.5", "auto", regional=False)


def two_steps(mesh):
    """Training: with dropout, whose random numbers are those of one process, and gradients in the loss itself."""

    def losses(compiled):
        torch.manual_seed(0)
        model = Block(13).double()
        inputs, optimizer = (
            [randn(2, 13, WIDTH), randn(2, 7, 10), randn(2, 5)],
            torch.optim.SGD(model.parameters(), 1e-2),
        )

        def loss():
            return dropout(model(*inputs), 0.3).square().mean()

        call = torch.compile(loss, backend=backend, dynamic=False, fullgraph=True) if compiled else loss
        for _ in range(2):
            optimizer.zero_grad()
            call().backward()
            optimizer.step()
        return {name: each.detach() for name, each in model.named_parameters()}

    backend = with_backend("native", context_parallel=ContextParallel(mesh, "ulysses"), inner="eager")
    error, name = worst(losses(True), losses(False))
    plan = backend.report.graphs[0].parallel
    return {
        "error": error,
        "name": name,
        "exchanges": [site.exchange for site in plan.sites],
        "refused": [plan.refused],
    }


class Doubled(torch.autograd.Function):
    """A gradient of its own, which the operators of its forward do not have."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 7


def own_gradients(mesh):
    torch.manual_seed(0)
    model, inputs = Joint().double(), [randn(1, 6, WIDTH), randn(1, 12, WIDTH), randn(1, 5)]
    found = {}
    functions = {
        "a function": lambda text, image, time: model(text, Doubled.apply(image), time),
        "a checkpoint": lambda *given: torch.utils.checkpoint.checkpoint(model, *given, use_reentrant=False),
    }
    for name, function in functions.items():
        torch.compiler.reset()
        backend = with_backend("native", context_parallel=mesh, inner="eager")
        expected = gradients(model, function, inputs)
        error, _ = worst(gradients(model, torch.compile(function, backend=backend), inputs), expected)
        found[name] = {"error": error, "refused": [graph.parallel.refused for graph in backend.report.graphs]}
    return found


def other_gradients(mesh):
    """One rank trains the weights, the others do not."""
    model = Joint().double().requires_grad_(mesh.get_local_rank() == 0)
    backend = with_backend("native", context_parallel=mesh, inner="eager")
    try:
        torch.compile(model, backend=backend)(randn(1, 6, WIDTH), randn(1, 12, WIDTH), randn(1, 5))
    except Exception as error:
        return {"raised": f"{type(error).__name__}: {error}"}
    return {"raised": ""}


QUICK = (trained_ulysses, trained_gather, two_steps, own_gradients, other_gradients)
SLOW = (trained_batch, trained_joint, trained_dynamic, trained_by_inductor, trained_flux, trained_wan, trained_sd3)
CASES = (*QUICK, *SLOW) if os.environ.get("ATTNREWRITE_SLOW") else QUICK
