"""Programs for other tools: no checks, operators that these read, right in ONNX Runtime, OpenVINO and ExecuTorch."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from parity import TOLERANCE, doubled, relative
from torch.export import Dim

import attnrewrite
from attnrewrite import Code, Refused, holds, records_of
from attnrewrite.aot.check_ops import is_assertion

pytestmark = [  # of these tools
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning"),
]

FLASH, MATH = "_native_flash", "_native_math"
SDPA_OP, MATH_OP = "aten.scaled_dot_product_attention.default", "aten._scaled_dot_product_attention_math.default"


class Attend(torch.nn.Module):
    """(batch, heads, length, 8) each; `spelled_out`: in tensor operations."""

    def __init__(self, spelled_out=False, **arguments):
        super().__init__()
        self.spelled_out, self.arguments = spelled_out, arguments

    def forward(self, query, key, value, mask=None):
        if self.spelled_out:
            output = (query @ key.transpose(-1, -2) * 8**-0.5).softmax(-1) @ value
        else:
            output = F.scaled_dot_product_attention(query, key, value, mask, **self.arguments)
        return output.transpose(1, 2).flatten(2)


def qkv(kv_heads=4, kv_len=7):
    return torch.randn(2, 4, 5, 8), *(torch.randn(2, kv_heads, kv_len, 8) for _ in range(2))


def boolean(row_without_a_key):
    mask = torch.rand(2, 1, 5, 7) > 0.4
    mask[..., 0] = True
    mask[1, :, 2] = not row_without_a_key
    return mask


CASES = {
    "plain": lambda: (Attend(), qkv()),
    "spelled out": lambda: (Attend(spelled_out=True), qkv()),
    "causal": lambda: (Attend(is_causal=True), qkv(kv_len=5)),
    "grouped": lambda: (Attend(enable_gqa=True), qkv(kv_heads=2)),
    "boolean": lambda: (Attend(), (*qkv(), boolean(False))),
    "a row without a key": lambda: (Attend(), (*qkv(), boolean(True))),
    "additive": lambda: (Attend(scale=0.3), (*qkv(), torch.randn(2, 4, 5, 7))),
}


def exported(model, args, dynamic=None):
    with torch.no_grad():
        return torch.export.export(model, args, dynamic_shapes=dynamic)


def operators(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def is_right(output, model, args):
    return relative(output, model(*map(doubled, args))) < TOLERANCE[torch.float32]


# -- the program


@pytest.mark.parametrize("choice", [(), ("native",)])
@pytest.mark.parametrize(
    ("given", "case"),
    [("as it was", case) for case in CASES]
    + [(given, case) for given in ("rewritten", "rewritten and decomposed") for case in ("spelled out", "grouped")],
)
def test_no_checks_and_operators_that_others_read(given, case, choice):
    model, args = CASES[case]()
    program = exported(model, args)
    if given != "as it was":
        program = attnrewrite.rewrite(program, FLASH)
        assert any(is_assertion(node) for node in program.graph.nodes)
    if given == "rewritten and decomposed":
        program = program.run_decompositions({})
        assert any(is_assertion(node) for node in program.graph.nodes)
    before = program.graph_module.code
    made = attnrewrite.portable(program, *choice)
    assert not any(is_assertion(node) for node in made.graph.nodes)
    kept = choice and given != "rewritten and decomposed"  # there is no SDPA any more
    assert operators(made) & {SDPA_OP, MATH_OP} == {SDPA_OP if kept else MATH_OP}
    assert "flash" not in str(made.graph)
    assert is_right(made.module()(*args), model, args)
    assert [site.chosen for site in attnrewrite.report_of(made).sites] == ["native" if kept else MATH]
    assert program.graph_module.code == before


def test_sizes_may_change():
    lengths = ({0: Dim("b"), 2: Dim("s")}, *({0: Dim("b"), 2: Dim("t")},) * 2)
    model, args = CASES["grouped"]()
    made = attnrewrite.portable(exported(model, args, lengths))
    other = (torch.randn(3, 4, 9, 8), torch.randn(3, 2, 6, 8), torch.randn(3, 2, 6, 8))
    assert is_right(made.module()(*other), model, other)


def test_a_swap_that_rests_on_a_condition_is_left_out():
    def multiple_of_4(call, machine):
        return None if holds(call.kv_len % 4 == 0) else Refused(Code.LENGTH, "no multiple of 4", "Pad")

    class Two(torch.nn.Module):
        def forward(self, query, key, value):
            own = F.scaled_dot_product_attention(query, query, query)
            return F.scaled_dot_product_attention(own, key, value)

    limited = replace(records_of(MATH)[0], checks=(multiple_of_4,))
    args = (torch.randn(2, 4, 12, 8), torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8))
    program = exported(Two(), args, ({}, {2: Dim("t")}, {2: Dim("t")}))
    made = attnrewrite.portable(program, limited)
    own, cross = attnrewrite.report_of(made).sites
    assert (own.chosen, cross.chosen) == (MATH, None)
    ((name, refused),) = cross.refusals
    assert (name, refused.code) == (MATH, Code.CONTEXT)
    assert "a portable program has no check" in refused.detail
    assert "Mod(" in refused.detail
    assert not any(is_assertion(node) for node in made.graph.nodes)
    other = (args[0], *(torch.randn(2, 4, 7, 8) for _ in range(2)))
    assert is_right(made.module()(*other), Two(), other)


def test_it_goes_to_a_file_and_back(tmp_path):
    model, args = CASES["spelled out"]()
    attnrewrite.save(attnrewrite.portable(exported(model, args)), tmp_path / "a.pt2")
    program = attnrewrite.load(tmp_path / "a.pt2")
    assert not any(is_assertion(node) for node in program.graph.nodes)
    assert is_right(program.module()(*args), model, args)


def test_bad_input():
    model, args = CASES["plain"]()
    with pytest.raises(TypeError, match=r"program is Attend: give a torch\.export\.ExportedProgram"):
        attnrewrite.portable(model)
    program = exported(model, args)
    for choices, rules in (((FLASH,), None), (("native",), {"*": FLASH}), (("auto",), None)):
        with pytest.raises(ValueError, match=r"portable takes 'native' or '_native_math', not '(_native_flash|auto)'"):
            attnrewrite.portable(program, *choices, rules=rules)
    made = attnrewrite.portable(program, rules={"self": "native", "cross": "native"})
    assert operators(made) >= {SDPA_OP}


# -- the tools


def onnx_output(program, args, opset):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs: pip install onnx onnxscript onnxruntime")
    import onnxruntime

    with torch.no_grad():
        made = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=opset).model_proto
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    given = {name: value.numpy() for name, value in zip(names, args, strict=True)}
    return torch.from_numpy(session.run(None, given)[0]), {node.op_type for node in made.graph.node}


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("case", CASES)
def test_onnx_runtime(case, opset):
    model, args = CASES[case]()
    output, _ = onnx_output(attnrewrite.portable(attnrewrite.rewrite(exported(model, args), FLASH)), args, opset)
    assert is_right(output, model, args)


@pytest.mark.parametrize("case", CASES)
def test_onnx_has_an_operator_for_native(case):
    model, args = CASES[case]()
    output, kinds = onnx_output(attnrewrite.portable(exported(model, args), "native"), args, 23)
    assert "Attention" in kinds
    assert is_right(output, model, args)


def test_onnx_of_lengths_that_change():
    model, args = CASES["plain"]()
    length = {0: Dim("b"), 2: Dim("t")}
    program = attnrewrite.portable(exported(model, args, ({0: Dim("b"), 2: Dim("s")}, length, length)))
    other = (torch.randn(3, 4, 9, 8), torch.randn(3, 4, 6, 8), torch.randn(3, 4, 6, 8))
    assert is_right(onnx_output(program, other, 20)[0], model, other)


def test_an_onnx_model_of_a_program_with_checks_is_made_with_a_warning():
    model, args = CASES["plain"]()
    program = attnrewrite.rewrite(exported(model, args), FLASH)
    with pytest.warns(UserWarning, match=r"no checks .* attnrewrite\.portable\(program\) gives a program for it"):
        output, _ = onnx_output(program, args, 20)
    assert is_right(output, model, args)
    assert any(is_assertion(node) for node in program.run_decompositions().graph.nodes)


@pytest.mark.parametrize("case", CASES)
def test_openvino(case):
    openvino = pytest.importorskip("openvino", reason="needs: pip install openvino")
    model, args = CASES[case]()
    program = attnrewrite.portable(attnrewrite.rewrite(exported(model, args), FLASH))
    compiled = openvino.compile_model(openvino.convert_model(program), "CPU")
    output = torch.from_numpy(compiled([each.numpy() for each in args])[0].copy())
    assert is_right(output, model, args)


@pytest.mark.parametrize("case", CASES)
def test_executorch(case):
    pytest.importorskip("executorch.exir", reason="needs: pip install executorch")
    from executorch.exir import to_edge
    from executorch.runtime import Runtime

    model, args = CASES[case]()
    program = attnrewrite.portable(attnrewrite.rewrite(exported(model, args), FLASH))
    buffer = to_edge(program).to_executorch().buffer
    (output,) = Runtime.get().load_program(buffer).load_method("forward").execute(list(args))
    assert is_right(output, model, args)
