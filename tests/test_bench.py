"""`attnrewrite bench` at tiny sizes on the CPU: what it measures, writes, draws and refuses."""

import json
import sys
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from parity import relative

import attnrewrite
from attnrewrite.__main__ import main
from attnrewrite.commands.bench import command, model_level, op_level, plots, results, variants
from attnrewrite.commands.bench.denoiser import Denoiser, Place
from attnrewrite.commands.bench.denoisers import MODELS
from attnrewrite.commands.bench.rounds import by_rounds, in_turn
from attnrewrite.commands.bench.variants import Variant
from attnrewrite.measuring.timing import Stopwatch
from attnrewrite.planning.measurements import Measurement
from attnrewrite.planning.plans import Plan
from attnrewrite.planning.sites import Site

CPU = Place(torch.device("cpu"), torch.float32, small=True)


def bench(*arguments):
    main(["bench", *map(str, arguments)])


# Two variants of one model, on the graph as it is: a second or two.
QUICK = ("--small", "--inner", "eager", "--rounds", 2, "--variants", "torch.compile;auto")


def quick(*arguments):
    bench(*QUICK, *arguments)


def quick_with(builders, *arguments):
    """Some models are others."""
    command.main([*map(str, (*QUICK, *arguments))], {**MODELS, **builders})


# -- models


