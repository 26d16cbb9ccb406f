"""What each record takes and refuses, one change at a time; and what a decision asks about sizes."""

import json
from dataclasses import replace

import pytest
import torch
from decision_specs import (
    ACCEPTED,
    ADDITIVE,
    BOOLEAN,
    CALL,
    CHANGES,
    CPU,
    DIMS,
    HEADS,
    LENGTHS,
    LOWER,
    SPECS,
    UPPER,
    gpu,
)  # fmt: skip
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

import attnrewrite
from attnrewrite import (
    Accepted,
    AttentionCall,
    AttentionRefusedError,
    Backend,
    Code,
    Machine,
    Mask,
    MaskKind,
    Numerics,
    Plan,
    Refused,
    Report,
    decide,
    make_plan,
    make_policy,
)
from attnrewrite.backends import RECORDS
from attnrewrite.kernels.decisions import decision_from_dict
from attnrewrite.reports.report import GraphReport


def key(record):
    """The name; for several records of one name also the device, or the package, that tells them apart."""
    if len(record.devices) > 1:
        return record.name
    text = f"{record.name} on {min(record.devices)}"
    packages = {tuple(other.requires) for other in RECORDS if other.name == record.name} - {()}
    if len([other for other in RECORDS if (other.name, other.devices) == (record.name, record.devices)]) > 1:
        ((package, specifier),) = record.requires.items()
        text += f" ({package})" if len(packages) > 1 else f" ({package}{specifier})"
    return text


def limit(record, change=None):
    """The limit of numerics for a decision: that of the change, if it has one, else the class of the record."""
    return change.numerics if change and change.numerics is not None else max(Numerics.REORDERED, record.numerics)


def accepted_by(record, **fields):
    """A call that the record accepts, with other values in some fields."""
    return replace(CALL, **SPECS[key(record)].call | fields)


def decision_of(record, change):
    call, machine = accepted_by(record, **change.call), change.machine or SPECS[key(record)].machine
    return decide(record, replace(call, device=machine.device), machine, limit(record, change))


each_record = pytest.mark.parametrize("record", RECORDS, ids=key)


def test_every_record_is_specified():
    assert {key(record) for record in RECORDS} == set(SPECS)
    assert all(set(spec.refused) <= set(CHANGES) for spec in SPECS.values())


def test_every_code_is_met():
    met = {refusal[0] for spec in SPECS.values() for refusal in spec.refused.values() if refusal}
    elsewhere = {
        Code.UNBACKED,
        Code.BROKEN,
        Code.UNTRUSTED,
        Code.PREFERENCE,
    }  # where libraries are loaded, and "auto" chooses
    assert met == set(Code) - elsewhere


@each_record
def test_one_change_gives_one_code(record):
    wrong = {name: said for name in CHANGES if (said := wrong_about(record, name)) is not None}
    assert wrong == {}


def wrong_about(record, change):
    """None if the decision on a changed call is the one in the table, with both values in its detail; else the decision."""
    decision = decision_of(record, CHANGES[change])
    expected = SPECS[key(record)].refused.get(change, ACCEPTED)
    if expected == ACCEPTED:
        return None if isinstance(decision, Accepted) else decision
    code, *values = expected
    right = (
        isinstance(decision, Refused)
        and decision.code is code
        and all(value in decision.detail for value in values)
        and decision.fix.strip() != ""
        and str(decision) == f"{code.value}: {decision.detail}. {decision.fix}"
    )
    return None if right else (decision, expected)


@each_record
def test_packages(record):
    """Each package that a record requires: not there, and too old."""
    machine = SPECS[key(record)].machine
    for package, specifier in record.requires.items():
        without = {name: version for name, version in machine.packages.items() if name != package}
        for version, code in ((None, Code.MISSING), ("0.0.1", Code.VERSION)):
            packages = without | ({package: version} if version else {})
            here, described = (
                decide(record, accepted_by(record), replace(machine, packages=packages, here=here), limit(record))
                for here in (True, False)
            )
            for refused in (here, described):
                assert refused.code is code
                assert f"{package}{specifier}" in refused.detail
            assert (version or "not installed") in here.detail
            assert here.fix == record.install.get(package, f'pip install "{package}{specifier}"')
            assert (version or "not among the packages of the machine") in described.detail
            assert described.fix.startswith("Add the version to the packages of the machine")


