"""`report.repro(site)`: a script that makes the same call again, of every kind, and prints its error."""

import re
from dataclasses import replace

import forked
import pytest
import torch
import torch.nn.functional as F
from parity import qkv

import attnrewrite
from attnrewrite import AttentionCall, Mask, MaskKind, check, with_backend
from attnrewrite.kernels.decisions import Accepted
from attnrewrite.planning.plans import Plan
from attnrewrite.planning.sites import Site
from attnrewrite.reports.report import GraphReport, Report

FLASH = "_native_flash"
Q, K = 13, 17  # lengths of queries and keys


def report_of(call, chosen=FLASH):
    site = Site(call, ((chosen or FLASH, Accepted()),), chosen)
    return Report("test", [GraphReport("0/0", Plan((site,)), None, 0.0, 0)])


NO_MASK = Mask()


def call_of(mask=NO_MASK, **sizes):
    given = {"batch": 2, "heads": 4, "kv_heads": 4, "q_len": Q, "kv_len": K, "head_dim": 8, "value_dim": 8}
    return AttentionCall("blocks.0.attn", **{**given, "dtype": "float32", "layout": "bshd", "mask": mask, **sizes})


def written(call, chosen=FLASH):
    """The script of one call, on the graph as it is."""
    return report_of(call, chosen).repro("blocks.0.attn", inner="eager")


def run(text, capsys):
    """Runs a script here. Returns its report and what it prints."""
    names = {"__name__": "__main__"}
    exec(compile(text, "repro.py", "exec"), names)
    return names["backend"].report, capsys.readouterr().out


def mask(kind, *shape, dtype="bool", **more):
    return Mask(kind, dtype, shape, **more)


