"""What each record takes and refuses, one change at a time; and what a decision asks about sizes."""

import json
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

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
    decisions,
    make_plan,
    make_policy,
)
from attnrewrite.backends import RECORDS
from attnrewrite.reports import GraphReport

CALL = AttentionCall("blocks.0.attn", 2, 8, 8, 64, 64, 64, 64, dtype="bfloat16")
CPU = Machine("cpu", packages={"torch": "2.13.0"})


def gpu(*capability, cudnn="9.19.0", torch="2.13.0"):
    packages = {"torch": torch} | ({"cudnn": cudnn} if cudnn else {})
    return Machine("cuda", capability, packages)


@dataclass(frozen=True)
class Change:
    """What is different from the baseline: fields of the call, another machine, the limit of numerics."""

    call: dict = field(default_factory=dict)
    machine: Machine | None = None
    numerics: Numerics = Numerics.REORDERED


def masked(kind, dtype=None, needs_grad=False, **call):
    shape = (2, 1, 64, 64) if dtype else ()
    return Change({"mask": Mask(kind, dtype, shape, needs_grad), **call})


def dims(head_dim, machine=None, **call):
    return Change({"head_dim": head_dim, "value_dim": head_dim, **call}, machine)


UPPER, LOWER = MaskKind.CAUSAL_UPPER_LEFT, MaskKind.CAUSAL_LOWER_RIGHT
BOOLEAN, ADDITIVE = MaskKind.BOOLEAN, MaskKind.ADDITIVE

CAPABILITIES = {"sm_37": (3, 7), "sm_75": (7, 5), "sm_80": (8, 0), "sm_89": (8, 9), "sm_100": (10, 0), "sm_121": (12, 1),
                "sm_122": (12, 2), "sm_130": (13, 0)}  # fmt: skip
DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64", "float8_e4m3fn", "int8")

CHANGES = {
    "nothing": Change(),
    "on cpu": Change(machine=CPU),
    "on cuda": Change(machine=gpu(9, 0)),
    "on mps": Change(machine=Machine("mps")),
    "on vulkan": Change(machine=Machine("vulkan")),
    **{name: Change(machine=gpu(*capability)) for name, capability in CAPABILITIES.items()},
    "without cudnn": Change(machine=gpu(9, 0, cudnn=None)),
    "cudnn 8.9.7": Change(machine=gpu(9, 0, cudnn="8.9.7")),
    "exact": Change(numerics=Numerics.EXACT),
    "quantised": Change(numerics=Numerics.QUANTISED),
    "obstacle": Change({"obstacle": "its tensors are nested"}),
    "deterministic": Change({"deterministic": True}),
    **{dtype: Change({"dtype": dtype}) for dtype in DTYPES},
    "dropout": Change({"dropout": 0.25}),
    "dropout of 0.1": Change({"dropout": 0.1}),
    "gradient": Change({"needs_grad": True}),
    "causal": masked(UPPER),
    "causal, more keys": masked(UPPER, kv_len=96),
    "causal, fewer keys": masked(UPPER, kv_len=32),
    "lower-right": masked(LOWER),
    "lower-right, more keys": masked(LOWER, kv_len=96),
    "boolean": masked(BOOLEAN, "bool"),
    "additive": masked(ADDITIVE, "bfloat16"),
    "additive in float16": masked(ADDITIVE, "float16"),
    "additive in float32": masked(ADDITIVE, "float32"),
    "additive in float64": masked(ADDITIVE, "float64"),
    "additive in int64": masked(ADDITIVE, "int64"),
    "learned bias": masked(ADDITIVE, "bfloat16", needs_grad=True),
    "wider values": Change({"value_dim": 128}),
    "narrower values": Change({"value_dim": 32}),
    "values of 8": Change({"value_dim": 8}),
    "values of 264": Change({"value_dim": 264}),
    "4 key heads": Change({"kv_heads": 4}),
    "1 key head": Change({"kv_heads": 1}),
    "3 heads a key head": Change({"heads": 12, "kv_heads": 4}),
    **{f"dim {dim}": dims(dim) for dim in (1, 7, 8, 15, 16, 40, 128, 136, 256, 257, 512)},
    "dim 136 on sm_80": dims(136, gpu(8, 0)),
    "dim 136 on sm_100": dims(136, gpu(10, 0)),
    "dim 136 on sm_120": dims(136, gpu(12, 0)),
    "dim 256 on torch 2.11": dims(256, gpu(9, 0, torch="2.11.0")),
    "dim 257 on torch 2.11": dims(257, gpu(9, 0, torch="2.11.0")),
    "dim 136 on torch 2.11 with a gradient": dims(136, gpu(9, 0, torch="2.11.0"), needs_grad=True),
    "dim 256 on cudnn 9.23": dims(256, gpu(10, 0, cudnn="9.23.0")),
    "dim 256 on sm_120 with cudnn 9.23": dims(256, gpu(12, 0, cudnn="9.23.0")),
    "dim 136 with a gradient": dims(136, needs_grad=True),
    "dim 192 with a gradient on sm_89": dims(192, gpu(8, 9), needs_grad=True),
    "dim 200 with a gradient on sm_89": dims(200, gpu(8, 9), needs_grad=True),
    "dim 256 with a gradient on sm_89": dims(256, gpu(8, 9), needs_grad=True),
    "dim 256 with a gradient and dropout on sm_89": dims(256, gpu(8, 9), needs_grad=True, dropout=0.25),
    "batch 0": Change({"batch": 0}),
    "q_len 0": Change({"q_len": 0}),
    "kv_len 0": Change({"kv_len": 0}),
    "q_len 1": Change({"q_len": 1}),
    "kv_len 1": Change({"kv_len": 1}),
}