def test_what_pip_does_not_have_says_how_to_get_it():
    """PyPI has no flash-attn-3, no cudnn, no SpargeAttn, and only 1.x of sageattention."""
    for record in RECORDS:
        for package, specifier in record.requires.items():
            known = package in {"flash-attn-3", "cudnn", "spas-sage-attn"} or (
                package == "sageattention" and "<2" not in specifier
            )
            assert (package in record.install) == known, record


TOY = Backend(
    "toy",
    "tests",
    None,
    frozenset({"cpu"}),
    frozenset({"bfloat16"}),
    masks=frozenset({MaskKind.NONE, LOWER}),
)


def test_causal_alignments():
    """A kernel of one alignment takes calls of the other where q_len == kv_len, and only there."""
    for has, other in ((UPPER, LOWER), (LOWER, UPPER)):
        record = replace(TOY, masks=frozenset({MaskKind.NONE, has}))
        for asked, kv_len, code in (
            (has, 64, None),
            (has, 96, None),
            (has, 32, None),
            (other, 64, None),
            (other, 96, Code.CAUSAL),
            (other, 32, Code.CAUSAL),
        ):
            decision = decide(record, replace(CALL, mask=Mask(asked), kv_len=kv_len), CPU)
            assert getattr(decision, "code", None) is code, (has, asked, kv_len)
    both = replace(TOY, masks=frozenset({MaskKind.NONE, UPPER, LOWER}))
    neither = replace(TOY, masks=frozenset({MaskKind.NONE}))
    for asked in (UPPER, LOWER):
        call = replace(CALL, mask=Mask(asked), kv_len=96)
        assert decide(both, call, CPU) == Accepted()
        refused = decide(neither, call, CPU)
        assert (refused.code, asked.value in refused.detail) == (Code.MASK, True)


@pytest.mark.parametrize("kind", [UPPER, LOWER])
@pytest.mark.parametrize("name", ["_native_math", "_native_flash on cpu", "flex on cpu"])
def test_a_causal_call_that_is_accepted_is_computed_so(name, kind):
    (record,) = (record for record in RECORDS if key(record) == name)
    query, key_, value = (torch.randn(2, 3, 5, 8) for _ in range(3))
    call = AttentionCall("site", 2, 3, 3, 5, 5, 8, 8, dtype="float32", mask=Mask(kind))
    assert decide(record, call, CPU) == Accepted()
    prepared = record.prepare(None, key_, call)
    output = record.op(query, key_, value, prepared, call=call)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key_, value, is_causal=True)
    torch.testing.assert_close(output, expected)


# -- questions about sizes


def symbol(env, name, hint):
    made = env.create_symbol(hint, ConstantSource(name), dynamic_dim=DimDynamic.DYNAMIC)
    return env.create_symintnode(made, hint=hint)


def symbolic(call, **hints):
    """The call with every size a symbol of its own, and the environment that records what is asked about them."""
    env = ShapeEnv()
    sizes = ("batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim", "value_dim")
    return replace(call, **{name: symbol(env, name, hints.get(name, getattr(call, name))) for name in sizes}), env


WRONG_SIZES = {"heads": 9, "kv_heads": 3, "q_len": 7, "kv_len": 11, "head_dim": 1000, "value_dim": 999}
STATIC = (Code.MISSING, Code.VERSION, Code.DEVICE, Code.CAPABILITY, Code.NUMERICS, Code.CONTEXT, Code.DETERMINISTIC,
          Code.CAPTURE, Code.DTYPE, Code.DROPOUT, Code.GRAD, Code.MASK)  # fmt: skip


@each_record
def test_static_facts_come_before_sizes(record):
    """A call that is wrong in a static fact and in every size is refused for the fact, and no size is asked about."""
    wrong = symbolic(CALL, **WRONG_SIZES)
    for name, expected in SPECS[key(record)].refused.items():
        if expected and expected[0] in STATIC and (record.name, name) not in STATIC_CHECKS:
            decision, guards = with_wrong_sizes(record, name, *wrong)
            assert (decision.code, guards) == (expected[0], []), name


STATIC_CHECKS = {("_native_cudnn", "dropout of 0.1")}


