"""Exported programs with swapped kernels: what is swapped is right, what was decided is checked at every call, and the file
brings it all to a process that has no model."""

import copy
import json
import os
import pickle
import re
import subprocess
import sys
import tracemalloc
import zipfile
from dataclasses import replace

import forked
import pytest
import stand_ins as doubles
import torch
import torch._functorch.config
import torch._inductor.graph
import torch.nn.functional as F
from parity import relative, without_times
from torch.export import Dim
from torch.utils._pytree import tree_map

import attnrewrite
from attnrewrite import HeadDim, Machine, MaskKind, holds, records_of
from attnrewrite.__main__ import main as command
from attnrewrite.aot import archives, manifests
from attnrewrite.aot.check_ops import CHECK_INPUTS, CHECK_SIZE, is_assertion
from attnrewrite.aot.programs import record_of
from attnrewrite.graphs.questions import noted
from attnrewrite.kernels.decisions import Code, Refused
from attnrewrite.kernels.machines import satisfies

pytestmark = [  # torch.export's own
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning"),
]

H200 = Machine("cuda", (9, 0), {"torch": "2.11.0", "cudnn": "9.19.0", "fa3-fwd": "0.0.3", "flash-attn-4": "4.0.0b36"})


class Attend(torch.nn.Module):
    """Some attentions in a row: (batch, length, 24) in and out, three heads of 8, keys from `context` in the last."""

    def __init__(self, layers=1, causal=False):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(24, 72) for _ in range(layers))
        self.register_buffer("shift", torch.randn(24))
        self.causal = causal

    def forward(self, x, context=None, mask=None):
        for layer in self.layers:
            q, k, v = (part.unflatten(-1, (3, 8)).transpose(1, 2) for part in layer(x + self.shift).chunk(3, -1))
            if context is not None:
                k, v = (part.unflatten(-1, (3, 8)).transpose(1, 2) for part in layer(context).chunk(3, -1)[1:])
            x = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal).transpose(1, 2).flatten(2)
        return x


def exported(model=None, *tensors, dynamic=None, **options):
    model = (model or Attend()).eval().requires_grad_(False)
    tensors = tensors or (torch.randn(2, 7, 24),)
    return torch.export.export(model, tensors, dynamic_shapes=dynamic, **options), model, tensors


def assertions(program):
    return [node for node in program.graph.nodes if is_assertion(node)]


def named(program):
    return [(node.name, str(node.target)) for node in program.graph.nodes]


def limited(check=None, **limits):
    """A kernel that is PyTorch's math with limits of its own."""
    (math,) = records_of("_native_math")
    return replace(math, name="limited", checks=(check,) if check else (), **limits)


def multiple_of_4(call, machine):
    fine = holds(call.kv_len % 4 == 0)
    return None if fine else Refused(Code.LENGTH, "kv_len is no multiple of 4", "Pad")


def up_to_128(call, machine):
    return None if holds(call.q_len <= 128) else Refused(Code.LENGTH, "q_len is over 128", "Shorten")


# -- what a rewrite keeps, and what it changes


def test_the_given_program_is_not_touched():
    program, _model, _tensors = exported(None, torch.randn(2, 8, 24), dynamic=({0: Dim("b"), 1: Dim("s")},))
    before, ranges = named(program), dict(program.range_constraints)
    size = next(n for n in program.graph.nodes if n.name == "x").meta["val"].shape[1]
    guards = len(size.node.shape_env.guards)
    made = attnrewrite.rewrite(program, limited(multiple_of_4))
    assert named(program) == before
    assert program.range_constraints == ranges
    assert len(size.node.shape_env.guards) == guards
    assert "evaluate_expr" not in vars(size.node.shape_env)
    assert bool((size + 1) % 4 != 0)  # its questions are its own again
    assert named(made) != before
    assert torch.ops.aten.scaled_dot_product_attention.default not in [node.target for node in made.graph.nodes]


def test_weights_are_shared_and_the_signature_is_kept():
    program, model, tensors = exported(Attend(2))
    made = attnrewrite.rewrite(program, "_native_flash")
    assert made.state_dict["layers.0.weight"].data_ptr() == model.layers[0].weight.data_ptr()
    assert made.state_dict["shift"].data_ptr() == model.shift.data_ptr()
    assert made.graph_signature.input_specs == program.graph_signature.input_specs
    assert made.range_constraints == program.range_constraints
    assert made.call_spec.in_spec == program.call_spec.in_spec
    new = [node for node in made.graph.nodes if node.name not in dict(named(program)) and not is_assertion(node)]
    assert len(new) >= 2
    assert all("val" in node.meta and "nn_module_stack" in node.meta for node in new), new
    made.validate()
    assert relative(made.module()(*tensors), copy.deepcopy(model).double()(tensors[0].double())) < 1e-6


def test_a_swapped_attention_may_be_an_output():
    class Bare(torch.nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v), q + 1

    tensors = [torch.randn(2, 3, 5, 16) for _ in range(3)]
    program, model, _ = exported(Bare(), *tensors)
    made = attnrewrite.rewrite(program, "_native_math")
    outputs = [spec.arg.name for spec in made.graph_signature.output_specs]
    assert outputs == [node.name for node in made.graph.output_node().args[0]]
    assert relative(made.module()(*tensors)[0], model(*tensors)[0]) < 1e-6


@pytest.mark.parametrize("kernel", ["_native_flash", "_native_math"])
def test_decomposed_before_and_after(kernel):
    program, model, tensors = exported(Attend(2, causal=True), dynamic=({0: Dim("b"), 1: Dim("s", min=2, max=64)},))
    expected = model(*tensors)
    before = attnrewrite.rewrite(program.run_decompositions(), kernel)
    table = torch.export.default_decompositions()
    # PyTorch's own table makes matmul and softmax of its CPU kernel.
    table.pop(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default)
    after = attnrewrite.rewrite(program, kernel).run_decompositions(table)
    assert attnrewrite.report_of(before).swapped == 2
    for made in (before, after):
        assert relative(made.module()(*tensors), expected) < 1e-6
        assert assertions(made)
        with pytest.raises(attnrewrite.AttentionAssertionError):
            made.module()(tensors[0].double())
    assert "flash_attention_for_cpu" in str(after.graph) or kernel == "_native_math"


