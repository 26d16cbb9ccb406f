"""Kernels that other packages bring: by an entry point, as pip installs it, and by hand."""

import inspect
import os
import pickle
import re
import subprocess
import sys

import forked
import pytest
import torch
from parity import attend, check, doubled, qkv, relative

import attnrewrite
from attnrewrite import dense_kernel
from attnrewrite.__main__ import main
from attnrewrite.entrances.choices import candidates_of
from attnrewrite.entrances.identity import identity_of
from attnrewrite.kernels import sources
from attnrewrite.kernels.machines import PACKAGES
from attnrewrite.planning import this_machine
from attnrewrite.planning.registry import separate
from attnrewrite.planning.selectors import usual_candidates

PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "tiny-attention"
version = "1.2"

[project.entry-points."attnrewrite.backends"]
tiny = "tiny_attention.records:RECORDS"

[tool.setuptools]
packages = ["tiny_attention"]
"""

KERNEL = '''
def softmax_attention(query, key, value, scale):
    """(batch, length, heads, dim)"""
    weights = (query.transpose(1, 2) @ key.permute(0, 2, 3, 1) * scale).softmax(-1)
    return (weights @ value.transpose(1, 2)).transpose(1, 2).contiguous()
'''

# What CONTRIBUTING.md tells the author of a package to write.
RECORDS = """
from attnrewrite import Backend, HeadDim, MaskKind, Package, ops


def forward(library, query, key, value, scale):
    return library.softmax_attention(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)


def fake(query, key, value, scale):
    return ops.dense_output(query, value)


TINY_OP = ops.register(
    "tiny", "(Tensor query, Tensor key, Tensor value, float? scale) -> Tensor", forward, fake, flops=ops.products
)


def tiny(query, key, value, mask, *, call, origin):
    return TINY_OP(query, key, value, call.scale, needs_grad=False, origin=origin)


RECORDS = (
    Backend(
        name="tiny", family="tests", op=tiny, summary="softmax by hand", devices=frozenset({"cpu"}),
        dtypes=frozenset({"float32"}), head_dim=HeadDim(max=64), value_dim=True, layout="bshd",
        source=Package("tiny-attention", "tiny_attention"), requires={"tiny-attention": ">=1.0"}, tested="CPU",
    ),
)
"""

USE = """
import sys, torch, attnrewrite
from attnrewrite.__main__ import main
from parity import check, qkv, attend

backend = attnrewrite.with_backend("tiny", "_native_math")
main(["info"])
main(["table"])
for inner in ("eager", "inductor"):
    torch.compiler.reset()
    with torch.no_grad():
        site = check("tiny", *qkv(dim=20, value_dim=24), inner=inner, scale=0.3)
    assert (site.chosen, site.source) == ("tiny", "tiny-attention 1.2"), site
torch.compiler.reset()
with torch.no_grad():
    wide = check(attnrewrite.with_backend("_native_math", rules={"cross": ["tiny", "_native_math"]}), *qkv(dim=72))
(name, refused), = wide.refusals
print("REFUSED", name, refused)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that pip has installed the package into."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    (source / "tiny_attention").mkdir()
    (source / "pyproject.toml").write_text(PYPROJECT)
    (source / "tiny_attention/__init__.py").write_text(KERNEL)
    (source / "tiny_attention/records.py").write_text(RECORDS)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, capture_output=True)
    return target


def test_an_installed_package_brings_a_kernel(installed):
    """Nothing here knows it: it is in `info`, in the table, chosen by name, run, refused with a reason."""
    paths = [str(installed), os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = forked.python("-c", USE, cwd=installed, environment=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert [line.split(maxsplit=2) for line in lines if line.startswith("tiny ")] == [
        ["tiny", "yes", "softmax by hand"]
    ]
    assert any(line.startswith("| `tiny` | cpu | float32 | to 64 | none | no | yes |") for line in lines)
    assert "REFUSED tiny HEAD_DIM: tiny takes head_dim up to 64, this is 72" in done.stdout


# -- entry points that are wrong


RECORD = (
    "from attnrewrite import Backend\n"
    "def op(query, key, value, mask, *, call): return query @ key.transpose(-2, -1) @ value\n"
    "ONE = Backend('{}', 'tests', op, frozenset({{'cpu'}}), frozenset({{'float32'}}))\n"
    "RECORDS = [ONE]\n"
)


@pytest.mark.parametrize("target", ["RECORDS", "ONE"])
def test_one_record_or_several(plug_in, target):
    plug_in("mine", RECORD.format("mine"), target)
    assert attnrewrite.names()[-1] == "mine"
    assert attnrewrite.records_of("sol[tau=-0.0]")[0].name == "sol[tau=0.0]"
    assert [record.name for record in attnrewrite.records_of("mine")] == ["mine"]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import no_such_module", r"'broken' \(broken:RECORDS\) are left out: ModuleNotFoundError: .*no_such_module"),
        ("RECORDS = ['flash']", r"left out: TypeError: 'flash' is no attnrewrite\.Backend"),
        ("RECORDS = None", r"left out: TypeError"),
        (RECORD.format("flash"), r"left out: ValueError: the name 'flash' is taken"),
        ("OTHER = ()", r"left out: AttributeError"),
    ],
)
def test_a_plug_in_that_fails_is_left_out(plug_in, code, said):
    """With a warning that names it; everything else works."""
    plug_in("broken", code)
    plug_in("mine", RECORD.format("mine"))
    with pytest.warns(UserWarning, match=said):
        names = attnrewrite.names()
    assert names[-1] == "mine"
    assert len(names) == len({record.name for record in attnrewrite.backends.RECORDS}) + 1