@pytest.mark.parametrize(("name", "change"), sorted(STATIC_CHECKS))
def test_static_facts_come_before_sizes_in_checks(name, change):
    """What a check of the record can say without a size, it says before any size is asked about."""
    (record,) = (record for record in RECORDS if record.name == name)
    decision, guards = with_wrong_sizes(record, change, *symbolic(CALL, **WRONG_SIZES))
    assert (decision.code, guards) == (SPECS[key(record)].refused[change][0], [])


def with_wrong_sizes(record, name, wrong, env):
    """The decision on a changed call whose sizes are all symbols and all wrong, and the guards that it made."""
    change = CHANGES[name]
    facts = {field: value for field, value in change.call.items() if field not in (*LENGTHS, *DIMS, *HEADS)}
    assert "batch" not in facts
    machine = change.machine or SPECS[key(record)].machine
    return decide(record, replace(wrong, **facts), machine, limit(record, change)), env.guards


@pytest.mark.parametrize("name", ["_native_flash", "_native_varlen"])
def test_exported_programs_that_an_older_torch_cannot_save(name, monkeypatch):
    record = next(each for each in RECORDS if each.name == name and "cuda" in each.devices)
    for version, taken in (("2.11.0+cu130", False), ("2.13.0", True)):
        monkeypatch.setattr(torch, "__version__", version)
        for exported in (False, True):
            decision = decide(record, replace(CALL, exported=exported), gpu(9, 0))
            assert isinstance(decision, Accepted) == (taken or not exported)
            assert isinstance(decision, Accepted) or decision.code is Code.VERSION


@each_record
def test_questions_of_an_accepted_call(record):
    call, env = symbolic(accepted_by(record))
    assert isinstance(decide(record, call, SPECS[key(record)].machine, limit(record)), Accepted)
    assert len(env.guards) == SPECS[key(record)].questions, env.guards


def test_the_first_refusal_is_the_last_question():
    (record,) = (record for record in RECORDS if key(record) == "_native_flash on cuda")
    call, env = symbolic(replace(CALL, mask=Mask(UPPER)), head_dim=264, value_dim=264, kv_len=96)
    dims_ = {str(call.head_dim), str(call.value_dim)}
    decision = decide(record, call, gpu(9, 0))
    assert (decision.code, len(env.guards)) == (Code.HEAD_DIM, 2)  # value_dim == head_dim, head_dim > 256
    assert {str(name) for guard in env.guards for name in guard.expr.free_symbols} <= dims_


@each_record
def test_known_sizes_leave_no_guard(record):
    call, env = symbolic(accepted_by(record))
    call = accepted_by(record, batch=call.batch)  # batch >= 1 is known of any symbol
    assert isinstance(decide(record, call, SPECS[key(record)].machine, limit(record)), Accepted)
    asks = {"flex on cuda": 1, "_native_folded on cuda": 2}  # which number of sequences divides the batch
    assert len(env.guards) == asks.get(key(record), record.max_batch is not None)


@each_record
@pytest.mark.parametrize("size", [*LENGTHS, *DIMS, *HEADS])
def test_unbacked_sizes(record, size):
    """A size that depends on data is never guessed. A record that has to ask about it refuses, and names the question."""
    spec = SPECS[key(record)]
    env = ShapeEnv()
    unknown = env.create_unbacked_symint()
    decision = decide(record, accepted_by(record, **{size: unknown}), spec.machine, limit(record))
    if size not in spec.not_unbacked:
        assert isinstance(decision, Accepted)
        return
    assert decision.code is Code.UNBACKED
    assert str(unknown) in decision.detail
    assert "torch._check" in decision.fix
    assert env.guards == []


@each_record
@pytest.mark.parametrize("size", LENGTHS)
def test_unbacked_sizes_with_a_bound(record, size):
    """The fix that the refusal names."""
    env = ShapeEnv()
    unknown = env.create_unbacked_symint()
    if record.name == "_native_folded":
        pytest.skip("takes short sequences, and PyTorch does not see that a multiple of 128 is even")
    if record.numerics is Numerics.SPARSE:
        pytest.skip("takes as many queries as keys: no bound of one of them says that")
    torch._check(unknown >= 64)  # SageAttention's kernel with float16 values
    torch._check(unknown % 64 == 0)  # SageAttention 1.x
    torch._check(unknown % 128 == 0)  # _native_xla
    torch._check(unknown <= 512)
    call = accepted_by(record, **{size: unknown})
    assert isinstance(decide(record, call, SPECS[key(record)].machine, limit(record)), Accepted)