@pytest.mark.parametrize("around", ["autocast", "cond"])
def test_attention_in_a_graph_below(around):
    class Below(Attend):
        def forward(self, x):
            if around == "cond":
                return torch.cond(x.sum() > 0, super().forward, lambda x: x * 2, (x,))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x).float() + x

    program, model, tensors = exported(Below(), torch.rand(2, 7, 24), dynamic=({0: Dim("b"), 1: Dim("s")},))
    given = [str(each.graph) for each in program.graph_module.modules()]
    made = attnrewrite.rewrite(program, "_native_flash")
    assert attnrewrite.report_of(made).swapped == 1
    assert [str(each.graph) for each in program.graph_module.modules()] == given
    for x in (tensors[0], torch.rand(3, 12, 24)):
        assert relative(made.module()(x), model(x)) < 1e-6
    assert "x.shape[1] >= 1 must hold" in violated(made, torch.rand(2, 0, 24))
    assert "float64" in violated(made, tensors[0].double())


def test_graph_modules():
    program, model, tensors = exported()
    module = program.module()
    before = module.code
    made = attnrewrite.rewrite(module, "_native_flash")
    assert attnrewrite.report_of(made).swapped == 1
    assert module.code == before
    assert made.layers._modules["0"].weight is module.layers._modules["0"].weight
    assert relative(made(*tensors), model(*tensors)) < 1e-6
    flex = attnrewrite.rewrite(module, "flex")  # nobody can save it, but it runs
    assert attnrewrite.report_of(flex).swapped == 1
    assert relative(flex(*tensors), model(*tensors)) < 1e-6


def test_another_choice_starts_from_the_program_before_any():
    program, model, tensors = exported()
    first = attnrewrite.rewrite(program, "_native_math")
    assert attnrewrite.report_of(attnrewrite.rewrite(first, "_native_flash")).swapped == 1
    back = attnrewrite.rewrite(first, "native")
    assert named(back) == named(program)
    assert torch.equal(back.module()(*tensors), model(*tensors))


class SpelledOut(torch.nn.Module):
    def forward(self, q, k, v):
        return (q @ k.mT * 0.3).softmax(-1) @ v


@pytest.mark.parametrize(
    ("first", "second"), [("native", "native"), ("_native_flash", "_native_math"), ("flex", "native")]
)
@pytest.mark.parametrize("spelled_out", [False, True])
def test_graph_modules_are_rewritten_again_from_the_graph_before(first, second, spelled_out):
    tensors = [torch.randn(2, 3, length, 8) for length in (7, 11, 11)] if spelled_out else [torch.randn(2, 7, 24)]
    program, model, _ = exported(SpelledOut() if spelled_out else Attend(), *tensors)
    made = attnrewrite.rewrite(attnrewrite.rewrite(program.module(), first), second)
    (site,) = attnrewrite.report_of(made).sites
    assert site.chosen == second
    assert relative(made(*tensors), model(*tensors)) < 1e-6


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # of torch.export.load on 2.9
def test_changes_behind_a_rewrite_are_kept(tmp_path):
    program, model, tensors = exported(Attend(2))
    made = attnrewrite.rewrite(program, "_native_math")
    (last,) = made.graph.output_node().args[0]
    with made.graph.inserting_after(last):
        double = made.graph.call_function(torch.ops.aten.mul.Tensor, (last, 2.0))
        double.meta = dict(last.meta)
    made.graph.output_node().args = ((double,),)
    made.graph_signature.output_specs[0].arg.name = double.name
    made.graph_module.recompile()
    expected = model(*tensors) * 2
    again = attnrewrite.rewrite(made, "_native_flash")
    assert relative(again.module()(*tensors), expected) < 1e-6
    assert assertions(again)
    attnrewrite.save(made, tmp_path / "a.pt2")
    attnrewrite.retarget(tmp_path / "a.pt2", tmp_path / "b.pt2", "native")
    assert relative(attnrewrite.load(tmp_path / "b.pt2").module()(*tensors), expected) < 1e-6
    assert attnrewrite.report_of(made.run_decompositions()).swapped == 2


def test_numbers_that_export_lifts_are_known():
    class Spelled(torch.nn.Module):
        def forward(self, q, k, v):
            return ((q @ k.transpose(-1, -2)) / torch.tensor(4.0)).softmax(-1) @ v

    tensors = [torch.randn(2, 3, 5, 8) for _ in range(3)]
    program, model, _ = exported(Spelled(), *tensors)
    made = attnrewrite.rewrite(program, "_native_flash")
    (site,) = attnrewrite.report_of(made).sites
    assert (site.chosen, site.call.scale) == ("_native_flash", 0.25)
    assert relative(made.module()(*tensors), model(*tensors)) < 1e-6


def test_what_no_program_can_hold_is_refused():
    made = attnrewrite.rewrite(exported()[0], "flex", "_native_math")
    (site,) = attnrewrite.report_of(made).sites
    assert site.chosen == "_native_math"
    assert site.refusals[0][1].code is Code.CONTEXT
    assert "torch.export.save cannot write" in str(site.refusals[0][1])


