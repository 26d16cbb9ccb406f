"""`with_backend("auto")`: the table of preferences, its evidence, what it asks about sizes, and that it never guesses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from decision_specs import PACKAGES
from parity import TOLERANCE, attend, doubled, qkv, relative

import attnrewrite
from attnrewrite import AttentionCall, AttentionCompiler, Machine, Mask, MaskKind, Numerics, make_policy
from attnrewrite.commands.bench.op_level import quantised
from attnrewrite.planning import preferences
from attnrewrite.planning.matching import foreign
from attnrewrite.planning.policies import Policy
from attnrewrite.planning.preferences import ROWS, UNMASKED, Row
from attnrewrite.planning.selectors import Auto

ROOT = Path(__file__).parent.parent
TORCH = {"torch": "2.11.0", "cuda": "13.0", "cudnn": "9.19.0"}
H200 = Machine("cuda", (9, 0), {**PACKAGES, **TORCH}, "NVIDIA H200")
BARE = Machine("cuda", (9, 0), TORCH, "NVIDIA H200")

WINDOW = Mask(MaskKind.SLIDING_WINDOW, "bool", (32760, 32760), window=(512, 512))
DOCUMENTS = Mask(MaskKind.BLOCKS, "bool", (1, 1, 32760, 32760))
PADDED = Mask(MaskKind.KEY_PADDING, "bool", (2, 1, 1, 7145))


def call(batch=2, heads=24, q_len=4608, kv_len=None, dim=128, **given):
    return AttentionCall("site", batch, heads, heads, q_len, kv_len or q_len, dim, dim, "bfloat16", "cuda", **given)


def preferred(asked, machine=H200, numerics="reordered"):
    """The names that are asked, in order, and which of them takes the call."""
    policy = make_policy(["auto"], numerics=numerics)
    site = attnrewrite.make_plan([asked], policy, [machine]).sites[0]
    return [candidate.name for candidate in policy.candidates(asked, machine)], site


LONG = {"q_len": 32760, "batch": 1, "heads": 40}
CHOICES = [
    ("FLUX.1", call(), H200, "_flash_3"),
    ("FLUX.1, one image", call(batch=1), H200, "_flash_3"),
    ("Wan2.1 14B", call(**LONG), H200, "_flash_3"),
    ("its cross-attention", call(**LONG, kv_len=512), H200, "native"),
    ("1,024 tokens", call(q_len=1024), H200, "native"),
    ("SDXL", call(heads=10, q_len=4096, dim=64), H200, "native"),
    ("SD3.5-large", call(heads=38, q_len=4429, dim=64), H200, "_flash_3"),
    ("8,192 tokens of 64", call(batch=1, q_len=8192, dim=64), H200, "_flash_3"),
    ("6,144 tokens of 64", call(batch=1, q_len=6144, dim=64), H200, "native"),
    ("16,384 tokens of 64", call(batch=1, q_len=16384, dim=64), H200, "flash_4"),
    ("HunyuanVideo", call(batch=1, q_len=32896, mask=PADDED), H200, "_flash_3"),
    ("HunyuanVideo, PyTorch alone", call(batch=1, q_len=32896, mask=PADDED), BARE, "native"),
    ("Qwen-Image", call(q_len=7145, mask=PADDED), H200, "_flash_3"),
    ("Qwen-Image, PyTorch alone", call(q_len=7145, mask=PADDED), BARE, "_native_varlen"),
    ("FLUX.1, PyTorch alone", call(), BARE, "native"),
    ("padding of both", call(q_len=7145, mask=replace(PADDED, kind=MaskKind.QUERY_KEY_PADDING)), H200, "_flash_3"),
    ("one query", call(q_len=1, kv_len=32760), H200, "native"),
    ("one query of many", call(batch=4096, q_len=1, kv_len=4608), H200, "native"),
    ("SVD, frames", call(4608, 10, 14, dim=64), H200, "_native_folded"),
    ("SVD, frames, PyTorch alone", call(4608, 10, 14, dim=64), BARE, "_native_folded"),
    ("70,000 sequences of 16", call(70_000, 8, 16, dim=64), H200, "_native_folded"),
    ("AnimateDiff, 80 wide", call(2048, 8, 16, dim=80), H200, "_native_folded"),
    ("AnimateDiff, 160 wide", call(512, 8, 16, dim=160), H200, "_native_folded"),
    ("32 frames, 160 wide", call(2304, 8, 32, dim=160), H200, "_native_efficient"),
    ("33 frames", call(18_432, 5, 33, dim=64), H200, "_native_efficient"),
    ("an odd number of pixels", call(18_433, 5, 14, dim=64), H200, "_native_efficient"),
    ("96 wide", call(2048, 8, 16, dim=96), H200, "_native_folded"),
    ("144 wide", call(2048, 8, 16, dim=144), H200, "native"),
    ("32 frames, 80 wide", call(2304, 8, 32, dim=80), H200, "native"),
    ("32 frames", call(18_432, 5, 32, dim=64), H200, "_native_folded"),
    ("65 frames", call(4608, 10, 65, dim=64), H200, "native"),
    ("7 frames", call(4608, 10, 7, dim=64), H200, "native"),
    ("frames of a small batch", call(64, 8, 16, dim=64), H200, "native"),
    ("short keys of long queries", call(16, 10, 4096, 16, dim=64), H200, "native"),
    ("a window", call(**LONG, mask=WINDOW), H200, "flash_4"),
    ("documents", call(**LONG, mask=DOCUMENTS), H200, "flash_4"),
    ("documents, PyTorch alone", call(**LONG, mask=DOCUMENTS), BARE, "flex"),
    ("short documents", call(q_len=4096, mask=DOCUMENTS), H200, "native"),
    ("a window, PyTorch alone", call(**LONG, mask=WINDOW), BARE, "flex"),
    ("a bias", call(mask=Mask(MaskKind.ADDITIVE, "bfloat16", (4608, 4608))), H200, "native"),
    ("causal", call(mask=Mask(MaskKind.CAUSAL_UPPER_LEFT)), H200, "native"),
    ("training", call(needs_grad=True), H200, "native"),
    ("float32", call(), H200, "native"),
    ("an A100", call(), replace(H200, capability=(8, 0)), "native"),
    ("a transform", call(obstacle="it stands inside torch.func.vmap"), H200, "native"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "asked", "machine", "wanted"), CHOICES, ids=[choice[0] for choice in CHOICES])
def test_choice(what, asked, machine, wanted):
    asked = replace(asked, dtype="float32") if what == "float32" else asked
    names, site = preferred(asked, machine)
    assert site.chosen == wanted
    assert names[-1] == "native"
    assert site.note.startswith("auto: ")


def test_quantised_kernels_are_for_who_asks():
    names, _ = preferred(call(**LONG))
    assert all(attnrewrite.records_of(name)[0].numerics < Numerics.QUANTISED for name in names)
    names, site = preferred(call(**LONG), numerics="quantised")
    assert site.chosen == "_flash_3_fp8"
    assert names == ["_flash_3_fp8", "sage", "_flash_3", "flash_4", "native"]  # exact ones where these refuse
    _, site = preferred(call(**LONG), numerics="exact")
    assert site.chosen == "native"


def test_a_row_stands_for_what_it_says():
    for row in ROWS:
        for name in row.names:
            (record, *_) = attnrewrite.records_of(name)
            assert record.numerics <= row.numerics
            assert "@" not in name
            assert not name.endswith("_hub"), "what nobody named is not downloaded"
            assert row.masks & record.masks, f"{name} can never take what the row is about"
        (file,) = [word.rstrip(":") for word in row.evidence.split() if word.startswith("bench/results/")]
        assert file in (preferences.SHAPES, preferences.SHORT, preferences.WINDOWS, preferences.MODELS)
    assert (ROOT / preferences.MODELS).exists()


@pytest.mark.parametrize("file", [preferences.SHAPES, preferences.SHORT, preferences.WINDOWS, preferences.NAMED])
def test_never_slower_than_native_on_the_evidence(file):
    """The file is what `attnrewrite bench --kernels --out FILE` wrote on the machine."""
    result = json.loads((ROOT / file).read_text())
    machine = Machine.from_dict(result["machine"])
    for name, shape in result["kernels"].items():
        timed = {kernel: row["ms"] for kernel, row in shape["kernels"].items() if "ms" in row}
        for numerics in ("reordered", "quantised"):
            _, decided = preferred(AttentionCall.from_dict(shape["call"]), machine, numerics)
            if numerics == "quantised" and not any(map(quantised, timed)):
                continue  # the run had no quantised kernel
            assert timed[decided.chosen] <= 1.02 * timed["native"], (name, decided.chosen, timed)


def test_on_a_cpu_it_is_native_and_right():
    backend = attnrewrite.with_backend("auto", inner="eager")
    tensors = qkv()
    output = torch.compile(attend, backend=backend, fullgraph=True)(*tensors)
    assert relative(output, attend(*map(doubled, tensors))) < TOLERANCE[torch.float32]
    (site,) = backend.report.sites
    assert site.chosen == "native"
    assert "auto: no evidence" in str(backend.report)


CPU = Machine("cpu", None, TORCH)
CHANNELS = {"heads": 4, "q_len": 48, "dim": 196}
LEFT_ON_A_CPU = [
    ("channels of XCiT", CHANNELS, {}, True),
    ("as many channels as keys", CHANNELS | {"dim": 48}, {}, False),
    ("few channels", CHANNELS | {"q_len": 32}, {}, False),
    ("few queries", CHANNELS | {"q_len": 1, "kv_len": 48}, {}, False),
    ("many queries", CHANNELS | {"q_len": 1024, "kv_len": 48}, {}, False),
    ("many keys", CHANNELS | {"kv_len": 197}, {}, False),
    ("training", CHANNELS, {"needs_grad": True}, False),
    ("bfloat16", CHANNELS, {"dtype": "bfloat16"}, False),
    ("a call of SDPA", CHANNELS, {"written_as": "sdpa"}, False),
]


@pytest.mark.parametrize(("what", "sizes", "given", "left"), LEFT_ON_A_CPU, ids=[each[0] for each in LEFT_ON_A_CPU])
def test_wide_heads_in_operations_are_left_on_a_cpu(what, sizes, given, left):
    asked = replace(call(**sizes), **{"dtype": "float32", "device": "cpu", "written_as": "operations"} | given)
    _, site = preferred(asked, CPU)
    assert site.chosen == (None if left else "native")
    if left:
        ((_, refused),) = site.refusals
        assert "on a CPU the model's own products are faster" in refused.detail
    assert preferred(replace(asked, device="cuda"), BARE)[1].chosen == "native"
    policy = make_policy(["native"])
    assert attnrewrite.make_plan([asked], policy, [CPU]).sites[0].chosen == "native", "who names a kernel gets it"


def channels(x):
    """Each channel attends to all others (XCA), (batch, tokens, heads * channels) to the same."""
    query, key, value = x.unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 4, 1)
    weights = (F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT * 0.7).softmax(-1)
    return (weights @ value).permute(0, 3, 1, 2).flatten(2)


@pytest.mark.parametrize(("tokens", "chosen"), [(51, None), (27, "native")])
def test_channels_are_right_whether_left_or_not(tokens, chosen):
    backend = attnrewrite.with_backend("auto", inner="eager", strict=True)  # what "auto" prefers is no refusal
    x = torch.randn(2, tokens, 3 * 3 * 40)
    with torch.no_grad():
        output = torch.compile(channels, backend=backend, fullgraph=True)(x)
    assert relative(output, channels(x.double())) < TOLERANCE[torch.float32]
    assert [site.chosen for site in backend.report.sites] == [chosen]


def test_strict_takes_a_preference_for_a_choice_and_a_refusal_for_none():
    def read_too(x):
        query, key, value = x.unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 4, 1)
        weights = (query @ key.mT).softmax(-1)
        return weights @ value, weights

    x, strictly = torch.randn(2, 51, 3 * 3 * 40), attnrewrite.with_backend("auto", strict=True)
    with torch.no_grad():
        report = attnrewrite.explain(channels, x, backend=strictly)
        ((_, refused),) = report.sites[0].refusals
        assert (report.sites[0].chosen, refused.code) == (None, attnrewrite.Code.PREFERENCE)
        assert attnrewrite.Report.from_json(report.to_json()).sites[0].preferred
        with pytest.raises(attnrewrite.AttentionRefusedError, match="weights are used elsewhere"):
            attnrewrite.explain(read_too, x, backend=strictly)


def test_kernels_that_need_inductor_are_for_inductor():
    """Uncompiled, flex computes all scores in memory: `auto` passes it over where another compiler gets the graph."""
    window = call(**LONG, mask=WINDOW)
    for inner, chosen in (("inductor", "flex"), ("eager", "_native_varlen")):
        policy = make_policy(["auto"]).compiled_by(inner)
        assert attnrewrite.make_plan([window], policy, [BARE]).sites[0].chosen == chosen


def test_beside_other_choices_and_in_rules():
    policy = make_policy(["_native_cudnn", "auto"], {"cross": ["auto"], "late": "_native_math"})
    assert str(policy) == "_native_cudnn, auto; cross: auto; late: _native_math"
    names = [each.name for each in policy.candidates(call(), H200)]
    assert names == ["_native_cudnn", "_flash_3", "flash_4", "native"]
    names = [each.name for each in policy.candidates(call(role="cross"), H200)]
    assert names == ["_flash_3", "flash_4", "native"]
    assert make_policy(["auto"]) == make_policy(["auto"]) == Policy((Auto(rows=ROWS),))
    with pytest.raises(ValueError, match=r"no attention backend is called 'atuo'.* Or 'auto'"):
        make_policy(["atuo"])
    with pytest.raises(ValueError, match="names 'auto' twice"):
        make_policy(["auto", "auto"])


SMALL = Row(None, UNMASKED, (1, 256), (16, 63), 0, ("_native_math",), "a test", q_len=(1, None))


def lengths_through(backend, lengths):
    """Returns the kernel chosen for each length of one function with a symbolic length, and the number of graphs."""
    run = torch.compile(lambda *given: attend(*given), backend=backend, fullgraph=True, dynamic=True)
    taken = []
    for length in lengths:
        tensors = qkv(1, 2, None, length, length, 72, dtype=torch.bfloat16)
        assert relative(run(*tensors), attend(*map(doubled, tensors))) < TOLERANCE[torch.bfloat16]
        taken.append(backend.report.sites[-1].chosen)
    return taken, len(backend.report.graphs)


def test_sizes_that_are_asked_are_guards():
    backend = AttentionCompiler(Policy((Auto(rows=(SMALL,)),)), "eager")
    taken, graphs = lengths_through(backend, [8, 20, 100, 21, 9])
    assert taken[:3] == ["native", "_native_math", "native"]
    assert graphs == 3  # below, in and above the row: 21 and 9 find theirs


@pytest.mark.parametrize("machine", [None, BARE], ids=["cpu", "H200 without packages"])
def test_what_could_change_nothing_is_not_asked(machine):
    backend = AttentionCompiler(make_policy(["auto"]), "eager", machine)
    taken, graphs = lengths_through(backend, [40, 4100])  # at both sides of what the table asks where FA3 is installed
    assert set(taken) == {"native"}
    assert graphs == 1


def test_explains_for_a_machine_that_is_elsewhere():
    tensors = [torch.empty(1, 24, 4608, 128, dtype=torch.bfloat16, device="meta") for _ in range(3)]
    report = attnrewrite.explain(attend, *tensors, backend="auto", machine=H200)
    assert report.sites[0].chosen == "_flash_3"
    assert attnrewrite.Report.from_json(report.to_json()).sites[0].note == report.sites[0].note


def test_foreign_machines_differ_in_what_counts():
    assert foreign([H200], H200) is None
    assert foreign([H200], BARE) is None  # of other packages each site asks
    assert "torch 2.11.0, this is 2.12.0" in foreign([H200], replace(H200, packages={**TORCH, "torch": "2.12.0"}))
    assert "this is cpu" in foreign([H200], Machine("cpu"))