@each_record
def test_unbacked_heads_with_a_bound(record):
    """One key head for a number of heads that data decides: refused with UNBACKED or taken, never an error."""
    env = ShapeEnv()
    heads = env.create_unbacked_symint()
    torch._check(heads >= 2)
    torch._check(heads <= 512)
    decision = decide(record, accepted_by(record, heads=heads, kv_heads=1), SPECS[key(record)].machine, limit(record))
    expected = {
        "_native_efficient on cuda": Code.GQA,
        "_native_folded on cuda": Code.GQA,
        "sage_blackwell_hub on cuda": Code.GQA,
        "sol on cuda": Code.GQA,
        "sol_topk on cuda": Code.GQA,
        "sparge on cuda": Code.GQA,
        "sparge_topk on cuda": Code.GQA,
        "_native_xla on tpu": Code.GQA,
        "flex on cuda": Code.UNBACKED,
        "_native_npu on npu": Code.UNBACKED,
    }.get(key(record))
    assert getattr(decision, "code", None) is expected, decision


@pytest.mark.parametrize("name", ["flex on cpu"])
def test_mask_tensors_and_symbolic_lengths(name):
    """Whether a length is a symbol is known without a guard."""
    (record,) = (record for record in RECORDS if key(record) == name)
    for mask in (Mask(BOOLEAN, "bool", (1, 1, 64, 64)), Mask(ADDITIVE, "bfloat16", (64, 64))):
        call, env = symbolic(replace(CALL, mask=mask))
        decision = decide(record, call, CPU)
        assert (decision.code, env.guards) == (Code.MASK, [])
        assert str(call.q_len) in decision.detail
        assert str(call.kv_len) in decision.detail
    assert decide(record, symbolic(replace(CALL, mask=Mask(UPPER)))[0], CPU) == Accepted()


# -- plans, and round trips through JSON


def through_json(value):
    return json.loads(json.dumps(value))


CALLS = {
    "plain": CALL,
    "everything": replace(
        CALL,
        mask=Mask(ADDITIVE, "float32", (2, 1, 64, 64), needs_grad=True),
        scale=0.125,
        dropout=0.1,
        needs_grad=True,
        layout="strided",
        role="cross",
        deterministic=True,
        obstacle="it has a \u201creason\u201d",
    ),
    "causal": replace(CALL, mask=Mask(LOWER), scale=0.0, q_len=0),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_through_json(name):
    call = CALLS[name]
    again = AttentionCall.from_dict(through_json(call.to_dict()))
    assert again == call
    assert again.mask.kind is call.mask.kind


def test_symbolic_calls_through_json():
    """A symbol is kept as its text, with the value it had."""
    call, _ = symbolic(replace(CALL, mask=Mask(BOOLEAN, "bool", (1, 1, 64, 64))))
    call = replace(
        call, mask=replace(call.mask, shape=(call.batch, 1, call.q_len, ShapeEnv().create_unbacked_symint()))
    )
    described = call.described()
    assert described.q_len == f"{call.q_len} (64)"
    assert described.mask.shape == (described.batch, 1, described.q_len, "u0")
    assert described.described() == described
    assert AttentionCall.from_dict(through_json(call.to_dict())) == described
    assert AttentionCall.from_dict(through_json(described.to_dict())) == described


@pytest.mark.parametrize("machine", [CPU, gpu(9, 0), Machine("mps"), replace(gpu(12, 1), name="a GPU")], ids=str)
def test_machines_through_json(machine):
    assert Machine.from_dict(through_json(machine.to_dict())) == machine


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (("cuda",), ValueError, r"needs capability=\(major, minor\)"),
        (("gpu",), ValueError, "device is 'gpu': give a device type of PyTorch"),
        (("cuda:0", (9, 0)), ValueError, "device is 'cuda:0'"),
        ((torch.device("cpu"),), ValueError, r"device is device\(type='cpu'\)"),
        (("cuda", "9.0"), TypeError, r"capability is '9.0' \(str\): give \(major, minor\), as \(9, 0\)"),
        (("cuda", 9.0), TypeError, r"capability is 9.0 \(float\)"),
        (("cuda", [9, 0]), TypeError, r"capability is \[9, 0\] \(list\)"),
        (("cuda", (9,)), TypeError, r"capability is \(9,\)"),
        (
            ("cpu", None, {"torch": 2.13}),
            TypeError,
            "packages is {'torch': 2.13}: give the version of each package as text",
        ),
        (("cpu", None, ["torch"]), TypeError, r"packages is \['torch'\]"),
    ],
)
def test_a_machine_that_is_none(given, error, said):
    with pytest.raises(error, match=said):
        Machine(*given)