def test_strict_and_wrong_arguments():
    program = exported()[0]
    with pytest.raises(attnrewrite.AttentionRefusedError, match="flash_4 runs on cuda"):
        attnrewrite.rewrite(program, "flash_4", strict=True)
    with pytest.raises(attnrewrite.AttentionRefusedError, match="no attention was found"):
        attnrewrite.export(torch.nn.Linear(24, 3), (torch.randn(2, 7, 24),), backend="native", strict=True)
    report = attnrewrite.report_of(
        attnrewrite.rewrite(program, "native", rules={"nowhere": "native", "self": "native"})
    )
    assert report.unmatched_rules == ["nowhere"]
    for given in ({"nowhere": "native"}, {"nowhere.*": "_native_math", "self": "native"}):
        with pytest.raises(ValueError, match=r"rules match none of the 1 attention sites:\n  'nowhere"):
            attnrewrite.rewrite(program, "native", rules=given, strict=True)
    assert (
        attnrewrite.report_of(attnrewrite.rewrite(program, "native", rules={"cross": "native"}, strict=True)).native
        == 1
    )
    with pytest.raises(TypeError, match=r"program is Attend: .*attnrewrite\.export\(model"):
        attnrewrite.rewrite(Attend(), "native")
    with pytest.raises(ValueError, match="no attention backend is called 'nativ'"):
        attnrewrite.export(Attend(), (torch.randn(2, 7, 24),), backend="nativ")
    with pytest.raises(TypeError, match="model is the class Attend: give an object of it"):
        attnrewrite.export(Attend, (torch.randn(2, 7, 24),), backend="native")
    with pytest.raises(ValueError, match="this program has no report"):
        attnrewrite.report_of(program)
    with pytest.raises(TypeError, match="program is Attend: give what attnrewrite"):
        attnrewrite.report_of(Attend())
    with pytest.raises(TypeError, match="program is Attend"):
        attnrewrite.save(Attend(), "x.pt2")
    for load in (attnrewrite.load, attnrewrite.load_package):
        with pytest.raises(TypeError, match=r"trust_remote_code is 'no' \(str\): give True or False"):
            load("x.pt2", trust_remote_code="no")
    with pytest.raises(TypeError, match="cpp is 'no'"):
        attnrewrite.aot_compile(program, "x.pt2", cpp="no")
    with pytest.raises(TypeError, match="program is Attend"):
        attnrewrite.aot_compile(Attend(), "x.pt2")


@pytest.mark.parametrize("record", doubles.KERNELS, ids=doubles.name_of)
def test_every_kernel_of_a_package_can_be_exported(record, stand_ins):
    """For a described machine: nothing is loaded until the program runs."""
    stand_ins(record)
    if record.name in ("_native_xla", "_native_npu"):
        pytest.skip("its operators come with the library: it is exported where that is installed")
    dtype = next(getattr(torch, name) for name in ("float16", "bfloat16", "float32") if name in record.dtypes)
    dim = max(64, record.head_dim.minimum)
    tensors = [torch.randn(2, length, 4, dim, dtype=dtype).transpose(1, 2) for length in (64, 128, 128)]

    class Bare(torch.nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v) * 1

    program, model, _ = exported(Bare(), *tensors)
    made = attnrewrite.rewrite(program, record, numerics="quantised", machine=doubles.machine_for(record))
    (site,) = attnrewrite.report_of(made).sites
    assert site.chosen == record.name, site
    (check,) = (node for node in assertions(made) if node.target is CHECK_INPUTS)
    assert check.kwargs["names"] == ["q", "k", "v"]
    for node in assertions(made):
        made.graph_module.graph.erase_node(node)  # it is for another device
    made.graph_module.recompile()
    double = model(*(tensor.double() for tensor in tensors))
    assert relative(made.module()(*tensors), double) < max(record.tolerance.error, 1e-3)


# -- what was decided is checked


def violated(program, *tensors):
    with pytest.raises(attnrewrite.AttentionAssertionError) as caught:
        program.module()(*tensors)
    return str(caught.value)


SIZES = ({0: Dim("b", min=1), 1: Dim("s", max=96)},)


def test_dtype_and_device():
    program, _, tensors = exported(Attend(2))
    made = attnrewrite.rewrite(program, "_native_flash")
    said = violated(made, tensors[0].double())
    assert said.startswith(
        "attention site 'Attend' (_native_flash) and 1 more: input 'x' is float64, the program needs float32."
    )
    elsewhere = attnrewrite.rewrite(program, "_native_efficient", machine=H200)
    assert "input 'x' is on cpu, the program needs cuda. Move the input, and the program" in violated(
        elsewhere, *tensors
    )


def test_rows_that_are_read_as_they_lie():
    """PyTorch's CPU kernel reads a row with a stride as if it were dense; behind a linear layer it does not matter."""

    class Bare(torch.nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q * 2, k.transpose(1, 2).transpose(1, 2), v) * 1

    tensors = [torch.randn(2, 3, 5, 16) for _ in range(3)]
    made = attnrewrite.rewrite(exported(Bare(), *tensors)[0], "_native_flash")
    for place, name in enumerate("qkv"):
        turned = list(tensors)
        turned[place] = tensors[place].transpose(2, 3).contiguous().transpose(2, 3)
        assert f"input '{name}' has a stride of 5 in its last dimension, the program needs 1" in violated(made, *turned)
    program, model, (x,) = exported()
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert relative(attnrewrite.rewrite(program, "_native_flash").module()(turned), model(x)) < 1e-6


def test_one_check_a_condition_and_not_one_a_site():
    program, model, _ = exported(Attend(3), torch.randn(2, 8, 24), dynamic=SIZES)
    made = attnrewrite.rewrite(program, limited(multiple_of_4, empty=False))
    targets = [node.target for node in assertions(made)]
    assert targets.count(CHECK_INPUTS) == 1
    said = [node.kwargs["says"] for node in assertions(made) if node.target is CHECK_SIZE]
    assert sorted(said) == ["x.shape[0] >= 1", "x.shape[1] % 4 == 0", "x.shape[1] >= 1"]
    assert "(limited) and 2 more" in assertions(made)[1].kwargs["sites"]
    assert relative(made.module()(wide := torch.randn(5, 12, 24)), model(wide)) < 1e-6
    assert "x.shape[1] % 4 == 0 must hold, but the left side is 2 and the right side is 0" in violated(
        made, torch.randn(2, 10, 24)
    )
    assert "x.shape[1] >= 1 must hold, but the left side is 0" in violated(made, torch.randn(2, 0, 24))
    # Dim("b", min=1) is in the range constraints, which hold no program to a least size of 2 or less.
    assert "x.shape[0] >= 1 must hold, but the left side is 0" in violated(made, torch.randn(0, 8, 24))


