"""Helpers of all parity tests: they compare the compiled function with the unchanged one, eager in float64."""

import re

import pytest
import torch
import torch.nn.functional as F

import attnrewrite
from attnrewrite.kernels.machines import satisfies
from attnrewrite.planning.usable import usable

# Before 2.13 flex takes no boolean mask on a CPU (backends/flex.py).
FLEX_TAKES_MASKS = satisfies(torch.__version__, ">=2.13")

# Relative error that rounding alone explains, by the dtype of the products.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def relative(output: torch.Tensor, reference: torch.Tensor) -> float:
    """|output - reference| / |reference|, 2-norms. NaN anywhere gives NaN, which no comparison passes."""
    return ((output.double() - reference.double()).norm() / reference.double().norm()).item()


def qkv(batch=2, heads=4, kv_heads=None, q_len=7, kv_len=11, dim=16, value_dim=None, dtype=torch.float32, device="cpu"):
    """Query, key and value whose sizes all differ unless asked, laid out (batch, length, heads, dim) in memory."""
    kv_heads = kv_heads or heads
    value_dim = value_dim or dim
    shapes = ((q_len, heads, dim), (kv_len, kv_heads, dim), (kv_len, kv_heads, value_dim))
    return [torch.randn(batch, *shape, dtype=dtype, device=device).transpose(1, 2) for shape in shapes]


def attend(query, key, value, mask=None, **arguments):
    """As models do it: attention, then the heads side by side."""
    output = F.scaled_dot_product_attention(query, key, value, mask, **arguments)
    return output.transpose(1, 2).reshape(output.shape[0], output.shape[2], -1)


def windowed(left, right):
    """`attend` with a sliding window: a query sees `left` keys before its own position and `right` after it; None: all."""

    def run(query, key, value):
        position = torch.arange(query.shape[2], device=query.device)
        distance = position[None, :] - position[:, None]
        seen = torch.ones_like(distance, dtype=torch.bool)
        if left is not None:
            seen = seen & (distance >= -left)
        if right is not None:
            seen = seen & (distance <= right)
        return attend(query, key, value, seen)

    return run


def doubled(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def compiled(function, backend, inner="eager", dynamic=False, **options):
    """The function compiled through a backend (a name, a record or an object), and that backend."""
    if not isinstance(backend, attnrewrite.AttentionCompiler):
        backend = attnrewrite.with_backend(backend, inner=inner)
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic, **options), backend


def without_times(report):
    """The JSON of a report as a program's file holds it: without the seconds that the passes took."""
    return re.sub(r'"seconds": [^,]+', '"seconds": 0.0', report.to_json())


def on_this_gpu(name):
    """The record of a kernel that this GPU can run; skips the test where it cannot, with the reason."""
    refused, record = usable(name, attnrewrite.machine_of(torch.device("cuda", 0)))
    if refused is not None:
        pytest.skip(f"{name}: {refused}")
    return record


def skip_if_fenced(site):
    """Some kernels are refused on an older torch: there is nothing to compare."""
    for name, refused in site.refusals:
        if site.chosen is None and refused.code is attnrewrite.Code.VERSION:
            pytest.skip(f"{name}: {refused}")


def check(backend, *tensors, inner="eager", dynamic=False, tolerance=None, function=attend, **arguments):
    """Asserts that one site is swapped and right; returns the site."""
    run, backend = compiled(lambda *given: function(*given, **arguments), backend, inner, dynamic)
    output = run(*tensors)
    reference = function(*map(doubled, tensors), **arguments)
    (site,) = backend.report.sites
    skip_if_fenced(site)
    assert site.chosen == backend.policy.choices[0].name, site
    error = relative(output, reference)
    assert error < (tolerance or TOLERANCE[tensors[0].dtype]), f"{site.chosen}: relative error {error:.2e}"
    return site


def recorded(calls):
    """An inner compiler that runs the graph as it is and notes every call of an op of attnrewrite: (op, args, kwargs)."""

    class Recorder(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):
            if str(target).startswith("attnrewrite."):
                calls.append((target, [_leaf(value) for value in args], kwargs))
            return super().call_function(target, args, kwargs)

    return lambda graph_module, example_inputs: lambda *inputs: Recorder(graph_module).run(*inputs)


def _leaf(value):
    """The tensor as a leaf of autograd: opcheck reads the gradients of its inputs."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value