def test_two_plug_ins_of_one_name(plug_in):
    plug_in("first", RECORD.format("mine"))
    plug_in("second", RECORD.format("mine"))
    with pytest.warns(UserWarning, match="'second' .* the name 'mine' is taken"):
        assert len(attnrewrite.records_of("mine")) == 1


# -- by hand


def test_a_record_passed_straight_in():
    def reversed_heads(query, key, value, mask, *, call):
        weights = (query @ key.transpose(-2, -1) * (call.scale or call.head_dim**-0.5)).softmax(-1)
        return weights @ value

    record = attnrewrite.Backend("by_hand", "tests", reversed_heads, frozenset({"cpu"}), frozenset({"float32"}))
    with torch.no_grad():
        site = check(attnrewrite.with_backend(record, "native"), *qkv())
    assert site.chosen == "by_hand"


def own_forward(library, query, key, value, causal, scale):
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return library.attend(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale).transpose(1, 2)


OWN_KERNEL = dense_kernel("test_registry_own", own_forward)


@pytest.fixture
def installed_library(monkeypatch, tmp_path):
    """A distribution that no record of attnrewrite needs."""
    about = tmp_path / "own_attention-1.4.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: own-attention\nVersion: 1.4\n")
    (tmp_path / "own_attention.py").write_text(
        "def attend(q, k, v, scale): return (q @ k.mT * scale).softmax(-1) @ v\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield attnrewrite.Package("own-attention", "own_attention")
    PACKAGES.discard("own-attention")  # the machine of later tests has none
    this_machine._read.cache_clear()


@pytest.mark.parametrize(("wanted", "code"), [(">=1.2", None), (">=2", attnrewrite.Code.VERSION)])
def test_a_record_passed_in_with_a_package_of_its_own(installed_library, wanted, code):
    """The version of its package is seen, and an op finds the module by its text in a process that has loaded nothing."""
    record = attnrewrite.Backend(
        "own", "tests", OWN_KERNEL, frozenset({"cpu"}), frozenset({"float32"}), source=installed_library,
        requires={"own-attention": wanted}, layout="bshd",
    )  # fmt: skip
    backend = attnrewrite.with_backend(record, "native", inner="eager")
    tensors = qkv()
    with torch.no_grad():
        output = torch.compile(attend, backend=backend, fullgraph=True)(*tensors)
    assert relative(output, attend(*map(doubled, tensors))) < 1e-5
    (site,) = backend.report.sites
    if code is not None:
        ((_, refused),) = site.refusals
        assert (refused.code, refused.detail) == (code, "own needs own-attention>=2, found 1.4")
        return
    assert (site.chosen, site.source) == ("own", "own-attention 1.4")
    sources._LIBRARIES.clear()
    sources._TEXTS.clear()
    assert sources.library("own-attention 1.4").__name__ == "own_attention"


def transposed_forward(library, query, key, value, causal, scale):
    """Returns memory in another order than (batch, length, heads, dim), as some libraries do."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    output = torch.einsum("bhqk,bkhd->bhqd", scores.softmax(-1), value).contiguous().transpose(1, 2)
    return output, scores.logsumexp(-1).float()


def transposed_backward(library, grad, output, logsumexp, query, key, value, causal, scale):
    with torch.enable_grad():
        given = [each.detach().requires_grad_() for each in (query, key, value)]
        again = transposed_forward(library, *given, causal, scale)[0]
        return torch.autograd.grad(again, given, grad)


TRANSPOSED = dense_kernel("test_registry_transposed", transposed_forward, transposed_backward)


def test_the_output_of_a_kernel_with_a_backward_is_made_dense(installed_library):
    record = attnrewrite.Backend(
        "transposed", "tests", TRANSPOSED, frozenset({"cpu"}), frozenset({"float32"}), source=installed_library,
        requires={"own-attention": ">=1"}, layout="bshd", backward=True,
    )  # fmt: skip
    tensors = [each.requires_grad_() for each in qkv(kv_len=13)]
    doubles = [doubled(each).requires_grad_() for each in tensors]
    run = torch.compile(attend, backend=attnrewrite.with_backend(record))
    output, exact = run(*tensors), attend(*doubles)
    assert relative(output, exact) < 1e-5
    for have, want in zip(
        torch.autograd.grad(output.sum(), tensors), torch.autograd.grad(exact.sum(), doubles), strict=True
    ):
        assert (have - want).abs().max() < 1e-4


def test_two_modules_of_one_distribution(installed_library, tmp_path):
    (tmp_path / "own_attention_two.py").write_text("number = 2\n")
    other = attnrewrite.Package("own-attention", "own_attention_two")
    texts = sources.load(installed_library), sources.load(other)
    assert texts == ("own-attention 1.4", "own-attention 1.4 (own_attention_two)")
    for _ in range(2):
        assert [sources.library(text).__name__ for text in texts] == ["own_attention", "own_attention_two"]
        sources._LIBRARIES.clear()
        sources._TEXTS.clear()


def test_a_record_must_require_its_source():
    with pytest.raises(ValueError, match="does not require it: add requires="):
        attnrewrite.Backend(
            "own", "tests", None, frozenset({"cpu"}), frozenset({"float32"}),
            source=attnrewrite.Package("own-attention", "own_attention"),
        )  # fmt: skip


def test_an_op_of_a_plug_in_finds_its_package_before_anybody_asked_for_names(plug_in, installed_library):
    """As in a process that runs a saved program: no plug-in is imported yet."""
    sources._PACKAGES.discard(installed_library)
    code = (
        "from attnrewrite import Backend, Package\n"
        "RECORDS = Backend('mine', 'tests', None, frozenset({'cpu'}), frozenset({'float32'}),\n"
        "                  source=Package('own-attention', 'own_attention'), requires={'own-attention': '>=1'})\n"
    )
    plug_in("mine", code)
    assert sources.library("own-attention 1.4").__name__ == "own_attention"


# -- names


def test_unknown_names():
    with pytest.raises(ValueError, match=r"no attention backend is called 'flash3'; did you mean .*'_flash_3'"):
        attnrewrite.with_backend("flash3")
    with pytest.raises(ValueError, match="'flash@main' pins a revision, and flash is not from the kernels hub"):
        attnrewrite.with_backend("flash@main")
    with pytest.raises(ValueError, match="'flash_hub@' pins no revision"):
        attnrewrite.with_backend("flash_hub@")


def test_all_names_of_the_peer():
    """diffusers 0.42.1, and those beyond it."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    peer = {name.value for name in AttentionBackendName}
    assert len(peer) == 27
    assert peer <= set(attnrewrite.names())
    ours = {
        "flash_4",
        "_flash_3_fp8",
        "_native_varlen",
        "_native_folded",
        "sol",
        "sol_topk",
        "ck_int8",
        "sparge",
        "sparge_topk",
    }
    assert set(attnrewrite.names()) - peer == ours


# -- options in names

OPTIONS = """
from attnrewrite import Backend, Option


def op(query, key, value, mask, *, call, factor=1.0, shift=0):
    return (query @ key.transpose(-2, -1) * (call.scale or call.head_dim**-0.5)).softmax(-1) @ value * factor + shift


RECORDS = Backend(
    "mine", "tests", op, frozenset({"cpu"}), frozenset({"float32"}),
    options={"factor": Option(1.0, 0.5, 4.0, "of the output"), "shift": Option(0, -3, 3, "of the output")},
    variants=("shift=1",),
)
"""


def test_options_are_part_of_a_name(plug_in):
    plug_in("mine", OPTIONS)
    query, key, value = qkv()
    for name, spelled, factor, shift in (
        ("mine", "mine", 1.0, 0),
        ("mine[shift=2, factor=3]", "mine[factor=3.0,shift=2]", 3.0, 2),
        ("mine[ factor = 2.5 ]", "mine[factor=2.5]", 2.5, 0),
        ("mine[shift=-1]", "mine[shift=-1]", 1.0, -1),
    ):
        torch.compiler.reset()
        for backend in (
            attnrewrite.with_backend(name, inner="eager"),
            attnrewrite.with_backend("native", rules={"*": [name]}, inner="eager"),
        ):
            output = torch.compile(attend, backend=backend, fullgraph=True)(query, key, value)
            assert relative(output, attend(query, key, value) * factor + shift) < 1e-5
            (site,) = backend.report.sites
            assert site.chosen == spelled
            assert spelled in str(backend.report)
            assert attnrewrite.Report.from_json(backend.report.to_json()).sites[0].chosen == spelled
        (record,) = attnrewrite.records_of(name)
        assert record.name == spelled
        assert (record,) == attnrewrite.records_of(spelled)
        assert pickle.loads(pickle.dumps(record)) is attnrewrite.records_of(spelled)[0]
    assert attnrewrite.names()[-1] == "mine"


def test_two_policies_of_the_same_options_are_equal(plug_in):
    plug_in("mine", OPTIONS)
    one, two = (attnrewrite.make_policy([name]) for name in ("mine[factor=2,shift=1]", "mine[shift=1,factor=2.0]"))
    assert (one, identity_of(one)) == (two, identity_of(two))
    other = attnrewrite.make_policy(["mine[factor=2,shift=2]"])
    assert one != other
    assert identity_of(one) != identity_of(other)
    with pytest.raises(ValueError, match=r"names 'mine\[factor=2\.0\]' twice"):
        attnrewrite.make_policy(["mine[factor=2]", "mine[factor=2.0]"])


def test_tune_has_a_candidate_for_each_variant(plug_in):
    plug_in("mine", OPTIONS)
    assert [each.name for each in usual_candidates()][-2:] == ["mine", "mine[shift=1]"]
    named = candidates_of(["mine[shift=1]", "mine[shift=2]", "native"], "candidates")
    assert [each.name for each in named] == ["mine[shift=1]", "mine[shift=2]", "native"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("native[tau=1]", "'native[tau=1]' gives options to native, which has none: leave out the '[...]'"),
        (
            "mine[tau=1]",
            "'mine[tau=1]': mine has no option 'tau'; its options: factor=1.0, from 0.5 to 4.0: of the output; ",
        ),
        ("mine[factor=9]", "'mine[factor=9]': factor is '9': give a number from 0.5 to 4.0"),
        ("mine[factor=nan]", "'mine[factor=nan]': factor is 'nan': give a number from 0.5 to 4.0"),
        ("mine[shift=1.5]", "'mine[shift=1.5]': shift is '1.5': give a whole number from -3 to 3"),
        ("mine[shift=]", "'mine[shift=]': shift is '': give a whole number from -3 to 3"),
        ("mine[shift=1,shift=2]", "'mine[shift=1,shift=2]' gives shift twice: leave one of them out"),
        ("mine[]", "'mine[]' has no options that can be read: write mine[option=number,...]; factor=1.0, "),
        ("mine[shift=1", "'mine[shift=1' has no options that can be read: write mine[option=number,...]; factor=1.0, "),
        ("mine[shift=1]@main", "'mine[shift=1]@main' pins a revision, and mine[shift=1] is not from the kernels hub"),
        ("mien[shift=1]", "no attention backend is called 'mien[shift=1]'; did you mean 'mine'"),
    ],
)
def test_options_that_are_wrong(plug_in, name, said):
    plug_in("mine", OPTIONS)
    for ask in (attnrewrite.records_of, attnrewrite.with_backend):
        with pytest.raises(ValueError, match="^" + re.escape(said)):
            ask(name)


def test_names_with_options_in_one_text():
    assert separate("a[x=1,y=2], b ,,c[z=3]") == ["a[x=1,y=2]", "b", "c[z=3]"]
    with pytest.raises(
        ValueError, match=r"which is one text: give separate names, 'mine\[factor=2,shift=1\]', 'native'"
    ):
        attnrewrite.with_backend("mine[factor=2,shift=1],native")


def test_info_and_the_table_show_options(plug_in, capsys):
    plug_in("mine", OPTIONS)
    main(["info"])
    main(["table"])
    said = capsys.readouterr().out
    assert "factor=1.0, from 0.5 to 4.0: of the output; shift=0, from -3 to 3: of the output" in said
    assert "| `mine` | `shift` | 0 | -3 | 3 | of the output | `mine[shift=1]` |" in said


def test_the_defaults_of_options_are_those_of_the_function():
    for record in attnrewrite.backends.RECORDS:
        (first, *_) = attnrewrite.records_of(record.name)
        assert record.options == first.options, record.name
        for name, option in record.options.items():
            given = inspect.signature(record.op).parameters[name].default
            assert (given, type(given)) == (option.default, type(option.default)), record.name
        for variant in record.variants:
            attnrewrite.records_of(f"{record.name}[{variant}]")