# Sites in compiled blocks: of one class, all layers share a compilation. LTX-Video is one graph of two layers.
SITES = {
    "hunyuan": 2, "qwen-image": 1, "wan-14b": 2, "wan-14b-720p": 2, "wan-1.3b": 2, "sd3.5": 2, "flux": 2, "sdxl": 2, "ltx": 4,
    "lumina2": 3, "svd": 8, "cogvideox": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_run_and_every_site_is_swapped(name):
    denoiser = MODELS[name](CPU)
    backend = attnrewrite.with_backend("_native_math", inner="eager")
    with torch.no_grad():
        expected, output = model_level.exact(denoiser), denoiser.compile(backend)()
    assert expected.norm() > 0
    assert relative(output, expected) < 1e-5
    assert len(backend.report.sites) == backend.report.swapped == SITES[name]
    assert all(getattr(module, "_compiled_call_impl", None) is None for module in denoiser.model.modules())


@pytest.mark.parametrize(
    ("name", "query"),
    [
        ("flux", (1, 24, 4608, 128)),
        ("wan-14b", (1, 40, 32760, 128)),
        ("wan-14b-720p", (1, 40, 75600, 128)),
        ("cogvideox", (2, 48, 17776, 64)),
    ],
)
def test_published_sizes(name, query):
    """On the meta device: no memory, no arithmetic."""
    denoiser = MODELS[name](Place(torch.device("meta"), torch.bfloat16))
    with torch.no_grad():
        report = attnrewrite.explain(denoiser.model, **denoiser.inputs, return_dict=False, backend="native")
    calls = [site.call for site in report.sites]
    assert query in {(call.batch, call.heads, call.q_len, call.head_dim) for call in calls}
    assert {call.dtype for call in calls} == {"bfloat16"}


# -- variants, in turn


@pytest.fixture(scope="module")
def measured():
    """All variants of one small model, some of which cannot run."""
    said = []
    denoiser = MODELS["hunyuan"](CPU)
    off = attnrewrite.with_backend("_native_math", inner="eager")
    every = [
        Variant("eager", lambda _: None),
        Variant("torch.compile", lambda _: "eager"),
        Variant("diffusers, _native_flash", lambda _: "eager", peer="_native_flash"),
        Variant("diffusers, _native_math", lambda _: "eager", peer="_native_math"),
        Variant("ours", lambda _: off),
        Variant("broken", lambda _: 1 / 0),
        Variant("torch.compile, again", lambda _: "eager"),
    ]
    return model_level.measure(denoiser, every, 2, said.append), denoiser, "\n".join(said)


def test_a_record_of_a_model(measured):
    record, _, said = measured
    assert record["about"].startswith("HunyuanVideo, 1 + 1 of 20 + 40 blocks")
    rows = record["variants"]
    assert rows["torch.compile"]["ratio"] == 1
    assert 0 < record["again"] != 1  # the same once more
    assert "torch.compile, again" not in rows
    assert all(row["ms"] > 0 and 0 <= row["error"] < 1e-5 for row in rows.values())
    assert set(rows["ours"]["sites"].values()) == {"_native_math"}
    assert rows["ours"]["error"] > 0
    for name in (*rows, *record["failed"]):
        assert name in said


def test_a_variant_that_cannot_run_is_a_result(measured):
    record, _, _ = measured
    assert record["failed"].keys() == {"diffusers, _native_flash", "broken"}
    assert record["failed"]["diffusers, _native_flash"].startswith("ValueError: `attn_mask` is not supported")
    assert record["failed"]["broken"] == "ZeroDivisionError: division by zero"
    assert record["variants"]["diffusers, _native_math"]["peer"] == "_native_math"


def test_what_raised_leaves_nothing_behind(measured):
    """Dynamo no longer compiles a frame in which something raised: the others would run in pieces then."""
    record, _, _ = measured
    assert record["compiled_while_timed"] == 0
    graphs = {name: row["graphs"] for name, row in record["variants"].items()}
    blocks = SITES["hunyuan"]  # one graph for each class of blocks
    assert graphs == {"eager": 0, "torch.compile": blocks, "diffusers, _native_math": blocks, "ours": blocks}


def test_the_peers_choice_is_put_back(measured):
    _, denoiser, _ = measured
    assert _AttentionBackendRegistry.get_active_backend()[0] is AttentionBackendName.NATIVE
    chosen = {getattr(module.processor, "_attention_backend", None) for module in denoiser.model.modules()
              if hasattr(module, "processor")}  # fmt: skip
    assert chosen <= {AttentionBackendName.NATIVE, None}


def test_the_peers_choice_is_set_before_each_step():
    """It is process-wide: a step that found another variant's choice would measure that one."""
    found = []

    class Noting(Denoiser):
        def compile(self, name):
            def run():
                found.append((name, _AttentionBackendRegistry.get_active_backend()[0].value))
                return torch.zeros(1, 25, 8)

            return run

    denoiser = Noting(**vars(MODELS["flux"](CPU)))
    both = [Variant("plain", lambda _: "plain"), Variant("peer", lambda _: "peer", peer="_native_flash")]
    model_level.measure(denoiser, both, 4, lambda line: None)
    assert len(found) == 2 * (3 + 1 + 4)  # warm-up, a round that is not timed, rounds
    assert set(found) == {("plain", "native"), ("peer", "_native_flash")}


def test_rounds_run_all_in_another_order():
    order = []
    found = in_turn({name: lambda name=name: order.append(name) or 1.0 for name in "abc"}, 12)
    assert {name: len(times) for name, times in found.items()} == {"a": 12, "b": 12, "c": 12}
    rounds = [tuple(order[place : place + 3]) for place in range(0, 36, 3)]
    assert all(set(each) == set("abc") for each in rounds)
    assert len(set(rounds)) > 2


def test_ratios_are_those_within_a_round():
    """Load that doubles all times of some rounds changes no ratio."""
    assert by_rounds([1.0, 2.0, 4.0], [0.5, 1.0, 2.0]) == 2.0
    assert by_rounds([1.0, 9.0, 1.0], [2.0, 2.0, 2.0]) == 0.5


def test_the_peers_best_name():
    rows = {
        "torch.compile": {"ms": 1.0},
        "diffusers, a": {"ms": 3.0, "peer": "a"},
        "diffusers, b": {"ms": 2.0, "peer": "b"},
    }
    assert model_level.best_peer(rows) == "diffusers, b"
    assert model_level.best_peer({"torch.compile": {"ms": 1.0}}) is None


# -- kernels


@pytest.fixture(scope="module")
def shape():
    """One masked shape, two kernels that compute as SDPA does and one that does not take the call."""
    said = []
    names = ["native", "_native_math", "_native_cudnn"]
    shape = op_level.SMALL["tiny, padded"]
    record = op_level.measure("padded", shape, names, torch.device("cpu"), torch.float32, "eager", said.append)
    return record, "\n".join(said)


def test_a_record_of_a_shape(shape):
    record, said = shape
    call = attnrewrite.AttentionCall.from_dict(record["call"])
    assert (call.site, call.q_len, call.kv_len, call.head_dim, call.dtype) == ("padded", 20, 27, 16, "float32")
    assert call.mask.kind is attnrewrite.MaskKind.KEY_PADDING
    rows = record["kernels"]
    for name in ("native", "_native_math"):
        assert 0 < rows[name]["error"] < 1e-6
        assert rows[name]["tflops"] == pytest.approx(4 * 2 * 3 * 20 * 27 * 16 / rows[name]["ms"] / 1e9)
        assert name in said
    assert rows["_native_cudnn"]["failed"].startswith("DEVICE: ")
    assert record["choices"]["auto"] == "native"
    assert record["choices"]["tuned"] in ("native", "_native_math")
    assert op_level.to_best(record, "tuned") >= 1


def test_the_time_of_a_choice_to_the_best():
    record = {
        "kernels": {"native": {"ms": 2.0}, "_flash_3": {"ms": 1.0}, "sage": {"ms": 0.5}, "flash": {"failed": "DTYPE"},
                    "sol[tau=2.0]": {"ms": 0.1}},
        "choices": {"auto": "native", "tuned": "_flash_3", "tuned, quantised": "sage", "auto, quantised": "flash",
                    "tuned, sparse": "sage"},
    }  # fmt: skip
    expected = {"auto": 2.0, "tuned": 1.0, "tuned, quantised": 1.0, "auto, quantised": None, "tuned, sparse": 5.0}
    assert {choice: op_level.to_best(record, choice) for choice in expected} == expected


def test_shapes_are_the_published_ones():
    call = op_level.SHAPES["Wan2.1 14B"].call("Wan2.1 14B", "cuda", "bfloat16")
    assert (call.batch, call.heads, call.q_len, call.kv_len, call.head_dim) == (1, 40, 32760, 32760, 128)
    assert op_level.products(call) == 4 * 40 * 32760**2 * 128
    assert op_level.SHAPES["Lumina-Image 2"].call("", "cuda", "bfloat16").kv_heads == 8
    assert {shape.dim for shape in op_level.LINES.values()} == {64, 128}


# -- the command


def test_models_kernels_json_and_picture(tmp_path, capsys):
    out, picture = tmp_path / "b.json", tmp_path / "b.png"
    quick("--models", "flux", "--out", out, "--plot", picture)
    first = json.loads(out.read_text())
    assert first["models"]["flux"]["variants"].keys() == {"torch.compile", "auto"}
    assert first["packages"]["diffusers"] == diffusers.__version__
    assert first["small"] is True
    assert first["models"]["flux"]["inputs"] == "random"
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.unlink()

    quick("--models", "sdxl", "--kernels", "native,_native_flash", "--shapes", "16 of 16", "--out", out, "--append")
    both = json.loads(out.read_text())
    assert both["models"].keys() == {"flux", "sdxl"}
    assert both["models"]["flux"] == first["models"]["flux"]
    assert both["kernels"]["16 of 16"]["kernels"].keys() == {"native", "_native_flash"}
    for group, names in {
        "named": {"tiny", "tiny, padded", "tiny, documents"},
        "lines": {"16 of 16", "64 of 16"},
    }.items():
        given = command.parser().parse_args(["--small", "--kernels", "native", "--shapes", group])
        assert command._checked(given)[3].keys() == names
    assert len(both["ceiling"]) == 4  # models: once a call; kernels: before and after
    assert all(rate > 0 for rate in both["ceiling"][0].values())
    assert [each.split()[:2] for each in both["commands"]] == [["attnrewrite", "bench"]] * 2
    said, progress = capsys.readouterr()
    lines = [line for line in progress.splitlines() if line.startswith("attnrewrite bench: ")]
    assert lines[0] == "attnrewrite bench: importing what is measured"
    assert {"attnrewrite bench: flux: making the model", "attnrewrite bench: 16 of 16: native (1/2)"} <= set(lines)
    assert "FLUX.1, 1 + 1 of 19 + 38 blocks" in said
    assert "TFLOP/s" in said

    bench("--from", out)
    rows = [{line for line in text.splitlines() if "  error " in line} for text in (said, capsys.readouterr().out)]
    assert rows[0] == rows[1]  # the table as it was printed first
    assert len(rows[0]) == 2 * 2 + 2
    bench("--from", out, "--plot", tmp_path / "again.svg")
    text = (tmp_path / "again.svg").read_text()
    assert "<!-- CPU, torch" in text  # the machine, in the title
    for word in ("sequence length", "matmul", " _native_flash", "FLUX.1", "SDXL"):
        assert f"<!-- {word}" in text, word
    assert {path.name for path in tmp_path.iterdir()} == {"b.json", "again.svg"}


def test_usual_variants():
    names = [variant.name for variant in variants.usual(["_flash_3"])]
    assert names == ["eager", "torch.compile", "diffusers, _flash_3", "auto", "tuned", "tuned, quantised",
                     "torch.compile, again"]  # fmt: skip
    denoiser = MODELS["sd3.5"](CPU)
    ours = variants.usual([], "eager", ["native", "_native_math"])[-4:]
    plain = Variant("torch.compile", lambda _: "eager")
    record = model_level.measure(denoiser, [plain, *ours], 1, lambda line: None, 0.1)
    assert record["failed"] == {}
    assert set(record["variants"]["auto"]["sites"].values()) == {"native"}
    assert set(record["variants"]["tuned"]["sites"].values()) <= {"native", "_native_math"}
    plan = Plan.from_json(json.dumps(record["plan"]))
    assert {each.name for site in plan.sites for each in site.measured} == {"native", "_native_math"}
    assert record["limit"] >= 1


def test_variants_up_to_a_class_of_numerics():
    tuned = {"reordered": ["tuned"], "quantised": ["tuned", "tuned, quantised"]}
    tuned["sparse"] = [*tuned["quantised"], "tuned, sparse"]
    for numerics, expected in tuned.items():
        names = [variant.name for variant in variants.usual([], numerics=numerics)]
        assert names == ["eager", "torch.compile", "auto", *expected, "torch.compile, again"]


def test_a_sparse_run_says_which_inputs_errors_and_kernels_it_had(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Stopwatch, "sample", lambda self, call, calls: 1e-3)  # runs nothing: all kernels take as long
    out, picture = tmp_path / "b.json", tmp_path / "b.svg"
    arguments = ["--numerics", "sparse", "--loose", "0.2", "--variants", "torch.compile;tuned;tuned, sparse"]
    quick("--models", "wan14b", "--candidates", "_native_math", *arguments, "--out", out, "--plot", picture)
    record = json.loads(out.read_text())["models"]["wan-14b"]
    assert record["inputs"] == "structured, random part 0.2"
    row, plan = record["variants"]["tuned, sparse"], Plan.from_dict(record["plan"])
    assert (plan.tuning.numerics, plan.tuning.max_error) == ("sparse", 0.02)
    errors = {site.name: each.error for site in plan.sites for each in site.measured if each.name == "native"}
    assert row["site_error"] == errors[row["worst_site"]] == max(errors.values())
    assert row["numerics"] == "exact"
    said = capsys.readouterr().out
    assert "queries and keys         structured" in said
    assert "at the worst site  native" in said
    assert "with an error of at most 0.02 at a site" in said
    text = picture.read_text()
    for word in (
        "(structured, random part 0.2)",
        "tuned, sparse",
        "(on the bars: milliseconds, error)",
        f"{row['ms']:.3g}, {row['error']:.0e}",
    ):
        assert f"<!-- {word}" in text, word


def test_the_worst_site_of_a_variant():
    """Equal blocks are one site of what was compiled, and several of the plan; a site of other sizes is another one's."""
    call = attnrewrite.AttentionCall("blocks.0.attn", 1, 2, 2, 7, 9, 5, 5, "float32")
    measured = (Measurement("native", 1.0, error=1e-3), Measurement("sol", 0.1, error=5e-3))
    worse = (Measurement("native", 1.0, error=1e-3), Measurement("sol", 0.1, error=9e-3))
    plan = Plan((
        Site(call, (), "sol", measured=measured),
        Site(replace(call, site="blocks.1.attn"), (), "sol", measured=worse),
        Site(replace(call, site="cross", kv_len=3), (), "native", measured=(Measurement("sol", 0.1, error=0.5),)),
    ))  # fmt: skip
    compiled = Site(replace(call, site="attn"), (), "sol")
    assert model_level.worst_site([compiled], plan) == ("blocks.1.attn", 9e-3)
    assert model_level.worst_site([replace(compiled, chosen="native")], plan)[1] == 1e-3
    assert model_level.worst_site([replace(compiled, chosen="flash")], plan) is None
    # Two classes of blocks, each with a kernel of its own: whichever was compiled last.
    dense = replace(plan.sites[0], chosen="native")
    plan = Plan((dense, *plan.sites[1:]))
    for sites in ([compiled, replace(compiled, chosen="native")], [replace(compiled, chosen="native"), compiled]):
        assert model_level.worst_site(sites, plan) == ("blocks.1.attn", 9e-3)
    plan = Plan((replace(dense, chosen="sol"), replace(plan.sites[1], chosen="native")))
    for sites in ([compiled, replace(compiled, chosen="native")], [replace(compiled, chosen="native"), compiled]):
        assert model_level.worst_site(sites, plan) == ("blocks.0.attn", 5e-3)


def test_sites_of_one_name():
    call = attnrewrite.AttentionCall("attn", 1, 2, 2, 7, 9, 5, 5, "float32")
    sites = [Site(call, (), kernel) for kernel in ("native", "sol", "native", None, "sol")]
    assert model_level._by_name(sites) == {"attn": "native", "attn (2)": "sol", "attn (3)": None}


def test_a_plan_is_of_one_model_alone(monkeypatch):
    """Also where a model takes the place in memory of one that is gone."""
    tuned = []
    monkeypatch.setattr(variants, "tune", lambda model, **kwargs: tuned.append(type(model)))
    monkeypatch.setattr(variants, "with_backend", lambda *choices, **kwargs: choices)
    (ours,) = (each for each in variants.usual([]) if each.name == "tuned")
    for kind in (torch.nn.Identity, torch.nn.ReLU, torch.nn.GELU):
        denoiser = Denoiser(kind(), {}, (), "")
        ours.backend(denoiser)
        ours.backend(denoiser)
        del denoiser
    assert tuned == [torch.nn.Identity, torch.nn.ReLU, torch.nn.GELU]


def test_names_with_options_and_other_spellings():
    def checked(*arguments):
        return command._checked(command.parser().parse_args(["--small", *arguments]))

    both = "sol[tau=1,sinks=256], _flash_3_fp8[center=1,rotate=1]"
    right = ["sol[sinks=256,tau=1.0]", "_flash_3_fp8[center=1,rotate=1]"]
    assert checked("--kernels", f"native,{both},sol[sinks=256,tau=1.0]")[2] == ["native", *right]
    _, models, _, _, ways, _ = checked(
        "--models", "wan14b,wan14b_720p,hunyuan", "--candidates", both, "--peers", "a[b=1,c=2],d"
    )
    assert models == ["wan-14b", "wan-14b-720p", "hunyuan"]
    assert [each.peer for each in ways if each.peer != "native"] == ["a[b=1,c=2]", "d"]
    given = []
    tuned = next(each for each in ways if each.name == "tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants, "tune", lambda *args, candidates, **kwargs: given.extend(candidates) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tuned.backend(Denoiser(torch.nn.Identity(), {}, (), ""))
    assert given == right


def test_the_limit_is_a_matmuls_time():
    """Two sites of 10 ms each; a matmul of as many operations takes 4 ms. So 12 of 100 ms could be saved."""
    call = attnrewrite.AttentionCall("a", 1, 2, 2, 1000, 1000, 500, 500, "float32")  # 4e9 operations
    site = Site(call, (), "native", measured=(Measurement("native", 10.0),))
    assert model_level.limit_of(Plan((site, site)), 100.0, 1.0) == pytest.approx(100 / 88)
    assert model_level.limit_of(Plan((site, site)), 100.0, 0.1) == 1  # faster than the matmul: nothing to save


def test_the_worst_choice_of_a_plan():
    call = attnrewrite.AttentionCall("a", 1, 2, 2, 7, 9, 5, 5, "float32")
    slow, quick = Measurement("native", 1.0, host=0.2), Measurement("flash_4", 0.5, host=0.8)
    inexact = Measurement("sage", 0.1, dropped="its error")
    one = Site(call, (), "native", measured=(slow, quick, inexact))
    assert model_level.worst_choice(Plan((one, replace(one, chosen="flash_4")))) == 1.25  # its launch takes 0.8 ms
    assert model_level.worst_choice(Plan((replace(one, chosen="flash_4"),))) == 1.0
    assert model_level.worst_choice(Plan((Site(call, (), "native"),))) is None  # nothing was timed


class Interrupted(torch.nn.Linear):
    def forward(self, input, return_dict):
        raise KeyboardInterrupt


def test_an_interruption_keeps_what_was_measured(tmp_path, capsys):
    def interrupted(place):
        return Denoiser(Interrupted(3, 3), {"input": place.randn(3)}, (), "a model at which somebody presses Ctrl-C")

    with pytest.raises(SystemExit) as ended:
        quick_with({"sdxl": interrupted}, "--models", "flux,sdxl", "--out", tmp_path / "b.json")
    assert ended.value.code == 130
    assert json.loads((tmp_path / "b.json").read_text())["models"].keys() == {"flux"}
    assert "what was measured is in" in capsys.readouterr().err


def test_a_model_that_does_not_fit_leaves_room_for_the_next(tmp_path):
    def too_large(place):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    files = ("--out", tmp_path / "b.json", "--plot", tmp_path / "b.png")
    quick_with({"wan-14b": too_large}, "--models", "wan-14b,flux", *files)
    found = json.loads((tmp_path / "b.json").read_text())["models"]
    assert found["wan-14b"]["failed"]["all"].startswith("OutOfMemoryError: CUDA out of memory")
    assert found["flux"]["variants"].keys() == {"torch.compile", "auto"}


def test_what_is_not_finite_is_text_in_json(tmp_path):
    results.write(tmp_path / "b.json", {"errors": [float("nan"), float("inf"), 0.5]})
    assert json.loads((tmp_path / "b.json").read_text()) == {"errors": ["NaN", "Infinity", 0.5]}


def refused(capsys, *arguments):
    """What the command says before it measures anything, with the exit code of a wrong argument."""
    with pytest.raises(SystemExit) as ended:
        bench(*arguments)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to measure: give --models, --kernels or both"),
        (["--small", "--models", "flax"], "--models names 'flax', which is unknown; did you mean 'flux'?"),
        (["--small", "--kernels", "flesh"], "--kernels names 'flesh', which is unknown; did you mean 'flash'?"),
        (
            ["--small", "--kernels", "sole[tau=1.0,sinks=3]"],
            "--kernels names 'sole', which is unknown; did you mean 'sol'?",
        ),
        (["--small", "--kernels", "sol[tau=1.0,sink=3]"], "--kernels: 'sol[tau=1.0,sink=3]': sol has no option 'sink'"),
        (
            ["--small", "--models", "--candidates", "flex[a=1]"],
            "--candidates: 'flex[a=1]' gives options to flex, which has none",
        ),
        (["--small", "--models", "wan15b"], "--models names 'wan15b', which is unknown; did you mean 'wan-14b'?"),
        (["--small", "--models", "--numerics", "exact"], "argument --numerics: invalid choice: 'exact'"),
        (["--small", "--models", "--max-error", "nan"], "--max-error is nan: give a number from 0 on"),
        (["--small", "--models", "--loose", "-1"], "--loose is -1.0: give a number from 0 on, as 0.3"),
        (["--small", "--models", "--loose", "0.1"], "--loose is 0.1, but only --numerics sparse gives"),
        (["--small", "--kernels", "--shapes", "Flux"], "--shapes names 'Flux', which is unknown"),
        (["--small", "--models", "--variants", "tuned;fast"], "--variants names 'fast', which is unknown"),
        (["--small", "--models", ","], "--models is ',': it names nothing"),
        (["--small", "--models", "--rounds", "0"], "--rounds is 0: it must be at least 1"),
        (["--small", "--models", "--append"], "--append needs --out FILE"),
        (["--small", "--models", "--out", "/gone/b.json"], "/gone is no folder"),
        (["--small", "--models", "--plot", "b.bmp"], "'b.bmp' ends in '.bmp': a picture is one of .png, .svg, .pdf"),
        (["--small", "--models", "--inner", "inducter"], "inner is 'inducter', which is no backend of torch.compile"),
        (["--from", "b.json", "--models"], "--from shows an earlier result: leave out --models"),
        (["--from", "/gone/b.json", "--plot", "b.png"], "No such file or directory: '/gone/b.json'"),
    ],
)
def test_bad_arguments(arguments, said, capsys):
    assert said in refused(capsys, *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_published_sizes_want_a_gpu(capsys):
    assert "published sizes need a CUDA GPU; --small" in refused(capsys, "--models")
    assert "PyTorch sees no CUDA GPU here" in refused(capsys, "--models", "--device", "cuda")


def test_a_file_that_is_there_is_not_replaced(tmp_path, capsys):
    out = tmp_path / "b.json"
    out.write_text("mine")
    assert "exists: name another file, or add to it with --append" in refused(
        capsys, "--small", "--models", "--out", out
    )
    said = refused(capsys, "--small", "--models", "--out", out, "--append")
    assert f"--append to {out}: {out} is no result of attnrewrite bench" in said
    assert out.read_text() == "mine"


def test_results_of_two_machines_do_not_mix(tmp_path, capsys):
    out = tmp_path / "b.json"
    other = {**results.header(torch.device("cpu"), small=True), "device": "NVIDIA H200", "models": {}}
    out.write_text(json.dumps(other))
    said = refused(capsys, "--small", "--models", "--out", out, "--append")
    assert "its device is 'NVIDIA H200', the device of this run is 'CPU'" in said
    assert json.loads(out.read_text()) == other


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "is no result"), ("[]", "is no result"), ('{"version": 9}', "its version is 9, this attnrewrite reads version 1"),
     ('{"version": 1, "device": "CPU"}', "is no result")],
)  # fmt: skip
def test_files_that_are_no_result(tmp_path, text, said):
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        results.read(tmp_path / "b.json")