# -- what is refused, with the code and with both values of its detail; every other change is accepted


ACCEPTED = ()


def dtypes(taken, *refused):
    return {dtype: (Code.DTYPE, taken, dtype) for dtype in refused}


ON_GPU = [name for name, change in CHANGES.items() if change.machine and change.machine.device == "cuda"]
NOT_CUDA = {f"on {device}": (Code.DEVICE, "cuda", device) for device in ("cpu", "mps", "vulkan")}
NOT_CPU = {
    **dict.fromkeys(ON_GPU, (Code.DEVICE, "runs on cpu", "on cuda")),
    **{f"on {device}": (Code.DEVICE, "cpu", device) for device in ("mps", "vulkan")},
}
AMPERE_ON = {
    name: (Code.CAPABILITY, "8.0 to 12.1", word)
    for name, word in {"sm_37": "3.7", "sm_75": "7.5", "sm_122": "12.2", "sm_130": "13.0"}.items()
}
SWAPPED = {  # for every kernel that is not the call itself
    "exact": (Code.NUMERICS, "reordered", "exact"),
    "obstacle": (Code.CONTEXT, "its tensors are nested"),
}
EMPTY = {f"{size} 0": (Code.LENGTH, f"{size} of at least 1", "this is 0") for size in ("batch", "q_len", "kv_len")}
NOT_REAL = ("complex64", "float8_e4m3fn", "int8")
NO_DROPOUT = {
    "dropout": (Code.DROPOUT, "no dropout", "p=0.25"),
    "dropout of 0.1": (Code.DROPOUT, "no dropout", "p=0.1"),
}
NO_LEARNED_BIAS = {"learned bias": (Code.GRAD, "no gradient to the mask", "needs one")}
UPPER_LEFT_ONLY = {
    "lower-right, more keys": (Code.CAUSAL, "causal upper-left", "lower-right", "q_len is 64", "kv_len 96")
}


def mask_dtypes(*refused):
    return {f"additive in {dtype}": (Code.MASK, "in bfloat16", f"is {dtype}") for dtype in refused}


@dataclass(frozen=True)
class Spec:
    """The record's own machine; what it refuses; how many questions an accepted call asks where every size is a symbol
    of its own; and which sizes must be no data."""

    machine: Machine
    refused: dict
    questions: int
    not_unbacked: tuple = ()


LENGTHS = ("batch", "q_len", "kv_len")
DIMS = ("head_dim", "value_dim")
HEADS = ("heads", "kv_heads")