def test_what_is_assumed_while_tracing_is_asked_when_it_runs():
    """Dim.DYNAMIC gives a range from 2 on, and the program runs with 0 and 1. PyTorch's CPU kernel divides by a length of 0."""
    sizes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    program, model, _ = exported(None, torch.randn(3, 8, 24), dynamic=sizes)
    made = attnrewrite.rewrite(program, "_native_flash")
    assert "x.shape[1] >= 1 must hold, but the left side is 0" in violated(made, torch.randn(3, 0, 24))
    assert relative(made.module()(one := torch.randn(1, 1, 24)), model(one)) < 1e-6
    program, _, _ = exported(Attend().half(), torch.randn(3, 8, 24).half(), dynamic=sizes)
    made = attnrewrite.rewrite(program, "_native_cudnn", machine=H200)
    assert attnrewrite.report_of(made).swapped == 1
    assert "x.shape[1] >= 2" in [node.kwargs["says"] for node in assertions(made) if node.target is CHECK_SIZE]


def test_sizes_that_the_program_is_made_for():
    """ExportedProgram.module() looks at them too, a package of AOTInductor does not: so does the node (test_aot.py)."""

    class Prompted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.words = torch.nn.Embedding(9, 24)
            self.attend = Attend()

        def forward(self, x, tokens, unused):
            return self.attend(x + self.words(tokens)) * unused.mean()

    tensors = (torch.randn(2, 8, 24), torch.zeros(2, 8, dtype=torch.int64), torch.ones(5))
    program, _, _ = exported(Prompted(), *tensors, dynamic=({1: (s := Dim("s", min=4, max=96))}, {1: s}, None))
    (node,) = (
        each for each in assertions(attnrewrite.rewrite(program, "_native_flash")) if each.target is CHECK_INPUTS
    )
    assert [each.name for each in node.args[0]] == node.kwargs["names"] == ["x", "tokens"]
    assert node.kwargs["dtypes"] == ["float32", ""]  # integers of any width
    assert node.kwargs["ranks"] == [3, 2]
    assert node.kwargs["least"] == [2, 4, 24, 2, 4]
    assert node.kwargs["most"] == [2, 96, 24, 2, 96]
    asked = dict(node.kwargs)
    for given, said in (
        ((tensors[0][:, :3], tensors[1]), "input 'x' has size 3 in dimension 1, the program needs at least 4"),
        ((torch.randn(2, 97, 24), tensors[1]), "input 'x' has size 97 in dimension 1, the program needs at most 96"),
        ((tensors[0], tensors[1][:1]), "input 'tokens' has size 1 in dimension 0, the program needs 2"),
        ((tensors[0], tensors[1][0]), "input 'tokens' has 1 dimensions, the program needs 2"),
    ):
        with pytest.raises(attnrewrite.AttentionAssertionError, match=re.escape(said)):
            CHECK_INPUTS(list(given), **asked)
    CHECK_INPUTS([tensors[0], tensors[1].int()], **asked)


def test_a_second_rewrite_asks_again():
    """No result comes from a cache, which would ask nothing."""
    program, _, _ = exported(Attend(2), torch.randn(2, 8, 24), dynamic=SIZES)
    first, second = (attnrewrite.rewrite(program, limited(multiple_of_4)) for _ in range(2))
    assert record_of(first).checks == record_of(second).checks
    assert len(record_of(first).checks) > 1
    program, _, _ = exported(
        Attend(), torch.randn(2, 8, 24), torch.randn(2, 8, 24), dynamic=({1: Dim("s")}, {1: Dim("t")})
    )
    one, other = (node.meta["val"] for node in program.graph.nodes if node.name in ("x", "context"))
    for _ in range(2):
        with noted(program.graph_module, program.range_constraints) as questions, one.fake_mode:
            one + other
        assert len(questions.asked) == 1


def test_a_gradient_is_never_lost(stand_ins):
    """An exported graph does not say that weights are trained; a kernel without a backward would leave them out in silence."""
    record = stand_ins(next(each for each in doubles.KERNELS if each.name == "_flash_3"))
    model, x = Attend().half(), torch.randn(2, 64, 24, dtype=torch.float16)
    made = attnrewrite.rewrite(torch.export.export(model, (x,)), record, machine=replace(doubles.machine_for(record)))
    (check,) = (node for node in assertions(made) if "gradient" in str(node.target))
    assert [node.name for node in check.args[0]] == ["x", "p_layers_0_weight"]
    for node in assertions(made):
        if node is not check:
            made.graph_module.graph.erase_node(node)  # for another device
    made.graph_module.recompile()
    with pytest.raises(attnrewrite.AttentionAssertionError, match=r"'Attend' \(_flash_3\): a gradient is asked for"):
        made.module()(x)
    with torch.no_grad():
        assert made.module()(x).shape == x.shape

    made = attnrewrite.rewrite(torch.export.export(Attend(), (x.float(),)), "_native_flash").module()
    made(x.float()).sum().backward()
    plain = torch.export.export(Attend(), (x.float(),)).module()
    plain.load_state_dict(made.state_dict())
    plain(x.float()).sum().backward()
    for name, parameter in plain.named_parameters():
        assert relative(made.get_parameter(name).grad, parameter.grad) < 1e-5


def test_ranges_make_checks_superfluous():
    def checks(shapes):
        program, _, _ = exported(None, torch.randn(2, 8, 24), dynamic=shapes)
        made = attnrewrite.rewrite(program, limited(up_to_128, empty=True))
        return [node.kwargs["says"] for node in assertions(made) if node.target is CHECK_SIZE]

    assert checks(({1: Dim("s", max=128)},)) == []
    assert checks(({1: Dim("s", max=129)},)) == ["x.shape[1] <= 128"]
    assert checks(None) == []