def test_without_diffusers_or_matplotlib(monkeypatch, capsys, tmp_path):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "diffusers", None)
        assert "pip install diffusers" in refused(capsys, "--small", "--models")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'attnrewrite[plot]'" in refused(capsys, "--small", "--models", "--plot", tmp_path / "b.png")


def test_kernels_that_run_elsewhere_only(capsys):
    with pytest.raises(SystemExit, match="none of flash runs on this machine"):
        bench("--small", "--kernels", "flash", "--inner", "eager")


def test_a_bar_for_a_peer_that_raises(measured, tmp_path):
    record, _, _ = measured
    rows = {name: row for name, row in record["variants"].items() if "peer" not in row}
    result = {**results.header(torch.device("cpu")), "models": {"hunyuan": {**record, "variants": rows}}}
    plots.plot(result, tmp_path / "b.svg")
    assert "<!-- raises -->" in (tmp_path / "b.svg").read_text()


def test_styles_are_all_different():
    names = [str(number) for number in range(30)]
    assert len(set(plots._styles(names).values())) == 30


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    out = tmp_path / "b.json"
    bench("--small", "--models", "flux", "--kernels", "native,_native_flash", "--rounds", 3, "--out", out)
    result = json.loads(out.read_text())
    assert result["machine"]["device"] == "cuda"
    assert result["models"]["flux"]["variants"]["tuned"]["ms"] > 0
    assert result["models"]["flux"]["compiled_while_timed"] == 0
    assert all(shape["kernels"]["native"]["error"] < 1e-2 for shape in result["kernels"].values())
    assert all(rate > 100 for rate in result["ceiling"][0].values())