@pytest.mark.parametrize(
    ("machine", "error", "said"),
    [
        ("h200", TypeError, r"machine is 'h200' \(str\): describe it, as attnrewrite\.Machine\("),
        ({"device": "cuda", "capability": (9, 0)}, TypeError, r"machine is {.*} \(dict\): describe it"),
        (Machine("cpu", packages={"torch": "latest"}), ValueError, r"packages\['torch'\] = 'latest': give a version"),
    ],
)
def test_every_way_to_plan_for_a_machine_refuses_what_is_none(machine, error, said, tmp_path):
    model, given = torch.nn.Linear(3, 4), torch.zeros(2, 3)
    program = torch.export.export(model, (given,))
    file = tmp_path / "no.pt2"
    for call in (
        lambda: attnrewrite.explain(model, given, backend="native", machine=machine),
        lambda: attnrewrite.export(model, (given,), backend="native", machine=machine),
        lambda: attnrewrite.rewrite(program, "native", machine=machine),
        lambda: attnrewrite.retarget(file, file, "native", machine=machine),
        lambda: attnrewrite.explain_file(file, machine=machine),
    ):
        with pytest.raises(error, match=said):
            call()


@each_record
def test_decisions_through_json(record):
    for change in CHANGES.values():
        decision = decision_of(record, change)
        again = decision_from_dict(through_json(decision.to_dict()))
        assert again == decision
        assert type(getattr(again, "code", None)) is type(getattr(decision, "code", None))


def a_plan(*calls, **arguments):
    policy = make_policy(["_native_flash", "flex", "_native_math"], **arguments)
    return make_plan(calls, policy, [CPU] * len(calls))


def test_a_plan_takes_the_first_that_accepts():
    wide = replace(CALL, value_dim=128)
    lossy = replace(wide, dropout=0.1)
    hopeless = replace(CALL, dtype="int8")
    plan = a_plan(CALL, wide, lossy, hopeless)
    assert [site.chosen for site in plan.sites] == ["_native_flash", "flex", "_native_math", None]
    assert [len(site.decisions) for site in plan.sites] == [1, 2, 3, 3]
    assert [len(site.refusals) for site in plan.sites] == [0, 1, 2, 3]
    assert plan.sites[1].refusals[0][1].code is Code.VALUE_DIM
    assert [refused.code for _, refused in plan.sites[2].refusals] == [Code.DROPOUT, Code.DROPOUT]
    assert plan.swapped == 3


def test_rules_of_a_plan():
    cross = replace(CALL, site="blocks.0.attn2", role="cross")
    other = replace(CALL, site="head.attn")
    plan = a_plan(CALL, cross, other, rules={"cross": "_native_math", "head.*": ["flex", "native"]})
    assert [(site.chosen, site.rule) for site in plan.sites] == [
        ("_native_flash", None),
        ("_native_math", "cross"),
        ("flex", "head.*"),
    ]


def test_rules_by_mask():
    """The rule "masked" means a mask tensor that the kernel reads: not a dropped mask, not a causal one."""
    kinds = (MaskKind.NONE, MaskKind.CAUSAL_UPPER_LEFT, MaskKind.KEY_PADDING, MaskKind.ADDITIVE)
    calls = [replace(CALL, mask=Mask(kind, "bfloat16", (2, 1, 1, 64))) for kind in kinds]
    for rule, expected in (("masked", [None, None, "masked", "masked"]), ("unmasked", ["unmasked"] * 2 + [None] * 2)):
        assert [site.rule for site in a_plan(*calls, rules={rule: "_native_math"}).sites] == expected


def test_a_strict_plan_names_sites_and_reasons():
    hopeless = replace(CALL, site="the.site", dtype="int8")
    with pytest.raises(AttentionRefusedError, match="1 of 2 attention sites") as caught:
        a_plan(CALL, hopeless, strict=True)
    for word in ("the.site", "_native_flash", "flex", "_native_math", "DTYPE", "int8"):
        assert word in str(caught.value)
    assert "blocks.0.attn" not in str(caught.value)


