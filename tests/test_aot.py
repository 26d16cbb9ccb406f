"""AOTInductor packages of programs with swapped kernels: from Python, from C++, and one for all blocks of a model."""

import functools
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from parity import relative, without_times
from torch.export import Dim
from torch.utils.cpp_extension import CUDA_HOME

import attnrewrite
from attnrewrite import Machine
from attnrewrite.aot import blocks
from attnrewrite.aot.layouts import without_overlaps

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning"),  # torch.export's own
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),  # Inductor's
]
ROOT = Path(__file__).resolve().parent.parent
SLOW = pytest.mark.skipif(
    not os.environ.get("ATTNREWRITE_SLOW"), reason="AOTInductor takes half a minute a model: ATTNREWRITE_SLOW=1 runs it"
)


class Step(torch.nn.Module):
    """As the digits model of examples/aot: images (N, 1, 8, 8), times and labels (N,) in, (N, 1, 8, 8) out."""

    def __init__(self):
        super().__init__()
        self.labels = torch.nn.Embedding(10, 12)
        self.project = torch.nn.Linear(8, 36)
        self.back = torch.nn.Linear(12, 8)

    def forward(self, images, times, labels):
        q, k, v = (part.unflatten(-1, (3, 4)).transpose(1, 2) for part in self.project(images[:, 0]).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.back(attended + self.labels(labels)[:, None])[:, None] * (times[:, None, None, None] / 1000)


def inputs(batch):
    return torch.randn(batch, 1, 8, 8), torch.full((batch,), 500), torch.arange(batch)


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    """The model, its package for C++, and what compiling it returned."""
    torch.manual_seed(0)
    folder, model, batch = tmp_path_factory.mktemp("aot"), Step().eval().requires_grad_(False), Dim("batch", max=64)
    images, times, labels = inputs(10)
    example = images, times[:1].expand(10), labels  # as pipelines pass the time of a step
    program = attnrewrite.export(
        model, example, backend="_native_flash", dynamic_shapes=({0: batch}, {0: batch}, {0: batch})
    )
    package = attnrewrite.aot_compile(program, folder / "package.pt2", cpp=True)
    images.numpy().tofile(folder / "images.bin")
    model(images, times, labels).numpy().tofile(folder / "velocity.bin")
    return model, folder, package


def stopped(capfd, step, *given):
    """What a call that must not return says. Before torch 2.13 PyTorch prints an op's words instead of raising them."""
    capfd.readouterr()
    with pytest.raises(RuntimeError) as caught:
        step(*given)
    return str(caught.value) + capfd.readouterr().err


def test_an_op_that_raises_ends_the_call(tmp_path, capfd):
    """Before torch 2.13 AOTInductor's own code goes on, with an output that nobody wrote."""

    @torch.library.custom_op("attnrewrite_test::positive", mutates_args=())
    def positive(x: torch.Tensor) -> torch.Tensor:
        if not bool((x > 0).all()):
            raise ValueError("not positive")
        return x.clone()

    positive.register_fake(torch.empty_like)

    class Checked(torch.nn.Module):
        def forward(self, x):
            return positive(x) * 2

    attnrewrite.aot_compile(torch.export.export(Checked(), (torch.ones(3),)), tmp_path / "package.pt2")
    step = attnrewrite.load_package(tmp_path / "package.pt2")
    assert torch.equal(step(torch.ones(3)), torch.full((3,), 2.0))
    assert "not positive" in stopped(capfd, step, -torch.ones(3))


def test_a_package_runs_and_checks(packaged, capfd):
    model, folder, package = packaged
    assert package.python == ()
    assert str(package).endswith("runs from Python and C++")
    step = attnrewrite.load_package(folder / "package.pt2")
    assert step.report.to_json() == without_times(package.report)
    assert step.report.sites[0].chosen == "_native_flash"
    for batch in (10, 3):
        given = inputs(batch)
        assert relative(step(*given), model(*given)) < 1e-5
    images, *rest = inputs(3)
    for given, said in (
        ((images.double(), *rest), "(_native_flash): input 'images' is float64, the program needs float32"),
        (inputs(0), "images.shape[0] >= 1 must hold, but the left side is 0"),
        (inputs(65), "input 'images' has size 65 in dimension 0, the program needs at most 64"),
        ((images[..., :7], *rest), "input 'images' has size 7 in dimension 3, the program needs 8"),
        ((images[:, 0], *rest), "input 'images' has 3 dimensions, the program needs 4"),
    ):
        assert said in stopped(capfd, step, *given)
    assert attnrewrite.explain_file(folder / "package.pt2").swapped == 1


def test_inputs_that_lie_otherwise(packaged):
    """AOTInductor's code would read them as the example lay."""
    model, folder, _ = packaged
    step = attnrewrite.load_package(folder / "package.pt2")
    images, times, labels = inputs(5)
    turned = images.transpose(2, 3).contiguous().transpose(2, 3)
    assert relative(step(turned, times, labels), model(images, times, labels)) < 1e-5
    sliced = torch.stack([images, images + 1])[:, 1:4].unbind()[0]
    assert relative(step(sliced, times[:3], labels[:3]), model(sliced, times[:3], labels[:3])) < 1e-5


def test_the_example_was_expanded(packaged):
    """AOTInductor's code would read one time for all."""
    model, folder, _ = packaged
    step = attnrewrite.load_package(folder / "package.pt2")
    images, _, labels = inputs(5)
    for times in (torch.arange(5) * 100, torch.tensor([300]).expand(5), torch.arange(15)[::3] * 50):
        assert relative(step(images, times, labels), model(images, times, labels)) < 1e-5


def test_a_program_with_overlaps_is_left_as_it_is():
    class Add(torch.nn.Module):
        def forward(self, a, b, c):
            return a + b + c

    a, b, c = torch.randn(3, 4), torch.randn(4).expand(3, 4), torch.randn(1, 4).expand(1, 4)
    program = torch.export.export(Add(), (a, b, c), dynamic_shapes=({0: Dim("n")}, {0: Dim("n")}, None))
    made = without_overlaps(program)

    def strides(program):
        return [node.meta["val"].stride() for node in program.graph.find_nodes(op="placeholder")]

    assert (strides(program)[1], strides(made)[1]) == ((0, 1), (4, 1))
    assert strides(made)[::2] == strides(program)[::2]
    assert made.example_inputs[0][1].is_contiguous()
    assert made.range_constraints == program.range_constraints
    assert without_overlaps(made) is made


def test_bad_packages(packaged, tmp_path):
    _, folder, _ = packaged
    whole = (folder / "package.pt2").read_bytes()
    (tmp_path / "cut.pt2").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(attnrewrite.ProgramFileError, match=r"cut\.pt2: .*the archive is truncated"):
        attnrewrite.load_package(tmp_path / "cut.pt2")
    with pytest.raises(
        attnrewrite.ProgramFileError, match=r"expected an exported program.*found an AOTInductor package"
    ):
        attnrewrite.load(folder / "package.pt2")
    with zipfile.ZipFile(tmp_path / "other.pt2", "w") as archive:
        archive.writestr("x/models/model.json", "{}")
    with pytest.raises(attnrewrite.ProgramFileError, match="expected an AOTInductor package, found another archive"):
        attnrewrite.load_package(tmp_path / "other.pt2")


def test_kernels_that_need_python_are_named_when_compiling(tmp_path):
    h200 = Machine("cuda", (9, 0), {"torch": "2.11.0", "flash-attn-4": "4.0.0b36"})
    model = Step().bfloat16().eval().requires_grad_(False)
    images, times, labels = inputs(3)
    program = attnrewrite.export(model, (images.bfloat16(), times, labels), backend="flash_4", machine=h200)
    with pytest.raises(
        attnrewrite.NeedsPythonError, match=r"1 of the program's kernels run in Python: Step \(flash_4\)\. Choose"
    ):
        attnrewrite.aot_compile(program, tmp_path / "x.pt2", cpp=True)
    assert list(tmp_path.iterdir()) == []


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(12, 36)
        self.register_buffer("shift", torch.randn(12), persistent=False)

    def forward(self, x, scale=None):
        q, k, v = (part.unflatten(-1, (3, 4)).transpose(1, 2) for part in self.project(x + self.shift).chunk(3, -1))
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) * scale


