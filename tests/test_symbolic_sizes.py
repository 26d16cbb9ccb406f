"""Sizes that are no plain symbol: derived dimensions, sums of lengths, lengths that depend on data, unbacked exports."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from parity import relative
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

import attnrewrite
from attnrewrite import Machine, holds, records_of
from attnrewrite.graphs.emitting import Emitter
from attnrewrite.kernels.decisions import Code, Refused
from attnrewrite.kernels.machines import satisfies

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning")

H200 = Machine("cuda", (9, 0), {"torch": "2.13.0", "cudnn": "9.19.0", "fa3-fwd": "0.0.3", "flash-attn": "2.8.3"})
S = Dim("s", min=2, max=40)
DERIVED = {
    "2*s": (2 * S, 22),
    "s-1": (S - 1, 21),
    "s+1": (S + 1, 21),
    "2*s+1": (2 * S + 1, 21),
    "3*s-2": (3 * S - 2, 22),
}


class Masked(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(16, 48)

    def forward(self, x, keep):
        q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :])


def masked(length):
    keep = torch.rand(3, length) < 0.7
    keep[:, 0] = True
    return torch.randn(3, length, 16), keep


@pytest.mark.parametrize("derived", DERIVED)
@pytest.mark.parametrize("kernel", ["_native_flash", "_native_math", "flex"])
def test_derived_dimensions_of_an_export(derived, kernel):
    size, length = DERIVED[derived]
    model = Masked().eval()
    with torch.no_grad():
        made = attnrewrite.export(
            model, masked(length), backend=[kernel, "native"], dynamic_shapes={"x": {1: size}, "keep": {1: size}}
        )
        (site,) = attnrewrite.report_of(made).sites
        assert site.chosen == kernel or site.refusals[0][0] == kernel
        for other in (length, length + 6):
            given = masked(other)
            assert relative(made.module()(*given), model(*given)) < 1e-5


@pytest.mark.parametrize("kernel", ["_native_efficient", "_native_cudnn", "flash_varlen", "_flash_3"])
def test_derived_dimensions_for_another_machine(kernel):
    """Padding and packing compute numbers from the length: the program has only 2*s + 1 for s."""
    model = Masked().eval().bfloat16()
    x, keep = masked(21)
    with torch.no_grad():
        made = attnrewrite.export(
            model, (x.bfloat16(), keep), backend=[kernel, "native"], machine=H200,
            dynamic_shapes={"x": {1: 2 * S + 1}, "keep": {1: 2 * S + 1}},
        )  # fmt: skip
    (site,) = attnrewrite.report_of(made).sites
    assert site.chosen == kernel or site.refusals[0][0] == kernel


@pytest.mark.parametrize("sizes", [(1, 2, 1, 0), (1, -1, 3, 0), (0, 2, 5, 3), (1, 1, 0, 1)])
def test_a_number_from_sizes_that_are_affine_in_its_symbols(sizes):
    """A graph that has s only as `times * s + more`, and t beside it or in a sum with s."""
    alone, times, more, other = sizes
    shape_env = ShapeEnv()

    def symbol(name, hint):
        made = shape_env.create_symbol(hint, ConstantSource(name), DimDynamic.DYNAMIC)
        return shape_env.create_symintnode(made, hint=hint)

    with FakeTensorMode(shape_env=shape_env):
        s, t = symbol("s", 7), symbol("t", 11)
        graph = torch.fx.Graph()
        node, second = graph.placeholder("x"), graph.placeholder("y")
        node.meta["val"] = torch.empty(times * s + more + other * t + 20 * (times < 0), 4)
        second.meta["val"] = torch.empty(t, s) if alone and other else torch.empty(t, 3)
        end = graph.output((node,))
        module = torch.fx.GraphModule(torch.nn.Module(), graph)
        emitter = Emitter(module)
        with emitter.before(end, False, node.meta["val"]):
            number = emitter.number(2 * s + t)
        end.args = (number,)
    module.recompile()
    for left, right in ((7, 11), (5, 13)):
        first = torch.empty(times * left + more + other * right + 20 * (times < 0), 4)
        beside = torch.empty(right, left) if alone and other else torch.empty(right, 3)
        assert module(first, beside) == 2 * left + right


@pytest.mark.parametrize("kernel", ["native", "_native_math", "_native_flash"])
def test_a_length_that_depends_on_data(kernel):
    """Text trimmed by its mask, joined with the image: a bias for the keys is as long as both together."""

    def model(image, text, mask):
        n = mask.sum().item()
        torch._check(n >= 1)
        torch._check(n <= text.shape[2])
        x = torch.cat([image, text[:, :, :n]], 2)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=x[:, :1, :, :1].transpose(-1, -2))

    image, text = torch.randn(2, 3, 16, 8), torch.randn(2, 3, 9, 8)
    backend = attnrewrite.with_backend(*dict.fromkeys((kernel, "native")), inner="eager")
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        run = torch.compile(model, backend=backend, fullgraph=True)
        for kept in (5, 7, 9):
            given = image, text, torch.arange(9) < kept
            assert relative(run(*given), model(*given)) < 1e-5
    assert [site.chosen for site in backend.report.sites] == [kernel]


@pytest.mark.skipif(not satisfies(torch.__version__, ">=2.15"), reason="ShapesSpec in torch.export is new in 2.15")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kernel", ["native", "_native_flash", "_native_math", "flex"])
def test_an_export_with_unbacked_sizes_everywhere(kernel, strict):
    from torch.fx.experimental.dynamic_spec import ParamsSpec, ShapesSpec, ShapeVar, TensorSpec

    batch, length = ShapeVar("batch", min=1, max=64), ShapeVar("length", min=2, max=4096)
    spec = ShapesSpec(ParamsSpec({"x": TensorSpec([batch, length, 16]), "keep": TensorSpec([batch, length])}))
    model = Masked().eval()
    program = torch.export.export(model, masked(21), dynamic_shapes=spec, strict=strict)
    made = attnrewrite.rewrite(program, *dict.fromkeys((kernel, "native")))
    (site,) = attnrewrite.report_of(made).sites
    assert site.chosen == kernel or (kernel == "flex" and site.refusals)
    with torch.no_grad():
        for length in (21, 2, 77):
            given = masked(length)
            assert relative(made.module()(*given), model(*given)) < 1e-5


@pytest.mark.skipif(not satisfies(torch.__version__, ">=2.15"), reason="ShapesSpec in torch.export is new in 2.15")
def test_a_kernel_that_must_know_a_size_refuses_unbacked_ones():
    from torch.fx.experimental.dynamic_spec import ParamsSpec, ShapesSpec, ShapeVar, TensorSpec

    def short(call, machine):
        return None if holds(call.q_len <= 512) else Refused(Code.LENGTH, f"{call.q_len} queries", "none")

    length = ShapeVar("length", min=2, max=4096)
    spec = ShapesSpec(ParamsSpec({"x": TensorSpec([3, length, 16]), "keep": TensorSpec([3, length])}))
    program = torch.export.export(Masked().eval(), masked(21), dynamic_shapes=spec)
    record = replace(records_of("_native_math")[0], name="short", checks=(short,))
    (site,) = attnrewrite.report_of(attnrewrite.rewrite(program, record, "native")).sites
    assert site.chosen == "native"
    assert site.refusals[0][1].code == Code.UNBACKED