SPECS = {
    "native": Spec(
        CPU,
        {
            "on vulkan": (Code.DEVICE, "cpu or cuda", "vulkan"),
            **dtypes("bfloat16", "int8"),
            **mask_dtypes("int64"),
        },
        questions=0,
    ),
    "_native_math": Spec(
        CPU,
        {
            **SWAPPED,
            "on vulkan": (Code.DEVICE, "cpu or cuda", "vulkan"),
            **dtypes("bfloat16, float16, float32, float64", *NOT_REAL),
            **mask_dtypes("float16", "float32", "float64", "int64"),
            **UPPER_LEFT_ONLY,
        },
        questions=0,
    ),
    "_native_flash on cpu": Spec(
        CPU,
        {
            **SWAPPED,
            **NOT_CPU,
            **EMPTY,
            **NO_DROPOUT,
            **NO_LEARNED_BIAS,
            **UPPER_LEFT_ONLY,
            **dtypes("bfloat16, float16, float32, float64", *NOT_REAL),
            **mask_dtypes("float16", "float64", "int64"),
            "wider values": (Code.VALUE_DIM, "value_dim is 128", "head_dim 64"),
            "narrower values": (Code.VALUE_DIM, "value_dim is 32", "head_dim 64"),
            "values of 8": (Code.VALUE_DIM, "value_dim is 8", "head_dim 64"),
            "values of 264": (Code.VALUE_DIM, "value_dim is 264", "head_dim 64"),
        },
        questions=1,  # value_dim == head_dim
        not_unbacked=(*DIMS, *LENGTHS),
    ),
    "_native_flash on cuda": Spec(
        gpu(9, 0),
        {
            **SWAPPED,
            **NOT_CUDA,
            **AMPERE_ON,
            **EMPTY,
            **NO_LEARNED_BIAS,
            **dtypes("bfloat16, float16", "float32", "float64", *NOT_REAL),
            "causal, more keys": (Code.CAUSAL, "causal lower-right", "upper-left", "q_len is 64", "kv_len 96"),
            "causal, fewer keys": (Code.CAUSAL, "causal lower-right", "upper-left", "q_len is 64", "kv_len 32"),
            "boolean": (Code.MASK, "takes causal lower-right", "boolean (2, 1, 64, 64)"),
            "additive": (Code.MASK, "takes causal lower-right", "additive (2, 1, 64, 64)"),
            "additive in float16": (Code.MASK, "takes causal lower-right", "additive"),
            "additive in float32": (Code.MASK, "takes causal lower-right", "additive"),
            "additive in float64": (Code.MASK, "takes causal lower-right", "additive"),
            "additive in int64": (Code.MASK, "takes causal lower-right", "additive"),
            "wider values": (Code.VALUE_DIM, "value_dim is 128", "head_dim 64"),
            "narrower values": (Code.VALUE_DIM, "value_dim is 32", "head_dim 64"),
            "values of 8": (Code.VALUE_DIM, "value_dim is 8", "head_dim 64"),
            "values of 264": (Code.VALUE_DIM, "value_dim is 264", "head_dim 64"),
            "dim 257": (Code.HEAD_DIM, "up to 256", "this is 257"),
            "dim 257 on torch 2.11": (Code.HEAD_DIM, "up to 256", "this is 257"),
            "dim 512": (Code.HEAD_DIM, "up to 256", "this is 512"),
            "dim 200 with a gradient on sm_89": (Code.HEAD_DIM, "up to 192", "this is 200"),
            "dim 256 with a gradient and dropout on sm_89": (Code.HEAD_DIM, "up to 192", "this is 256"),
        },
        questions=2,  # value_dim == head_dim, head_dim <= 256
        not_unbacked=(*DIMS, *LENGTHS),
    ),
    "_native_efficient on cuda": Spec(
        gpu(9, 0),
        {
            **SWAPPED,
            **NOT_CUDA,
            **AMPERE_ON,
            **EMPTY,
            **UPPER_LEFT_ONLY,
            **dtypes("bfloat16, float16, float32", "float64", *NOT_REAL),
            **mask_dtypes("float16", "float32", "float64", "int64"),
            "4 key heads": (Code.GQA, "there are 4", "and 8"),
            "1 key head": (Code.GQA, "there are 1", "and 8"),
            "3 heads a key head": (Code.GQA, "there are 4", "and 12"),
        },
        questions=1,  # heads == kv_heads
        not_unbacked=(*HEADS, *LENGTHS),
    ),
    "_native_cudnn on cuda": Spec(
        gpu(9, 0),
        {
            **SWAPPED,
            **NOT_CUDA,
            **AMPERE_ON,
            **EMPTY,
            **NO_LEARNED_BIAS,
            **UPPER_LEFT_ONLY,
            "without cudnn": (Code.MISSING, "cudnn>=9.0", "not installed"),
            "cudnn 8.9.7": (Code.VERSION, "cudnn>=9.0", "8.9.7"),
            "deterministic": (Code.DETERMINISTIC, "_native_cudnn is not", "use_deterministic_algorithms(True)"),
            **dtypes("bfloat16, float16", "float32", "float64", *NOT_REAL),
            "dropout of 0.1": (Code.DROPOUT, "1/16", "p=0.1"),
            **mask_dtypes("float16", "float32", "float64", "int64"),
            "values of 264": (Code.HEAD_DIM, "value_dim up to 128", "this is 264"),
            **{
                name: (Code.HEAD_DIM, "head_dim up to 128", f"this is {name.split()[1]}")
                for name, change in CHANGES.items()
                if name.startswith("dim ") and change.call["head_dim"] > 128
            },
            "dim 257 on torch 2.11": (Code.HEAD_DIM, "head_dim up to 256", "this is 257"),
            "kv_len 1": (Code.LENGTH, "at least 2", "this is 1"),
            **dict.fromkeys(("dim 256 on torch 2.11", "dim 256 on cudnn 9.23"), ACCEPTED),
        },
        questions=2,  # head_dim <= 128, value_dim <= 128; symbols are never 0 or 1
        not_unbacked=(*DIMS, *LENGTHS),
    ),
    "flex on cuda": Spec(
        gpu(9, 0),
        {
            **SWAPPED,
            **NOT_CUDA,
            **AMPERE_ON,
            **EMPTY,
            **NO_DROPOUT,
            **NO_LEARNED_BIAS,
            **UPPER_LEFT_ONLY,
            "dim 256 with a gradient and dropout on sm_89": (Code.DROPOUT, "no dropout", "p=0.25"),
            **dtypes("bfloat16, float16, float32", "float64", *NOT_REAL),
            **mask_dtypes("float64", "int64"),
            "values of 8": (Code.HEAD_DIM, "value_dim from 16", "this is 8"),
            "dim 1": (Code.HEAD_DIM, "head_dim from 16", "this is 1"),
            "dim 7": (Code.HEAD_DIM, "head_dim from 16", "this is 7"),
            "dim 8": (Code.HEAD_DIM, "head_dim from 16", "this is 8"),
            "dim 15": (Code.HEAD_DIM, "head_dim from 16", "this is 15"),
            "3 heads a key head": (Code.GQA, "power of two", "12 share 4"),
        },
        questions=3,  # head_dim >= 16, value_dim >= 16, heads == kv_heads
        not_unbacked=(*DIMS, *HEADS, *LENGTHS),
    ),
    "flex on cpu": Spec(
        CPU,
        {
            **SWAPPED,
            **NOT_CPU,
            **EMPTY,
            **NO_DROPOUT,
            **NO_LEARNED_BIAS,
            **UPPER_LEFT_ONLY,
            **dtypes("bfloat16, float16, float32", "float64", *NOT_REAL),
            **mask_dtypes("float64", "int64"),
            "gradient": (Code.GRAD, "no backward on cpu", "needs a gradient"),
            "dim 136 with a gradient": (Code.GRAD, "no backward on cpu", "needs a gradient"),
        },
        questions=0,
        not_unbacked=LENGTHS,
    ),
}