class Repeats(torch.nn.Module):
    _repeated_blocks = ("Block",)

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for number, block in enumerate(self.blocks):
            x = block(x, scale=torch.full((1,), 0.5 + number))
        return x


class Other(Block):
    pass


def test_rules_of_the_blocks_of_several_classes(tmp_path, monkeypatch):
    model, x = Repeats().eval(), torch.randn(2, 7, 12)
    model._repeated_blocks = ("Block", "Other")
    model.blocks[2] = Other()
    made = {}
    monkeypatch.setattr(
        blocks, "aot_compile", lambda program, path, **_: made.setdefault(path.name, attnrewrite.report_of(program))
    )
    compiled = functools.partial(
        attnrewrite.aot_compile_blocks, model, tmp_path, (x,), backend="_native_flash", strict=True
    )
    with pytest.raises(ValueError, match=r"rules match none of the 2 attention sites:\n  'nowhere\.\*'"):
        compiled(rules={"nowhere.*": "native"})
    assert made == {}
    compiled(rules={"Other": "native"})  # matches the attention of one class
    assert {name: report.sites[0].chosen for name, report in made.items()} == {
        "Block.pt2": "_native_flash",
        "Other.pt2": "native",
    }


def test_what_is_no_model_and_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"folder is '.*file', which is a file: name a folder"):
        attnrewrite.aot_compile_blocks(Repeats(), tmp_path / "file", (torch.randn(2, 7, 12),), backend="native")
    for given in (
        functools.partial(attnrewrite.aot_compile_blocks, backend="native"),
        attnrewrite.load_blocks,
    ):
        with pytest.raises(TypeError, match="model is the class Repeats: give an object of it"):
            given(Repeats, tmp_path)