def test_a_size_limit_and_a_head_dim():
    program, _, _ = exported(None, torch.randn(2, 8, 24), dynamic=({1: Dim("s")},))
    made = attnrewrite.rewrite(program, limited(up_to_128))
    assert "x.shape[1] <= 128 must hold, but the left side is 129" in violated(made, torch.randn(2, 129, 24))

    class Wide(torch.nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v) * 1

    tensors = [torch.randn(2, 3, 5, 24) for _ in range(3)]
    program, model, _ = exported(Wide(), *tensors, dynamic=tuple({3: Dim("d", min=8)} for _ in range(3)))
    made = attnrewrite.rewrite(program, limited(head_dim=HeadDim(max=64, multiple=8)))
    fine = [torch.randn(2, 3, 5, 32) for _ in range(3)]
    assert relative(made.module()(*fine), model(*fine)) < 1e-6
    assert "q.shape[3] <= 64 must hold, but the left side is 72" in violated(
        made, *(torch.randn(2, 3, 5, 72) for _ in range(3))
    )
    assert "q.shape[3] % 8 == 0 must hold, but the left side is 4" in violated(
        made, *(torch.randn(2, 3, 5, 20) for _ in range(3))
    )


def test_the_orientation_of_causal():
    """Upper-left for a kernel that is lower-right: only where both lengths are equal."""
    shapes = ({1: Dim("s")}, {1: Dim("t")})
    program, model, _ = exported(Attend(causal=True), torch.randn(2, 6, 24), torch.randn(2, 6, 24), dynamic=shapes)
    made = attnrewrite.rewrite(program, limited(masks=frozenset({MaskKind.NONE, MaskKind.CAUSAL_LOWER_RIGHT})))
    fine = [torch.randn(2, 9, 24), torch.randn(2, 9, 24)]
    assert relative(made.module()(*fine), model(*fine)) < 1e-6
    said = violated(made, torch.randn(2, 9, 24), torch.randn(2, 5, 24))
    assert "x.shape[1]" in said
    assert "context.shape[1]" in said
    assert "==" in said


def test_what_was_asked_to_refuse_is_not_checked():
    program, model, _ = exported(None, torch.randn(2, 7, 24), dynamic=({1: Dim("s")},))
    made = attnrewrite.rewrite(program, limited(multiple_of_4), "_native_math")
    assert attnrewrite.report_of(made).sites[0].chosen == "_native_math"
    assert relative(made.module()(wide := torch.randn(2, 8, 24)), model(wide)) < 1e-6


def test_the_smaller_code_does_not_bind_a_program():
    """The bias has rows of 16. Under torch.compile a guard on multiples of 16 saves code; a program takes every length."""
    mask = torch.ones(7, 7, dtype=torch.bool)
    length = Dim("s")
    program, _, _ = exported(
        None, torch.randn(2, 7, 24), None, mask, dynamic=({1: length}, None, {0: length, 1: length})
    )
    made = attnrewrite.rewrite(program, "_native_efficient", machine=H200)
    assert attnrewrite.report_of(made).swapped == 1
    assert [node.kwargs["says"] for node in assertions(made) if node.target is CHECK_SIZE] == ["x.shape[1] >= 1"]


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_checks_survive_compilation(compiler, monkeypatch):
    if compiler == "inductor" and not satisfies(torch.__version__, ">=2.11"):
        pytest.skip("before torch 2.11 Inductor removes ops without a result (docs/aot.md)")
    # On machines with this variable Inductor calls no operator that has a decomposition (torch/_inductor/lowering.py).
    monkeypatch.setenv("CI", "true")
    monkeypatch.setattr(torch._inductor.lowering, "FALLBACK_ALLOW_LIST", set())
    monkeypatch.setattr(torch._inductor.graph, "FALLBACK_ALLOW_LIST", torch._inductor.lowering.FALLBACK_ALLOW_LIST)
    program, _, _tensors = exported(None, torch.randn(2, 8, 24), dynamic=SIZES)
    made = attnrewrite.rewrite(program, limited(multiple_of_4))
    step = torch.compile(made.module(), backend=compiler, dynamic=True)
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        assert step(torch.randn(3, 12, 24)).shape == (3, 12, 24)
    for wrong, said in ((torch.randn(3, 10, 24), "left side is 2"), (torch.randn(3, 12, 24).double(), "float64")):
        with pytest.raises(attnrewrite.AttentionAssertionError, match=said):
            step(wrong)


# -- files


@pytest.fixture(scope="module")
def swapped_program():
    """A rewritten program, its model, and inputs: nothing that is done with a file changes them."""
    program, model, tensors = exported(Attend(2), torch.randn(2, 8, 24), dynamic=SIZES)
    return attnrewrite.rewrite(program, "_native_math"), model, tensors


@pytest.fixture
def saved(swapped_program, tmp_path):
    attnrewrite.save(swapped_program[0], tmp_path / "a.pt2")
    return tmp_path / "a.pt2", *swapped_program


def test_a_file_brings_plan_and_checks(saved):
    path, made, model, tensors = saved
    program = attnrewrite.load(path)
    assert attnrewrite.report_of(program).to_json() == without_times(attnrewrite.report_of(made))
    assert attnrewrite.explain_file(path).to_json() == without_times(attnrewrite.report_of(made))
    assert record_of(program).checks == record_of(made).checks
    assert record_of(program).checks[0].startswith("inputs are x float32 on cpu")
    assert torch.equal(program.module()(*tensors), made.module()(*tensors))
    assert "float64" in violated(program, tensors[0].double())
    plain = torch.export.load(path)
    assert torch.equal(plain.module()(*tensors), made.module()(*tensors))
    assert record_of(made) is not None  # saving has taken nothing away
    back = attnrewrite.rewrite(program, "native")
    assert torch.equal(back.module()(*tensors), model(*tensors))
    assert back.state_dict["shift"] is program.state_dict["shift"]
    moved = attnrewrite.load(path, device="cpu")
    assert torch.equal(moved.module()(*tensors), made.module()(*tensors))
    assert torch.equal(attnrewrite.rewrite(moved, "native").module()(*tensors), model(*tensors))