def key(record):
    return record.name if len(record.devices) > 1 else f"{record.name} on {min(record.devices)}"


def decision_of(record, change):
    call, machine = replace(CALL, **change.call), change.machine or SPECS[key(record)].machine
    return decide(record, replace(call, device=machine.device), machine, change.numerics)


each_record = pytest.mark.parametrize("record", RECORDS, ids=key)


def test_every_record_is_specified():
    assert {key(record) for record in RECORDS} == set(SPECS)
    assert all(set(spec.refused) <= set(CHANGES) for spec in SPECS.values())


def test_every_code_is_met():
    met = {refusal[0] for spec in SPECS.values() for refusal in spec.refused.values() if refusal}
    assert met == set(Code) - {Code.UNBACKED}


@each_record
@pytest.mark.parametrize("change", CHANGES)
def test_one_change_gives_one_code(record, change):
    decision = decision_of(record, CHANGES[change])
    expected = SPECS[key(record)].refused.get(change, ACCEPTED)
    if expected == ACCEPTED:
        assert decision == Accepted()
        return
    code, *values = expected
    assert isinstance(decision, Refused)
    assert decision.code is code, decision
    assert [value for value in values if value not in decision.detail] == [], decision
    assert decision.fix.strip()
    assert str(decision) == f"{code.value}: {decision.detail}. {decision.fix}"


@each_record
def test_packages(record):
    """Each package that a record requires: not there, and too old."""
    machine = SPECS[key(record)].machine
    for package, specifier in record.requires.items():
        without = {name: version for name, version in machine.packages.items() if name != package}
        for version, code in ((None, Code.MISSING), ("0.0.1", Code.VERSION)):
            packages = without | ({package: version} if version else {})
            refused = decide(record, CALL, replace(machine, packages=packages))
            assert refused.code is code
            assert f"{package}{specifier}" in refused.detail
            assert (version or "not installed") in refused.detail
            assert refused.fix == f'pip install "{package}{specifier}"'