def test_one_package_for_all_blocks(tmp_path):
    model, x = Repeats().eval().requires_grad_(False), torch.randn(2, 7, 12)
    expected = model(x)
    packages = attnrewrite.aot_compile_blocks(model, tmp_path, (x,), backend="_native_flash")
    assert list(packages) == ["Block"]
    assert packages["Block"].report.swapped == 1
    assert attnrewrite.load_blocks(model, tmp_path) == 3
    assert relative(model(x), expected) < 1e-5
    model.blocks[1].project.weight.data.zero_()  # shared, not copied
    changed = model(x)
    for block in model.blocks:
        del block.forward
    assert relative(changed, model(x)) < 1e-5

    other = Repeats().eval().requires_grad_(False)
    expected = other(x)
    attnrewrite.load_blocks(other, tmp_path)
    assert relative(other(x), expected) < 1e-5

    with pytest.raises(ValueError, match="Step declares no repeated blocks"):
        attnrewrite.aot_compile_blocks(Step(), tmp_path, backend="native")
    with pytest.raises(attnrewrite.ProgramFileError, match=r"the package Block\.pt2 is missing"):
        attnrewrite.load_blocks(other, tmp_path / "elsewhere")


@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("g++")), reason="needs cmake and g++")
@pytest.mark.skipif(
    torch.version.cuda is not None and not Path(CUDA_HOME or "", "include/cuda_runtime_api.h").exists(),
    reason="CMake's part of a PyTorch for CUDA wants the toolkit",
)
def test_cpp_runs_the_package(packaged, tmp_path):
    """The C++ example, built against the installed libtorch, without Python."""
    _, folder, _ = packaged
    made = subprocess.run(
        ["make", "-C", str(ROOT / "examples/aot/cpp"), "run", f"PYTHON={sys.executable}", f"OUT={folder}", f"BUILD={tmp_path}",
         "EXPORT=true"],
        capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CXXFLAGS": "-O0"},
    )  # fmt: skip
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
    assert "largest difference to the eager model: " in made.stdout
    assert (
        "called with float64: attention site 'Step' (_native_flash): input 'images' is Double, the program needs float32"
        in made.stdout
    )


@SLOW
@pytest.mark.parametrize("name", ["flux", "wan", "sdxl_unet", "vae"])
def test_real_models(name, tmp_path):
    pytest.importorskip("diffusers")
    from model_zoo import MODELS
    from test_export import FIXED, _only_dims, with_batch

    model, kwargs = MODELS[name]()
    model.requires_grad_(False)
    expected = model(**kwargs)[0]
    batch = len(expected)
    dims = with_batch(lambda value: {0: Dim.DYNAMIC}, {k: v for k, v in kwargs.items() if k not in FIXED}, batch)
    dynamic = {**dict.fromkeys(kwargs), **{key: _only_dims(value) for key, value in dims.items()}}
    program = attnrewrite.export(model, (), kwargs, backend="_native_flash", dynamic_shapes=dynamic)
    attnrewrite.aot_compile(program, tmp_path / "x.pt2", cpp=True)
    step = attnrewrite.load_package(tmp_path / "x.pt2")
    assert relative(step(**kwargs)[0], expected) < 1e-5
    larger = with_batch(lambda value: torch.cat([value, value.flip(0), value[:1]]), kwargs, batch)
    assert relative(step(**larger)[0], model(**larger)[0]) < 1e-5