def test_the_plan_is_json_and_nothing_more_is_unpickled(saved, monkeypatch):
    path, _, _, _ = saved
    with zipfile.ZipFile(path) as archive:
        extra = {name.rpartition("/")[2]: archive.read(name) for name in archive.namelist() if "/extra/" in name}
    plan = json.loads(extra["attnrewrite.json"])
    assert plan["attnrewrite"] == attnrewrite.__version__
    assert plan["torch"] == torch.__version__.split("+")[0]
    json.loads(extra["attnrewrite_original_graph.json"])
    calls = []
    for owner, name in ((torch, "load"), (pickle, "loads"), (pickle, "load")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, _real=real, **kwargs: calls.append(1) or _real(*args, **kwargs))
    torch.export.load(path)
    theirs = len(calls)
    calls.clear()
    attnrewrite.load(path)
    assert len(calls) == theirs


def test_a_record_of_ones_own(tmp_path):
    program, model, tensors = exported()
    attnrewrite.save(attnrewrite.rewrite(program, limited()), tmp_path / "a.pt2")
    loaded = attnrewrite.load(tmp_path / "a.pt2")
    assert attnrewrite.report_of(loaded).sites[0].chosen == "limited"
    assert relative(loaded.module()(*tensors), model(*tensors)) < 1e-6


def test_retarget_there_and_back(saved, tmp_path, capsys):
    path, _made, model, tensors = saved
    report = attnrewrite.retarget(path, tmp_path / "b.pt2", "_native_flash")
    assert (report.swapped, {site.chosen for site in report.sites}) == (2, {"_native_flash"})
    program = attnrewrite.load(tmp_path / "b.pt2")
    assert "flash_attention_for_cpu" in str(program.graph)
    assert relative(program.module()(*tensors), model(*tensors)) < 1e-6
    attnrewrite.retarget(tmp_path / "b.pt2", tmp_path / "b.pt2", "native")
    back = attnrewrite.load(tmp_path / "b.pt2")
    assert torch.equal(back.module()(*tensors), model(*tensors))
    assert not assertions(back)

    torch.export.save(exported(model, *tensors)[0], tmp_path / "strange.pt2")
    assert attnrewrite.explain_file(tmp_path / "strange.pt2").sites[0].chosen == "native"
    from attnrewrite.__main__ import main

    main(
        [
            "rewrite",
            str(tmp_path / "strange.pt2"),
            str(tmp_path / "c.pt2"),
            "--backend",
            "_native_math",
            "--numerics",
            "sparse",
        ]
    )
    main(["explain", str(tmp_path / "c.pt2")])
    first, second = capsys.readouterr().out.split("attnrewrite (")[1:]
    # the file does not hold the time that the passes took
    assert re.sub(r"[\d.]+ s\n", "0.00 s\n", first) == second
    assert "2 swapped" in first
    assert relative(attnrewrite.load(tmp_path / "c.pt2").module()(*tensors), model(*tensors)) < 1e-6


def test_attention_that_was_spelled_out_goes_back_too(tmp_path):
    class Spelled(torch.nn.Module):
        def forward(self, q, k, v):
            return ((q @ k.transpose(-1, -2)) * 0.3).softmax(-1) @ v

    tensors = [torch.randn(2, 3, 5, 8) for _ in range(3)]
    program, model, _ = exported(Spelled(), *tensors)
    attnrewrite.save(attnrewrite.rewrite(program, "_native_flash"), tmp_path / "a.pt2")
    attnrewrite.retarget(tmp_path / "a.pt2", tmp_path / "b.pt2", "native")
    assert torch.equal(attnrewrite.load(tmp_path / "b.pt2").module()(*tensors), model(*tensors))


def test_weights_are_never_in_memory(tmp_path):
    model = Attend()
    model.register_buffer("large", torch.randn(12 << 20))  # 48 MiB
    model.forward = lambda x, inner=model.forward: inner(x) + model.large.mean()
    program, _, tensors = exported(model)
    torch.export.save(program, tmp_path / "a.pt2")
    tracemalloc.start()
    attnrewrite.retarget(tmp_path / "a.pt2", tmp_path / "b.pt2", "_native_flash")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 24 << 20, f"{peak / 2**20:.0f} MiB"
    assert relative(attnrewrite.load(tmp_path / "b.pt2").module()(*tensors), model(*tensors)) < 1e-6


# -- bad files