CALLS = {
    "none": call_of(),
    "dense": call_of(layout="bhsd"),
    "strided": call_of(layout="strided"),
    "scale": call_of(scale=0.3),
    "grouped": call_of(kv_heads=2),
    "value_dim": call_of(value_dim=12),
    "bfloat16": call_of(dtype="bfloat16"),
    "causal": call_of(Mask(MaskKind.CAUSAL_UPPER_LEFT), q_len=K),
    "causal tensor": call_of(mask(MaskKind.CAUSAL_UPPER_LEFT, K, K), q_len=K),
    "lower-right": call_of(mask(MaskKind.CAUSAL_LOWER_RIGHT, Q, K)),
    "key padding": call_of(mask(MaskKind.KEY_PADDING, 2, 1, 1, K)),
    "key padding, one for all": call_of(mask(MaskKind.KEY_PADDING, 1, 1, 1, K)),
    "key padding, spread": call_of(mask(MaskKind.KEY_PADDING, 2, 4, Q, K)),
    "key padding, -10000": call_of(mask(MaskKind.KEY_PADDING, 2, 1, 1, K, dtype="float32", no_key="all keys")),
    "key padding, finfo.min": call_of(mask(MaskKind.KEY_PADDING, 2, 1, 1, K, dtype="float32", no_key="mean")),
    "both paddings": call_of(mask(MaskKind.QUERY_KEY_PADDING, 2, 1, K, K), q_len=K),
    "both paddings, cross": call_of(mask(MaskKind.QUERY_KEY_PADDING, 2, 1, Q, K)),
    "causal padding": call_of(mask(MaskKind.CAUSAL_PADDING, 2, 1, K, K), q_len=K),
    "window": call_of(mask(MaskKind.SLIDING_WINDOW, K, K, window=(3, 0)), q_len=K),
    "documents": call_of(mask(MaskKind.BLOCKS, 1, 1, K, K), q_len=K),
    "boolean": call_of(mask(MaskKind.BOOLEAN, 1, 4, Q, K)),
    "boolean of rank 2": call_of(mask(MaskKind.BOOLEAN, Q, K)),
    "additive": call_of(mask(MaskKind.ADDITIVE, 4, Q, K, dtype="float32")),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_script_makes_the_same_call(name, capsys):
    call = CALLS[name]
    report, said = run(written(call), capsys)
    (site,) = report.sites
    # What cannot be the same: whose site it is, and a role that needs a model.
    same = replace(site.call, site=call.site, role=call.role)
    assert same == call
    assert site.chosen == FLASH or site.refusals
    error = float(re.search(r"relative error (\S+) to float64, on (\d+) of", said)[1])
    assert error < (1e-2 if call.dtype == "bfloat16" else 1e-6)
    assert re.search(r"^0 NaN, 0 inf of \d+ values$", said, re.M)


ONES = """
from attnrewrite import Backend


def op(query, key, value, mask, *, call):
    return query * 0 + 1


RECORDS = [Backend("ones", "tests", op, frozenset({"cpu"}), frozenset({"float32"}))]
"""


def test_the_error_is_that_of_the_kernel(plug_in, capsys):
    """A script that compared the kernel with itself would always be content."""
    plug_in("broken_kernel", ONES)
    report, said = run(written(call_of(), "ones"), capsys)
    assert report.sites[0].chosen == "ones"
    assert float(re.search(r"relative error (\S+) to", said)[1]) > 0.5


def test_long_sequences_are_compared_in_parts(capsys):
    _, said = run(written(call_of(q_len=600)), capsys)
    assert "on 256 of 600 rows" in said


def test_it_runs_alone(tmp_path):
    """As a user runs it: a file, another process, Inductor."""
    given = report_of(CALLS["key padding"])
    text = given.repro("blocks.0.attn", tmp_path / "repro.py")
    assert (tmp_path / "repro.py").read_text() == text
    done = forked.python(tmp_path / "repro.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "key padding (2, 17)" in done.stdout
    assert float(re.search(r"relative error (\S+) to", done.stdout)[1]) < 1e-6


def test_gradients_and_determinism(capsys):
    text = written(call_of(needs_grad=True, deterministic=True))
    try:
        report, _ = run(text, capsys)
    finally:
        torch.use_deterministic_algorithms(False)
    assert (report.sites[0].call.needs_grad, report.sites[0].call.deterministic) == (True, True)


def test_symbolic_sizes_are_to_be_filled_in(capsys):
    call = call_of(mask(MaskKind.KEY_PADDING, "s0", 1, 1, "s1 + 4"), batch="s0", q_len="s1", kv_len="s1 + 4")
    text = written(call)
    for name in ("s0", "s1"):
        assert f"{name} = 128  # a symbol in the graph: put a size here" in text
    assert "dynamic=True" in text
    report, _ = run(text.replace("s0 = 128", "s0 = 2").replace("s1 = 128", "s1 = 13"), capsys)
    assert report.sites[0].chosen == FLASH


def test_what_happened_in_the_model_is_told():
    refused = attnrewrite.Refused(attnrewrite.Code.MASK, 'it "takes" none', "Choose another")
    site = Site(call_of(), (("flash", refused), (FLASH, Accepted())), FLASH, source="flash-attn 2.8")
    text = Report("test", [GraphReport("0/0", Plan((site,)), None, 0.0, 0)]).repro(site)
    assert 'flash was refused: MASK: it "takes" none' in text
    assert "flash-attn 2.8" in text
    stays = report_of(call_of(), None).repro("blocks.0.attn")
    assert "with_backend('native')" in stays
    assert "the call stayed unchanged" in stays


@pytest.mark.parametrize("name", ["sage", "_flash_3_hub@abc"])
def test_numerics_and_pinned_revisions(name):
    text = report_of(call_of(), name).repro("blocks.0.attn")
    assert f"with_backend({name!r}" in text
    assert ('numerics="quantised"' in text) == (name == "sage")


def test_a_cast_is_in_the_script():
    step = attnrewrite.Step("cast", "float32", "bfloat16")
    site = Site(call_of(), ((FLASH, Accepted((step,))),), FLASH)
    assert "cast='bfloat16'" in Report().repro(site)


def test_the_compiler_is_in_the_script():
    given = report_of(call_of())
    assert f"with_backend({FLASH!r}, inner='eager')" in given.repro("blocks.0.attn", inner="eager")
    assert "inner=" not in given.repro("blocks.0.attn")
    with pytest.raises(ValueError, match=r"inner is 'eagr', .* did you mean .*'eager'"):
        given.repro("blocks.0.attn", inner="eagr")
    with pytest.raises(ValueError, match="which a script cannot name: give a name, as 'eager'"):
        given.repro("blocks.0.attn", inner=lambda graph_module, example_inputs: graph_module)


def test_unknown_sites():
    with pytest.raises(ValueError, match=r"site is 'blocks.0.atn', .* did you mean 'blocks.0.attn'\?"):
        report_of(call_of()).repro("blocks.0.atn")
    with pytest.raises(ValueError, match="no graph was compiled"):
        Report().repro("blocks.0.attn")


def test_a_record_without_a_name():
    with pytest.raises(ValueError, match="'mine', which is a record of your own"):
        report_of(call_of(), "mine").repro("blocks.0.attn")


def test_places_that_cannot_be_written_to(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone is no folder"):
        report_of(call_of()).repro("blocks.0.attn", tmp_path / "gone" / "repro.py")
    assert list(tmp_path.iterdir()) == []


def test_from_a_saved_report():
    given = report_of(CALLS["window"])
    assert Report.from_json(given.to_json()).repro("blocks.0.attn") == given.repro("blocks.0.attn")


@pytest.mark.parametrize("grad", [False, True])
def test_a_fidelity_knows_how_tensors_lie(capsys, grad):
    query, key, value = qkv()
    key = torch.randn(2, 4, 11, 40)[..., 3:19].requires_grad_(grad)  # rows that are not dense, and begin later
    with torch.set_grad_enabled(grad):
        found = check(
            F.scaled_dot_product_attention, query, key, value, backend=with_backend("_native_math", inner="eager")
        )
    text = found.repro(found.sites[0].name, inner="eager")
    assert "((2, 4, 11, 16), (1760, 440, 40, 1), 3)" in text
    report, said = run(text, capsys)
    (site,) = report.sites
    assert (site.call.kv_len, site.call.needs_grad) == (11, grad)
    assert float(re.search(r"relative error (\S+) to", said)[1]) < 1e-6
    with pytest.raises(ValueError, match="site is 'gone': it is one of"):
        found.repro("gone")


@pytest.mark.gpu
def test_a_script_for_a_gpu(capsys):
    call = call_of(mask(MaskKind.KEY_PADDING, 2, 1, 1, K), device="cuda", dtype="bfloat16", head_dim=64, value_dim=64)
    report, said = run(written(call, "_native_varlen"), capsys)
    assert report.sites[0].chosen == "_native_varlen"
    assert float(re.search(r"relative error (\S+) to", said)[1]) < 1e-2