def test_a_device_that_no_record_of_a_name_is_for():
    """The refusal says where the name runs, not that it is unknown."""
    plan = make_plan([replace(CALL, device="mps")], make_policy(["_native_flash"]), [Machine("mps")])
    assert plan.sites[0].refusals[0][1].code is Code.DEVICE


def test_plans_and_reports_through_json():
    symbolic_call, _ = symbolic(replace(CALL, site="blocks.1.attn", mask=Mask(BOOLEAN, "bool", (1, 64))))
    plan = a_plan(*CALLS.values(), replace(CALL, dtype="int8"), symbolic_call, rules={"*.1.*": "flex"}).described()
    report = Report("a policy; with rules", [], ["nothing.*"])
    report.add(GraphReport("0/0", plan, CPU, 0.25, 2))
    report.add(GraphReport("0/1", Plan(), None, 0.125, 0))
    report.add(GraphReport("1/0", a_plan(CALL).described(), gpu(9, 0), 0.5, 0))
    again = Report.from_json(report.to_json())
    assert again == report
    assert again.to_json() == report.to_json()
    assert str(again) == str(report)
    assert (again.swapped, again.seconds, len(again.sites)) == (report.swapped, 0.875, len(plan.sites) + 1)
    assert again.sites[-2].rule == "*.1.*"
    assert all(site.backend is None for site in report.sites)


def test_the_report_of_a_compilation_through_json():
    from parity import attend, compiled, qkv

    run, backend = compiled(attend, "flex", dynamic=True)
    run(*qkv(), torch.rand(2, 1, 1, 11) > 0.4)
    # On torch before 2.13 flex takes no boolean mask on a CPU at all.
    assert backend.report.sites[0].refusals[0][1].code in (Code.MASK, Code.VERSION)
    assert Report.from_json(backend.report.to_json()) == backend.report


def test_a_graph_compiled_again_replaces_itself():
    """The graphs of the last attempt at a compilation all stay; those of earlier attempts are removed."""
    report = Report()
    for attempt, seconds in ((0, 1.0), (1, 2.0), (1, 4.0)):
        report.add(GraphReport("0/0", a_plan(CALL), CPU, seconds, 0), attempt)
    assert [graph.seconds for graph in report.graphs] == [2.0, 4.0]


@pytest.mark.parametrize("text", ["[]", "{}", '{"version": 2}'])
def test_what_is_no_report(text):
    with pytest.raises(ValueError, match="not an attnrewrite report of version 1"):
        Report.from_json(text)


def test_an_empty_report():
    assert Report.from_json(Report().to_json()) == Report()
    assert "no graph was compiled" in str(Report("flex"))


def test_words_are_no_flags_and_no_machines():
    """In a configuration "no" would count as True."""
    (native,) = attnrewrite.records_of("native")
    call = AttentionCall("site", 1, 2, 2, 7, 9, 16, 16, "float32", "cpu")
    policy = attnrewrite.make_policy(["native"])
    for wrong, said in (
        (lambda: replace(native, gqa="no"), r"gqa is 'no' \(str\): give True or False"),
        (lambda: replace(native, empty=1), r"empty is 1 \(int\): give True or False"),
        (lambda: attnrewrite.HeadDim(pad="no"), r"pad is 'no' \(str\): give True or False"),
        (lambda: Machine("cpu", here="no"), r"here is 'no' \(str\): give True or False"),
        (lambda: Machine("cpu", name=3), r"name is 3 \(int\): give the device's name as text, or none"),
        (
            lambda: attnrewrite.decide(native, call, "h200"),
            r"machine is 'h200' \(str\): describe it, as attnrewrite.Machine",
        ),
        (lambda: attnrewrite.make_plan([call], policy, ["h200"]), r"machine is 'h200' \(str\): describe it"),
        (lambda: attnrewrite.make_plan([], policy, ["h200"]), r"machine is 'h200' \(str\): describe it"),
    ):
        with pytest.raises(TypeError, match=said):
            wrong()
    assert attnrewrite.machine_of("cpu") == attnrewrite.machine_of(torch.device("cpu"))