def test_files_that_are_none(saved, tmp_path):
    path, *_ = saved
    whole = path.read_bytes()
    for part in (50, 75, 90, 98):
        (tmp_path / f"cut{part}.pt2").write_bytes(whole[: len(whole) * part // 100])
    (tmp_path / "text.pt2").write_text("no archive")
    with zipfile.ZipFile(tmp_path / "other.pt2", "w") as archive:
        archive.writestr("x/y", "z")
    for name, said in (
        *((f"cut{part}", "the archive is truncated: its end is missing") for part in (50, 75, 90, 98)),
        ("text", "found another file"),
        ("other", "found another archive"),
        ("gone", "there is no such file"),
    ):
        for read in (
            attnrewrite.load,
            attnrewrite.explain_file,
            lambda file: attnrewrite.retarget(file, file, "native"),
        ):
            with pytest.raises(attnrewrite.ProgramFileError, match=rf"{name}\.pt2: .*{said}") as caught:
                read(tmp_path / f"{name}.pt2")
            assert said in str(caught.value)
            with pytest.raises(TypeError, match=r"path is 3 \(int\): give the name of a file"):
                read(3)


@pytest.mark.parametrize("entry", [archives.MODEL, "data/weights/weight_0"])
def test_a_file_with_changed_bytes(saved, tmp_path, entry):
    path, *_ = saved
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        (info,) = (each for each in archive.infolist() if each.filename.endswith(entry))
        begin = content.index(archive.read(info), info.header_offset)
    content[begin + 5] ^= 255
    (tmp_path / "bad.pt2").write_bytes(content)
    with pytest.raises(attnrewrite.ProgramFileError, match=r"bad\.pt2: the archive is damaged \(Bad CRC-32"):
        attnrewrite.retarget(tmp_path / "bad.pt2", tmp_path / "made.pt2", "native")
    assert not (tmp_path / "made.pt2").exists()


def rewritten(path, target, change):
    """The file with another manifest."""
    with archives.opened(path) as archive:
        data = change(json.loads(archive.read(manifests.MANIFEST)))
        archive.copy(target, {manifests.MANIFEST: json.dumps(data).encode()})
    return target


def test_a_newer_format_and_a_plan_that_is_none(saved, tmp_path):
    path, *_ = saved
    newer = rewritten(path, tmp_path / "newer.pt2", lambda data: {**data, "format": 7, "attnrewrite": "9.0"})
    with pytest.raises(
        attnrewrite.ProgramFileError, match=r"newer\.pt2: it was written by attnrewrite 9\.0 in format 7; attnrewrite"
    ):
        attnrewrite.load(newer)
    other = rewritten(path, tmp_path / "other.pt2", lambda data: {"format": 1})
    with pytest.raises(attnrewrite.ProgramFileError, match=r"expected the plan of attnrewrite as JSON"):
        attnrewrite.load(other)


def test_other_versions_are_said(saved, tmp_path):
    path, *_ = saved
    other = rewritten(path, tmp_path / "other.pt2", lambda data: {**data, "torch": "2.8.0"})
    with pytest.warns(UserWarning, match=r"other\.pt2: torch: made with 2\.8\.0, here is"):
        attnrewrite.load(other)


def test_another_machine(tmp_path):
    program, _, _ = exported(Attend().bfloat16(), torch.randn(2, 7, 24, dtype=torch.bfloat16))
    made = attnrewrite.rewrite(program, "flash_4", machine=H200)
    (site,) = attnrewrite.report_of(made).sites
    assert (site.chosen, site.source) == ("flash_4", "flash-attn-4 4.0.0b36 (flash_attn.cute)")
    attnrewrite.save(made, path := tmp_path / "h200.pt2")

    with archives.opened(path) as archive:
        manifest = manifests.Manifest.from_json(archive.read(manifests.MANIFEST), path)

    def refused(machine, **packages):
        with pytest.raises(attnrewrite.ProgramFileError) as caught:
            manifests.check_machine(manifest, path, here=lambda planned: machine, installed=packages.get)
        said = str(caught.value)
        assert "h200.pt2: " in said
        assert "the kernel flash_4 of attention site 'Attend'" in said
        return said

    assert "was chosen for cuda, this machine has no such device" in refused(None)
    assert "was chosen for cuda, sm_90, this machine is cuda, sm_80 (A100)" in refused(
        replace(H200, capability=(8, 0), name="A100")
    )
    assert "needs flash-attn-4 4.0.0b36 (flash_attn.cute); flash-attn-4 is not installed" in refused(H200)
    older = refused(H200, **{"flash-attn-4": "4.0.0b9"})
    assert "needs flash-attn-4 4.0.0b36 (flash_attn.cute); 4.0.0b9 is installed, which is older" in older
    assert "attnrewrite.retarget(" in older

    def of_no_gpu(data):
        for graph in data["report"]["graphs"]:
            graph["machine"]["capability"] = [0, 1]
        return data

    nowhere = rewritten(path, tmp_path / "nowhere.pt2", of_no_gpu)  # whatever this machine is
    words = (
        r"nowhere\.pt2: the kernel flash_4 of attention site 'Attend' was chosen for cuda.*, this machine (is|has no) "
    )
    with pytest.raises(attnrewrite.ProgramFileError, match=words):
        attnrewrite.load(nowhere)


def test_no_program_is_bound_to_the_batches_that_fold():
    """`_native_folded` puts 4 sequences into one where the program's batch is known to divide by 4, and nowhere else."""
    x = torch.randn(64, 14, 24, dtype=torch.bfloat16)
    for batch, chosen in ((torch.export.Dim("b", min=2), None), (4 * torch.export.Dim("b", min=2), "_native_folded")):
        program = torch.export.export(Attend().bfloat16(), (x,), dynamic_shapes={"x": {0: batch}})
        made = attnrewrite.rewrite(program, "_native_folded", machine=H200)
        (site,) = attnrewrite.report_of(made).sites
        assert (site.chosen, [step.after for step in site.steps]) == (chosen, [56] if chosen else [])
        assert chosen or site.refusals[0][1].code is Code.BATCH


PACKAGE_OF_PYTORCH = """
import sys, torch
model, x = torch.nn.ReLU(), torch.ones(8)
path = torch._inductor.aoti_compile_and_package(torch.export.export(model, (x,)), package_path=sys.argv[1])
torch._inductor.aoti_load_package(path)(x)
"""


@pytest.fixture(scope="module")
def packages_load(tmp_path_factory):
    """Skips where loading a package of PyTorch's own, without this library, ends the process: docs/pytorch-quirks.md says with
    which compilers."""
    path = tmp_path_factory.mktemp("package") / "relu.pt2"
    done = subprocess.run([sys.executable, "-c", PACKAGE_OF_PYTORCH, str(path)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"AOTInductor's package of a ReLU does not load here, exit status {done.returncode}: set CXX")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kernel", ["_flash_3", "flash_4", "_native_cudnn", "_native_efficient", "_native_flash", "native"]
)
def test_made_on_a_cpu_for_this_gpu(tmp_path, kernel, packages_load):
    class Bare(torch.nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v).float() * torch.ones(1)  # both name a device in the graph

    here = attnrewrite.machine_of(torch.device("cuda"))
    described = Machine(here.device, here.capability, dict(here.packages))
    tensors = [torch.randn(2, length, 4, 64, dtype=torch.bfloat16).transpose(1, 2) for length in (96, 160, 160)]
    program, model, _ = exported(Bare(), *tensors)
    made = attnrewrite.rewrite(program, kernel, machine=described)
    (site,) = attnrewrite.report_of(made).sites
    if site.chosen is None:
        pytest.skip(str(site.refusals[0][1]))
    attnrewrite.save(made, tmp_path / "a.pt2")
    loaded = attnrewrite.load(tmp_path / "a.pt2", device="cuda")
    package = attnrewrite.load_package(attnrewrite.aot_compile(loaded, tmp_path / "package.pt2").path)
    for step in (loaded.module(), package):
        with torch.no_grad():
            output = step(*(tensor.cuda() for tensor in tensors)).cpu()
        assert relative(output, model(*(tensor.double() for tensor in tensors))) < 1.2e-2
    if kernel != "native":
        assert "is on cpu, the program needs cuda" in violated(made, *tensors)


def test_equal_programs_are_equal_files(saved, tmp_path):
    path, made, *_ = saved
    attnrewrite.save(made, tmp_path / "b.pt2")
    assert (tmp_path / "b.pt2").read_bytes() == path.read_bytes()
    for name in ("c", "d"):
        attnrewrite.retarget(path, tmp_path / f"{name}.pt2", "native")
    assert (tmp_path / "c.pt2").read_bytes() == (tmp_path / "d.pt2").read_bytes()


def test_a_place_that_cannot_be_written_is_named(saved, tmp_path, capsys):
    path, made, *_ = saved
    folder = tmp_path / "folder.pt2"
    folder.mkdir()
    plan = attnrewrite.Plan(())
    for target, kind, said in (
        (tmp_path / "none" / "a.pt2", FileNotFoundError, f"{tmp_path / 'none'} is no folder. Make it first"),
        (folder, IsADirectoryError, "it is a folder. Name a file in it"),
    ):
        for write in (
            lambda target: attnrewrite.save(made, target),
            lambda target: attnrewrite.retarget(path, target, "native"),
            plan.save,
        ):
            with pytest.raises(kind) as caught:
                write(target)
            assert str(caught.value) == f"{target} cannot be written: {said}"
        with pytest.raises(SystemExit):
            command(["rewrite", str(path), str(target), "--backend", "native"])
        assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: {target} cannot be written: {said}")
    with pytest.raises(SystemExit):
        command(["rewrite", str(path) + "x", str(folder), "--backend", "native"])
    assert "there is no such file" in capsys.readouterr().err
    assert not list(folder.iterdir())


def test_a_file_is_written_whole_or_not_at_all(saved, tmp_path, monkeypatch):
    path, made, _, _ = saved
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(archives.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        attnrewrite.retarget(path, path, "_native_flash")
    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(OSError, match="no space"):
        attnrewrite.save(made, path)
    assert path.read_bytes() == before
    with pytest.raises(FileNotFoundError, match=r"a\.pt2 cannot be written: .*none is no folder\. Make it first"):
        attnrewrite.save(made, tmp_path / "none" / "a.pt2")
    assert [each.name for each in path.parent.iterdir()] == [path.name]


# -- real models, in a process that cannot import them

# Tracing takes seconds a model: ATTNREWRITE_SLOW=1 runs those that add no other shape of attention to the first three.
MODELS = ("flux", "vae", "pixart") + (
    ("sd3", "wan", "sdxl_unet", "qwen_image") if os.environ.get("ATTNREWRITE_SLOW") else ()
)
# Qwen-Image reads the shapes of its pictures in Python; before 2.13 torch.export keeps no dynamic batch of PixArt's mask.
ONE_BATCH = {"qwen_image"} | ({"pixart"} if not satisfies(torch.__version__, ">=2.13") else set())
FIXED = ("img_ids", "txt_ids", "img_shapes")  # of the picture, not of the batch

RUN = """
import sys, json
sys.modules["diffusers"] = sys.modules["transformers"] = None
import torch, attnrewrite
for name in sys.argv[2:]:
    program = attnrewrite.load(f"{sys.argv[1]}/{name}.pt2")
    report = attnrewrite.report_of(program)
    step, differences = program.module(), []
    for kwargs, expected in torch.load(f"{sys.argv[1]}/{name}.pt", weights_only=True):
        with torch.no_grad():
            differences.append(((step(**kwargs)[0] - expected).norm() / expected.norm()).item())
    print(json.dumps([name, len(report.sites), report.swapped, differences]))
"""


def with_batch(change, kwargs, batch):
    def each(value):
        return change(value) if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == batch else value

    return {name: value if name in FIXED else tree_map(each, value) for name, value in kwargs.items()}


@pytest.mark.skipif(
    not satisfies(torch.__version__, ">=2.11"), reason="torch.export keeps no dynamic batch of them there"
)
def test_real_models_in_a_process_without_their_source(tmp_path):
    pytest.importorskip("diffusers")
    zoo = pytest.importorskip("model_zoo")
    for name in MODELS:
        model, kwargs = zoo.MODELS[name]()
        model.requires_grad_(False)
        with torch.no_grad():
            calls = [(kwargs, model(**kwargs)[0])]
        batch, dynamic = calls[0][1].shape[0], None
        if name not in ONE_BATCH:
            dynamic = {key: tree_map(lambda value: None, value) for key, value in kwargs.items()} | with_batch(
                lambda value: {0: Dim.DYNAMIC}, {k: v for k, v in kwargs.items() if k not in FIXED}, batch
            )
            dynamic = {key: _only_dims(value) for key, value in dynamic.items()}
            larger = with_batch(lambda value: torch.cat([value, value.flip(0), value[:1]]), kwargs, batch)
            with torch.no_grad():
                calls.append((larger, model(**larger)[0]))
        program = attnrewrite.export(model, (), kwargs, backend="_native_flash", dynamic_shapes=dynamic)
        attnrewrite.save(program, tmp_path / f"{name}.pt2")
        torch.save(calls, tmp_path / f"{name}.pt")
    finished = forked.python("-c", RUN, tmp_path, *MODELS, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    results = [json.loads(line) for line in finished.stdout.splitlines()]
    assert [result[0] for result in results] == list(MODELS)
    for name, sites, swapped, differences in results:
        assert sites == swapped > 1, name
        assert len(differences) == (1 if name in ONE_BATCH else 2)
        assert max(differences) < 1e-5, (name, differences)


def _only_dims(value):
    """Shapes that are not given as a dict of dimensions are static."""
    if isinstance(value, dict) and value and all(isinstance(key, int) for key in value):
        return value
    if isinstance(value, dict):
        return {key: _only_dims(each) for key, each in value.items()}
    return None