TOY = Backend(
    "toy",
    "tests",
    None,
    frozenset({"cpu"}),
    frozenset({"bfloat16"}),
    masks=frozenset({MaskKind.NONE, LOWER}),
)


def test_causal_alignments():
    """Either alignment does for the other where there are as many keys as queries, and only there."""
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
          Code.DTYPE, Code.DROPOUT, Code.GRAD, Code.MASK)  # fmt: skip


@each_record
def test_static_facts_come_before_sizes(record):
    """A call that is wrong in a static fact and in every size is refused for the fact, and no size is asked about."""
    for name, expected in SPECS[key(record)].refused.items():
        if expected and expected[0] in STATIC and (record.name, name) not in STATIC_CHECKS:
            decision, guards = with_wrong_sizes(record, name)
            assert (decision.code, guards) == (expected[0], []), name


STATIC_CHECKS = {("_native_cudnn", "dropout of 0.1")}


@pytest.mark.parametrize(("name", "change"), sorted(STATIC_CHECKS))
def test_static_facts_come_before_sizes_in_checks(name, change):
    """What a check of the record can say without a size, it says before any size is asked about."""
    (record,) = (record for record in RECORDS if record.name == name)
    decision, guards = with_wrong_sizes(record, change)
    assert (decision.code, guards) == (SPECS[key(record)].refused[change][0], [])


def with_wrong_sizes(record, name):
    """The decision on a changed call whose sizes are all symbols and all wrong, and the guards that it made."""
    change = CHANGES[name]
    facts = {field: value for field, value in change.call.items() if field not in (*LENGTHS, *DIMS, *HEADS)}
    call, env = symbolic(replace(CALL, **facts), **WRONG_SIZES)
    return decide(record, call, change.machine or SPECS[key(record)].machine, change.numerics), env.guards


@each_record
def test_questions_of_an_accepted_call(record):
    call, env = symbolic(CALL)
    assert decide(record, call, SPECS[key(record)].machine) == Accepted()
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
    call, env = symbolic(CALL)
    call = replace(CALL, batch=call.batch)  # batch >= 1 is known of any symbol
    assert decide(record, call, SPECS[key(record)].machine) == Accepted()
    assert env.guards == []


@each_record
@pytest.mark.parametrize("size", [*LENGTHS, *DIMS, *HEADS])
def test_unbacked_sizes(record, size):
    """What data decides is never guessed: refused where the record would have to ask, with the question."""
    spec = SPECS[key(record)]
    env = ShapeEnv()
    unknown = env.create_unbacked_symint()
    decision = decide(record, replace(CALL, **{size: unknown}), spec.machine)
    if size not in spec.not_unbacked:
        assert decision == Accepted()
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
    torch._check(unknown >= 2)
    call = replace(CALL, **{size: unknown})
    assert decide(record, call, SPECS[key(record)].machine) == Accepted()


@each_record
def test_unbacked_heads_with_a_bound(record):
    """One key head for a number of heads that data decides: refused with UNBACKED or taken, never an error."""
    env = ShapeEnv()
    heads = env.create_unbacked_symint()
    torch._check(heads >= 2)
    decision = decide(record, replace(CALL, heads=heads, kv_heads=1), SPECS[key(record)].machine)
    expected = {"_native_efficient on cuda": Code.GQA, "flex on cuda": Code.UNBACKED}.get(key(record))
    assert getattr(decision, "code", None) is expected, decision


@pytest.mark.parametrize("name", ["flex on cpu"])
def test_mask_tensors_and_symbolic_lengths(name):
    """Static by nature: whether a length is a symbol is asked without a guard."""
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
    again = AttentionCall.from_json(through_json(call.to_json()))
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
    assert AttentionCall.from_json(through_json(call.to_json())) == described
    assert AttentionCall.from_json(through_json(described.to_json())) == described


@pytest.mark.parametrize("machine", [CPU, gpu(9, 0), Machine("mps"), replace(gpu(12, 1), name="a GPU")], ids=str)
def test_machines_through_json(machine):
    assert Machine.from_json(through_json(machine.to_json())) == machine


def test_a_cuda_machine_has_a_capability():
    with pytest.raises(ValueError, match="capability"):
        Machine("cuda")


@each_record
def test_decisions_through_json(record):
    for change in CHANGES.values():
        decision = decision_of(record, change)
        again = decisions.from_json(through_json(decisions.to_json(decision)))
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
    assert backend.report.sites[0].refusals[0][1].code is Code.MASK
    assert Report.from_json(backend.report.to_json()) == backend.report


def test_a_graph_compiled_again_replaces_itself():
    """The graphs of one try at a compilation all stay; those of the try before go."""
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
