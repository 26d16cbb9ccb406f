"""What is patched in PyTorch: only while our own compilation runs, and only in the versions that need it."""

import pytest
import torch
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
from torch._inductor.ir import FallbackKernel

import attnrewrite
from attnrewrite.graphs.inductor_patches import CALL, failing_ops_end_the_call
from attnrewrite.graphs.questions import noted


def inductor():
    """The two methods that may be patched: whether CppWrapperCpu has its own `writeline`, and what FallbackKernel's is."""
    return "writeline" in vars(CppWrapperCpu), FallbackKernel.has_side_effects


@pytest.mark.parametrize(
    ("version", "calls", "dead_code"),
    [("2.9.1", True, True), ("2.10.0", True, True), ("2.11.0+cu130", True, False), ("2.12.1", True, False),
     ("2.13.0", False, False), ("2.14.1", False, False), ("2.15.0", False, False)],
)  # fmt: skip
def test_only_the_versions_that_need_it(version, calls, dead_code):
    before = inductor()
    with failing_ops_end_the_call((), version):
        writes, side_effects = inductor()
        assert (writes, side_effects is not before[1]) == (calls or before[0], dead_code)
    assert inductor() == before


def test_it_ends_with_the_compilation_that_fails():
    before = inductor()
    with pytest.raises(ZeroDivisionError), failing_ops_end_the_call((), "2.9.0"):
        raise ZeroDivisionError
    assert inductor() == before


def test_what_the_patches_do():
    lines = []
    with failing_ops_end_the_call(("mine",), "2.9.0"):
        wrapper = CppWrapperCpu.__new__(CppWrapperCpu)
        wrapper.lines = lines
        wrapper.writeline(f"{CALL}op);")
        wrapper.writeline("something else;")
        kernel = FallbackKernel.__new__(FallbackKernel)
        object.__setattr__(kernel, "op_overload", "mine")
        assert kernel.has_side_effects()
    assert lines == [f"AOTI_TORCH_ERROR_CODE_CHECK({CALL}op));", "something else;"]


def test_an_import_and_a_rewrite_patch_nothing():
    """With programs and compiled models too: `aot_compile` is the one door behind which Inductor is patched."""
    before = inductor()

    class Model(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    x = torch.randn(2, 3, 8, 16)
    length = torch.export.Dim("length", min=3, max=64)
    program = attnrewrite.export(Model(), (x,), backend="_native_flash", dynamic_shapes=({2: length},))
    with torch.no_grad():
        program.module()(x)
        torch.compile(Model(), backend=attnrewrite.with_backend("_native_flash", inner="eager"))(x)
    assert inductor() == before


def test_the_shape_env_of_a_program_is_as_it_was():
    length = torch.export.Dim("length", min=3, max=64)
    program = torch.export.export(torch.nn.Identity(), (torch.randn(2, 8),), dynamic_shapes=({1: length},))
    (node,) = program.graph.find_nodes(op="placeholder")
    shape_env = node.meta["val"].shape[1].node.shape_env
    with noted(program.graph_module, program.range_constraints):
        assert "evaluate_expr" in vars(shape_env)
    assert "evaluate_expr" not in vars(shape_env)
    with pytest.raises(ZeroDivisionError), noted(program.graph_module, program.range_constraints):
        raise ZeroDivisionError
    assert "evaluate_expr" not in vars(shape_env)
