"""The table behind test_decisions.py: a call, the ways to change it, and what each record refuses."""

from dataclasses import dataclass, field

from attnrewrite import AttentionCall, Code, Machine, Mask, MaskKind, Numerics

CALL = AttentionCall("blocks.0.attn", 2, 8, 8, 64, 64, 64, 64, dtype="bfloat16")
CPU = Machine("cpu", packages={"torch": "2.13.0"})


PACKAGES = {"flash-attn": "2.8.3", "flash-attn-3": "3.0.0", "fa3-fwd": "0.0.3", "flash-attn-4": "4.0.0b36",
            "sageattention": "2.2.0", "xformers": "0.0.35", "kernels": "0.17.2", "torch-npu": "2.9.0",
            "torch-xla": "2.9.0", "jax": "0.7.1", "comfy-kitchen": "0.2.40",
            "spas-sage-attn": "0.1.0"}  # fmt: skip


def gpu(*capability, cudnn="9.19.0", torch="2.13.0", **others):
    packages = {"torch": torch} | PACKAGES | ({"cudnn": cudnn} if cudnn else {}) | others
    return Machine("cuda", capability, packages)


@dataclass(frozen=True)
class Change:
    """A change of the baseline call."""

    call: dict = field(default_factory=dict)  # fields of the call with other values
    machine: Machine | None = None  # None: the record's
    numerics: Numerics | None = None  # the limit of numerics; None: the record's


def masked(kind, dtype=None, needs_grad=False, **call):
    shape = (2, 1, 64, 64) if dtype else ()
    return Change({"mask": Mask(kind, dtype, shape, needs_grad), **call})


def dims(head_dim, machine=None, **call):
    return Change({"head_dim": head_dim, "value_dim": head_dim, **call}, machine)


UPPER, LOWER = MaskKind.CAUSAL_UPPER_LEFT, MaskKind.CAUSAL_LOWER_RIGHT
BOOLEAN, ADDITIVE = MaskKind.BOOLEAN, MaskKind.ADDITIVE

CAPABILITIES = {"sm_37": (3, 7), "sm_75": (7, 5), "sm_80": (8, 0), "sm_87": (8, 7), "sm_89": (8, 9), "sm_100": (10, 0),
                "sm_103": (10, 3),
                "sm_121": (12, 1), "sm_122": (12, 2), "sm_130": (13, 0)}  # fmt: skip
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
    "on rocm": Change(machine=Machine("rocm", packages=PACKAGES)),
    "on npu": Change(machine=Machine("npu", packages=PACKAGES)),
    "on xla": Change(machine=Machine("xla", packages=PACKAGES)),
    "on tpu": Change(machine=Machine("tpu", packages=PACKAGES)),
    "exact": Change(numerics=Numerics.EXACT),
    "reordered": Change(numerics=Numerics.REORDERED),
    "quantised": Change(numerics=Numerics.QUANTISED),
    "obstacle": Change({"obstacle": "its tensors are nested"}),
    "deterministic": Change({"deterministic": True}),
    "captured": Change({"in_cuda_graph": True}),
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
    "key padding": Change({"mask": Mask(MaskKind.KEY_PADDING, "bool", (2, 1, 1, 64))}),
    "additive": masked(ADDITIVE, "bfloat16"),
    "additive in float16": masked(ADDITIVE, "float16"),
    "additive in float32": masked(ADDITIVE, "float32"),
    "additive in float64": masked(ADDITIVE, "float64"),
    "additive in int64": masked(ADDITIVE, "int64"),
    "learned bias": masked(ADDITIVE, "bfloat16", needs_grad=True),
    "window": Change({"mask": Mask(MaskKind.SLIDING_WINDOW, "bool", (64, 64), window=(10, 0))}),
    "wider values": Change({"value_dim": 128}),
    "192 and 128": Change({"head_dim": 192, "value_dim": 128}),
    "192 and 128 with a gradient": Change({"head_dim": 192, "value_dim": 128, "needs_grad": True}),
    "192 and 128 on sm_80": Change({"head_dim": 192, "value_dim": 128}, gpu(8, 0)),
    "192 and 128 on sm_100": Change({"head_dim": 192, "value_dim": 128}, gpu(10, 0)),
    "64 and 128 with a gradient": Change({"value_dim": 128, "needs_grad": True}),
    "narrower values": Change({"value_dim": 32}),
    "values of 8": Change({"value_dim": 8}),
    "values of 264": Change({"value_dim": 264}),
    "4 key heads": Change({"kv_heads": 4}),
    "1 key head": Change({"kv_heads": 1}),
    "3 heads a key head": Change({"heads": 12, "kv_heads": 4}),
    **{f"dim {dim}": dims(dim) for dim in (1, 7, 8, 15, 16, 40, 128, 136, 256, 257, 512)},
    "dim 136 on sm_80": dims(136, gpu(8, 0)),
    "dim 136 on sm_100": dims(136, gpu(10, 0)),
    "dim 136 on sm_110": dims(136, gpu(11, 0)),
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
    "dim 160 in float32": dims(160, dtype="float32"),
    "dim 256 in float32": dims(256, dtype="float32"),
    "batch 0": Change({"batch": 0}),
    "batch 65,535": Change({"batch": 65_535}),
    "batch 65,536": Change({"batch": 65_536}),
    "batch 65,536 with a gradient": Change({"batch": 65_536, "needs_grad": True}),
    "batch 65,536 with dropout": Change({"batch": 65_536, "dropout": 0.25}),
    "65,536 heads": Change({"heads": 65_536, "kv_heads": 65_536}),
    "q_len 0": Change({"q_len": 0}),
    "kv_len 0": Change({"kv_len": 0}),
    "q_len 1": Change({"q_len": 1}),
    "kv_len 1": Change({"kv_len": 1}),
    "kv_len 77": Change({"kv_len": 77}),
    "scale 0.3": Change({"scale": 0.3}),
    "scale 0": Change({"scale": 0.0}),
    "scale -0.3": Change({"scale": -0.3}),
    "scale of its own": Change({"scale": 64**-0.5}),
    "257 heads": Change({"heads": 257, "kv_heads": 257}),
    "deterministic, with a gradient": Change({"deterministic": True, "needs_grad": True}),
    "4 key heads and a gradient": Change({"kv_heads": 4, "needs_grad": True}),
    "4 key heads and a mask": masked(BOOLEAN, "bool", kv_heads=4),
}


# -- what is refused, with the code and with both values of its detail; every other change is accepted


ACCEPTED = ()
SCALE = {f"scale {scale}": (Code.SCALE, "a scale above 0", f"this is {scale}") for scale in ("0", "-0.3")}
LARGE = {
    **dict.fromkeys(
        ("batch 65,536", "batch 65,536 with a gradient", "batch 65,536 with dropout"),
        (Code.BATCH, "batch up to 65,535", "this is 65536"),
    ),
    "65,536 heads": (Code.BATCH, "heads up to 65,535", "this is 65536"),
}
OTHER_VALUES = {
    "wider values": (Code.VALUE_DIM, "value_dim is 128", "head_dim 64"),
    "64 and 128 with a gradient": (Code.VALUE_DIM, "value_dim is 128", "head_dim 64"),
    "narrower values": (Code.VALUE_DIM, "value_dim is 32", "head_dim 64"),
    "values of 8": (Code.VALUE_DIM, "value_dim is 8", "head_dim 64"),
    "values of 264": (Code.VALUE_DIM, "value_dim is 264", "head_dim 64"),
    **dict.fromkeys(
        ("192 and 128", "192 and 128 with a gradient", "192 and 128 on sm_80", "192 and 128 on sm_100"),
        (Code.VALUE_DIM, "value_dim is 128", "head_dim 192"),
    ),
}
NO_FLOAT32 = ("dim 160 in float32", "dim 256 in float32")


def dtypes(taken, *refused):
    found = {dtype: (Code.DTYPE, taken, dtype) for dtype in refused}
    return found | (dict.fromkeys(NO_FLOAT32, found["float32"]) if "float32" in found else {})


ON_GPU = [name for name, change in CHANGES.items() if change.machine and change.machine.device == "cuda"]
NOT_CUDA = {
    f"on {device}": (Code.DEVICE, "cuda", device) for device in ("cpu", "mps", "vulkan", "rocm", "npu", "xla", "tpu")
}
NOT_CPU = {
    **dict.fromkeys(ON_GPU, (Code.DEVICE, "runs on cpu", "on cuda")),
    **{f"on {device}": (Code.DEVICE, "cpu", device) for device in ("mps", "vulkan", "rocm", "npu", "xla", "tpu")},
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
NO_GQA = {
    **dict.fromkeys(("4 key heads", "4 key heads and a gradient"), (Code.GQA, "are 4", "and 8")),
    "1 key head": (Code.GQA, "there are 1", "and 8"),
    "3 heads a key head": (Code.GQA, "there are 4", "and 12"),
}
NO_LEARNED_BIAS = {"learned bias": (Code.GRAD, "no gradient to the mask", "needs one")}
UPPER_LEFT_ONLY = {
    "lower-right, more keys": (Code.CAUSAL, "causal upper-left", "lower-right", "q_len is 64", "kv_len 96")
}


def mask_dtypes(*refused):
    return {f"additive in {dtype}": (Code.MASK, "in bfloat16", f"is {dtype}") for dtype in refused}


@dataclass(frozen=True)
class Spec:
    """What a record is expected to refuse and to ask."""

    machine: Machine  # a machine that the record runs on
    refused: dict  # name of a change -> (code, words of the detail)
    questions: int  # how many an accepted call asks about sizes, if every size is a symbol of its own
    not_unbacked: tuple = ()  # sizes that must not depend on data
    call: dict = field(default_factory=dict)  # what an accepted call has otherwise than CALL


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
            **OTHER_VALUES,
            **NOT_CPU,
            "batch 65,536 with dropout": (Code.DROPOUT, "no dropout", "p=0.25"),
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
            "4 key heads and a mask": (Code.MASK, "takes causal lower-right", "boolean (2, 1, 64, 64)"),
            "key padding": (Code.MASK, "takes causal lower-right", "key padding (2, 64)"),
            "additive": (Code.MASK, "takes causal lower-right", "additive (2, 1, 64, 64)"),
            "additive in float16": (Code.MASK, "takes causal lower-right", "additive"),
            "additive in float32": (Code.MASK, "takes causal lower-right", "additive"),
            "additive in float64": (Code.MASK, "takes causal lower-right", "additive"),
            "additive in int64": (Code.MASK, "takes causal lower-right", "additive"),
            **OTHER_VALUES,
            **SCALE,
            **LARGE,
            "window": (Code.MASK, "takes causal lower-right", "sliding window (10, 0)"),
            "dim 257": (Code.HEAD_DIM, "up to 256", "this is 257"),
            "dim 257 on torch 2.11": (Code.HEAD_DIM, "up to 256", "this is 257"),
            "dim 512": (Code.HEAD_DIM, "up to 256", "this is 512"),
            "dim 200 with a gradient on sm_89": (Code.HEAD_DIM, "up to 192", "this is 200"),
            "dim 256 with a gradient and dropout on sm_89": (Code.HEAD_DIM, "up to 192", "this is 256"),
        },
        questions=5,  # value_dim == head_dim, head_dim <= 256, head_dim % 8, heads and batch <= 65,535
        not_unbacked=(*DIMS, *HEADS[:1], *LENGTHS),
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
            **NO_GQA,
            "4 key heads and a mask": (Code.GQA, "are 4", "and 8"),
            "batch 65,536 with dropout": (Code.BATCH, "batches up to 65,535", "this is 65536"),
        },
        questions=3,  # heads == kv_heads, head_dim % 8, value_dim % 8
        not_unbacked=(*DIMS, *HEADS, *LENGTHS),
    ),
    "_native_folded on cuda": Spec(
        gpu(9, 0),
        {
            **SWAPPED,
            **NOT_CUDA,
            **AMPERE_ON,
            **EMPTY,
            **dtypes("bfloat16, float16, float32", "float64", *NOT_REAL),
            **NO_DROPOUT,
            **NO_GQA,
            "4 key heads and a mask": (Code.MASK, "causal lower-right", "boolean"),
            **{name: (Code.MASK, "causal lower-right", name) for name in ("boolean", "key padding")},
            **{name: (Code.MASK, "causal lower-right", "additive") for name in CHANGES if name.startswith("additive")},
            **NO_LEARNED_BIAS,
            "window": (Code.MASK, "causal lower-right", "sliding window (10, 0)"),
            "batch 65,535": (Code.BATCH, "an even batch", "this is 65535"),
            **dict.fromkeys(
                ("batch 65,536 with dropout", "dim 256 with a gradient and dropout on sm_89"),
                (Code.DROPOUT, "no dropout", "p=0.25"),
            ),
            **{f"{name}, more keys": (Code.LENGTH, "up to 32", "this is 96") for name in ("causal", "lower-right")},
            "kv_len 77": (Code.LENGTH, "kv_len up to 32", "this is 77"),
        },
        questions=12,  # those of _native_efficient, q_len and kv_len <= 32, batch % 2, and the same for folds of 32, 16, 8, 4
        not_unbacked=(*DIMS, *HEADS, *LENGTHS),
        call={"batch": 4, "q_len": 16, "kv_len": 16},
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
            "without cudnn": (Code.MISSING, "cudnn>=9.0", "not among the packages"),
            "cudnn 8.9.7": (Code.VERSION, "cudnn>=9.0", "8.9.7"),
            **dict.fromkeys(
                ("deterministic", "deterministic, with a gradient"),
                (Code.DETERMINISTIC, "_native_cudnn is not", "use_deterministic_algorithms(True)"),
            ),
            **dtypes("bfloat16, float16", "float32", "float64", *NOT_REAL),
            "dropout of 0.1": (Code.DROPOUT, "1/16", "p=0.1"),
            **mask_dtypes("float16", "float32", "float64", "int64"),
            "values of 264": (Code.HEAD_DIM, "value_dim up to 128", "this is 264"),
            **SCALE,
            "batch 65,536 with a gradient": (Code.BATCH, "batches up to 65,535", "this is 65536"),
            **{
                name: (Code.HEAD_DIM, "head_dim up to 128", f"this is {change.call['head_dim']}")
                for name, change in CHANGES.items()
                if change.call.get("head_dim", 0) > 128 and name not in NO_FLOAT32
            },
            "dim 257 on torch 2.11": (Code.HEAD_DIM, "head_dim up to 256", "this is 257"),
            "kv_len 1": (Code.LENGTH, "at least 2", "this is 1"),
            **dict.fromkeys(("dim 256 on torch 2.11", "dim 256 on cudnn 9.23"), ACCEPTED),
        },
        questions=4,  # head_dim and value_dim: <= 128, % 8; symbols are never 0 or 1
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
            "3 heads a key head": (Code.GQA, "power of two", "12 query heads and 4 key heads"),
            **dict.fromkeys(
                ("batch 65,535", "batch 65,536", "batch 65,536 with a gradient", "65,536 heads"),
                (Code.BATCH, "batch * heads up to 65,535", "here are"),
            ),
            "batch 65,536 with dropout": (Code.DROPOUT, "no dropout", "p=0.25"),
            "values of 264": (Code.HEAD_DIM, "value_dim up to 256", "this is 264"),
            "dim 160 in float32": (Code.HEAD_DIM, "up to 128, or 256", "this is 160"),
            **{
                dim: (Code.HEAD_DIM, "head_dim up to 256", "this is")
                for dim in ("dim 257", "dim 512", "dim 257 on torch 2.11")
            },
        },
        questions=6,  # head_dim and value_dim: <= 256, >= 16; heads == kv_heads; batch * heads <= 65,535
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
            **{
                name: (Code.GRAD, "no backward on cpu", "needs a gradient")
                for name, change in CHANGES.items()
                if change.call.get("needs_grad") and not change.machine and not change.call.get("dropout")
            },
            "batch 65,536 with dropout": (Code.DROPOUT, "no dropout", "p=0.25"),
        },
        questions=0,
        not_unbacked=LENGTHS,
    ),
}


# -- kernels of other packages: what each takes, in a line; what it refuses follows from that


def capability(change):
    return change.machine.capability if change.machine and change.machine.device == "cuda" else None


def outside(first, last):
    """The changes to a GPU with a compute capability outside of `first` to `last`."""
    text = f"{first[0]}.{first[1]} to {last[0]}.{last[1]}"
    return {
        name: (Code.CAPABILITY, text, f"this is {capability(change)[0]}.{capability(change)[1]}")
        for name, change in CHANGES.items()
        if capability(change) and not first <= capability(change) <= last
    }


def changes(**wanted):
    """The names of the changes of all these fields whose new values pass the given tests. wanted: field -> test."""
    return [
        name
        for name, change in CHANGES.items()
        if all(field in change.call and test(change.call[field]) for field, test in wanted.items())
    ]


def with_mask(*kinds, **wanted):
    return changes(mask=lambda mask: mask.kind in kinds, **wanted)


SQUARE_ONLY = ("causal, more keys", "causal, fewer keys", "lower-right, more keys")


def half_precision(
    machine, *, first, last, names="bfloat16, float16", widest=256, multiple=8, pad=True, backward=False, causal="",
    square=False, padding=False, masks=False, boolean=False, gqa=True, value_dim=False, values=None, window=False, large=True,
    quantised=False, capturable=True, more=None, asks=(), gaps=None,
):  # fmt: skip
    """The spec of a CUDA kernel without dropout. causal: the kernel's alignment; calls with the other one are refused."""
    refused = {}
    for dim in changes(head_dim=lambda dim: widest is not None and dim > widest):
        refused[dim] = (Code.HEAD_DIM, f"head_dim up to {widest}", f"this is {CHANGES[dim].call['head_dim']}")
    if not pad:
        for dim in changes(head_dim=lambda dim: dim <= widest and dim % multiple):
            refused[dim] = (Code.HEAD_DIM, f"multiples of {multiple}", f"this is {CHANGES[dim].call['head_dim']}")
    if not gqa:
        for name in changes(kv_heads=lambda heads: heads <= 8):
            refused[name] = (Code.GQA, f"there are {CHANGES[name].call['kv_heads']}")
    refused |= {} if value_dim else OTHER_VALUES if values is None else values
    refused |= LARGE if large else {}
    if not window:
        refused["window"] = (Code.MASK, "sliding window (10, 0)")
    if causal:
        where = SQUARE_ONLY if square else [n for n in SQUARE_ONLY if ("lower" in n) != ("lower" in causal)]
        refused |= {name: (Code.CAUSAL, "q_len", f"{CHANGES[name].call['kv_len']}") for name in where}
    if not masks:
        for name in with_mask(ADDITIVE) if boolean else with_mask(BOOLEAN, ADDITIVE):
            refused[name] = (Code.MASK, CHANGES[name].call["mask"].kind.value)
        if not padding:
            refused["key padding"] = (Code.MASK, "key padding (2, 64)")
    else:
        refused |= mask_dtypes("float16", "float32", "float64", "int64")
    refused |= NO_LEARNED_BIAS
    if not backward:
        refused |= dict.fromkeys(changes(needs_grad=bool), (Code.GRAD, "no backward", "needs a gradient"))
    refused |= dict.fromkeys(changes(dropout=bool), (Code.DROPOUT, "no dropout", "p=0."))
    refused |= SCALE | dtypes(names, *(set(DTYPES) - set(names.split(", "))))
    refused |= EMPTY | (more or {})
    if first:
        refused |= (gaps or {}) | outside(first, last)
    refused |= SWAPPED | NOT_CUDA
    if quantised:
        refused |= {
            "exact": (Code.NUMERICS, "quantised", "exact"),
            "reordered": (Code.NUMERICS, "quantised", "reordered"),
        }
    if not capturable:
        refused["captured"] = (Code.CAPTURE, "cannot be recorded in a CUDA graph", "this compilation records one")
    widths = 2 if value_dim else 1  # otherwise one symbol, once it is asked whether they are equal
    questions = (not value_dim) + (not gqa) + widths * ((widest is not None) + (multiple > 1)) + 2 * large
    questions += values is not None  # a check compares them, after the limit of both
    sizes = (*DIMS, *(HEADS[:large] if gqa else HEADS), *LENGTHS, *asks)
    return Spec(machine, refused, questions + len(asks), sizes)


H200 = gpu(9, 0)
LOWER_RIGHT, UPPER_LEFT = "lower-right", "upper-left"


def values(*right):
    """What a kernel refuses that takes another value_dim in the changes `right` only."""
    return {name: why for name, why in OTHER_VALUES.items() if name not in right}


FLASH_2 = {"first": (8, 0), "last": (12, 1), "backward": True, "causal": LOWER_RIGHT, "window": True}
WIDE_VALUES = {"values of 264": (Code.HEAD_DIM, "value_dim up to 256", "this is 264")}
OF_FLASH_3 = {"causal": LOWER_RIGHT, "large": False,
              "values": {"192 and 128 on sm_80": OTHER_VALUES["192 and 128"]} | WIDE_VALUES}  # fmt: skip
FLASH_3 = {"first": (8, 0), "last": (9, 0), "window": True, **OF_FLASH_3}
FLASH_3_PYPI = {"first": (9, 0), "last": (9, 0), "names": "bfloat16", **OF_FLASH_3}
FP8_VALUES = values("192 and 128", "192 and 128 on sm_80", "192 and 128 on sm_100") | WIDE_VALUES
ON_BLACKWELL = {"dim 136 on sm_100": (Code.HEAD_DIM, "up to 128", "this is 136"),
                "dim 136 on sm_110": (Code.HEAD_DIM, "up to 128", "this is 136"),
                "dim 256 on cudnn 9.23": (Code.HEAD_DIM, "up to 128", "this is 256")}  # fmt: skip
FLASH_4 = {"first": (9, 0), "last": (11, 0), "causal": LOWER_RIGHT, "window": True, "more": ON_BLACKWELL,
           "values": {name: OTHER_VALUES[name] for name in ("64 and 128 with a gradient",)} | WIDE_VALUES}  # fmt: skip
SAGE = {"widest": 128, "multiple": 64, "causal": UPPER_LEFT, "square": True, "quantised": True}
UNCAPTURED = SAGE | {"capturable": False}
NO_ARCHITECTURE = {
    name: (Code.CAPABILITY, "without", "this is " + ".".join(map(str, capability(change))))
    for name, change in CHANGES.items()
    if capability(change) in {(8, 7), (10, 0), (10, 3), (11, 0)}
}
BLOCKS = {"kv_len 1": (Code.LENGTH, "multiple of 64", "this is 1"), "kv_len 77": (Code.LENGTH, "of 64", "this is 77")}
BLOCKS |= {"causal, more keys": (Code.CAUSAL, "96"), "causal, fewer keys": (Code.CAUSAL, "32")}
OTHER_SAGE = dict.fromkeys(
    [name for name, change in CHANGES.items() if capability(change)], (Code.VERSION, "<2", "found 2.2.0")
)


def sage_1(**words):
    """The spec of a SageAttention 1.x kernel. Every machine among the changes has SageAttention 2.x."""
    spec = half_precision(gpu(9, 0, sageattention="1.0.6"), first=None, last=None, **SAGE, more=BLOCKS, **words)
    spec.refused.update(OTHER_SAGE)
    return Spec(spec.machine, spec.refused, spec.questions + 1, spec.not_unbacked)


def without_causal(masks=(), questions=0, **words):
    """The spec of a kernel of comfy-kitchen, which knows no causal mask. masks: the kinds that it takes as tensors."""
    spec = half_precision(H200, first=(8, 0), last=(12, 1), quantised=True, **words)
    for name in with_mask(*{UPPER, LOWER, MaskKind.KEY_PADDING, BOOLEAN, ADDITIVE} - set(masks)):
        spec.refused.setdefault(name, (Code.MASK, "has a mask", str(CHANGES[name].call["mask"].kind.value)))
    for name in with_mask(*masks):
        if spec.refused.get(name, ("",))[0] is Code.MASK:
            del spec.refused[name]
    return Spec(spec.machine, spec.refused, spec.questions + questions, spec.not_unbacked)


def sol_attn():
    spec = without_causal(questions=1, widest=128, multiple=128, gqa=False)
    for name in ("exact", "reordered", "quantised"):
        spec.refused[name] = (Code.NUMERICS, "is sparse", f"the limit is {name}")
    for name, size in (("q_len 1", "q_len is 1"), ("kv_len 1", "kv_len 1"), ("kv_len 77", "kv_len 77")):
        spec.refused[name] = (Code.LENGTH, "as many queries as keys", size)
    return spec


def sparge():
    """As Sol-Attn, for 128 tokens and more."""
    spec = half_precision(
        H200, first=(8, 0), last=(9, 0), quantised=True, widest=128, multiple=64, gqa=False, capturable=False, asks=("q_len",)
    )  # fmt: skip
    for name in with_mask(UPPER, LOWER):
        spec.refused.setdefault(name, (Code.MASK, "has a mask", "causal"))
    for name in ("exact", "reordered", "quantised"):
        spec.refused[name] = (Code.NUMERICS, "is sparse", f"the limit is {name}")
    for name, size in (("q_len 1", "q_len is 1"), ("kv_len 1", "kv_len 1"), ("kv_len 77", "kv_len 77")):
        spec.refused[name] = (Code.LENGTH, "128 tokens and more", size)
    return Spec(spec.machine, spec.refused, spec.questions + 1, spec.not_unbacked, {"q_len": 128, "kv_len": 128})


def elsewhere(device, machine, **words):
    """The spec of a kernel for another device than CUDA: it refuses every GPU of the changes."""
    spec = half_precision(machine, first=None, last=None, **words)
    for name, change in CHANGES.items():
        if change.machine is not None:
            spec.refused[name] = (Code.DEVICE, f"runs on {device}", change.machine.device)
    spec.refused[f"on {device}"] = ACCEPTED
    return spec


SPECS |= {
    "_native_varlen on cuda": Spec(
        H200,
        {
            **{
                name: why
                for name, why in SPECS["_native_flash on cuda"].refused.items()
                if name not in ("key padding", "window")
            },
            **NO_DROPOUT,
            "batch 65,536 with dropout": (Code.DROPOUT, "no dropout", "p=0.25"),
            "dim 256 with a gradient and dropout on sm_89": (Code.DROPOUT, "no dropout", "p=0.25"),
        },
        questions=5,
        not_unbacked=(*DIMS, *HEADS[:1], *LENGTHS),
    ),
    "flash on cuda": half_precision(H200, **FLASH_2),
    "flash_hub on cuda": half_precision(H200, **FLASH_2),
    "flash_varlen on cuda": half_precision(H200, **FLASH_2, padding=True),
    "flash_varlen_hub on cuda": half_precision(H200, **FLASH_2, padding=True),
    "_flash_3 on cuda (flash-attn-3)": half_precision(H200, **FLASH_3, padding=True),
    "_flash_3 on cuda (fa3-fwd)": half_precision(H200, **FLASH_3_PYPI, padding=True),
    "_flash_3_hub on cuda": half_precision(H200, **FLASH_3, padding=True),
    "_flash_varlen_3 on cuda (flash-attn-3)": half_precision(H200, **FLASH_3, padding=True),
    "_flash_varlen_3 on cuda (fa3-fwd)": half_precision(H200, **FLASH_3_PYPI, padding=True),
    "_flash_3_varlen_hub on cuda": half_precision(H200, **FLASH_3, padding=True),
    "_flash_3_fp8 on cuda (flash-attn-3)": half_precision(
        H200, first=(9, 0), last=(9, 0), causal=LOWER_RIGHT, quantised=True, padding=True, large=False, values=FP8_VALUES
    ),
    "_flash_3_fp8 on cuda (fa3-fwd)": half_precision(
        H200, **FLASH_3_PYPI | {"values": FP8_VALUES}, quantised=True, padding=True
    ),
    "flash_4 on cuda": half_precision(H200, **FLASH_4, backward=True, padding=True, boolean=True),
    "flash_4_hub on cuda": half_precision(H200, **FLASH_4, padding=True),
    "sage on cuda (sageattention>=2.1.1)": half_precision(
        H200, first=(8, 0), last=(12, 1), **UNCAPTURED, gaps=NO_ARCHITECTURE
    ),
    "sage_hub on cuda": half_precision(H200, first=(8, 0), last=(12, 1), **UNCAPTURED, gaps=NO_ARCHITECTURE),
    "sage on cuda (sageattention>=1.0.6,<2)": sage_1(),
    "sage_blackwell_hub on cuda": half_precision(
        gpu(12, 0), first=(10, 0), last=(12, 1), **UNCAPTURED | {"pad": False}, gqa=False,
        more={"scale 0.3": (Code.SCALE, "1/sqrt(head_dim)", "this is 0.3")},
    ),
    "sage_varlen on cuda (sageattention>=2.1.1)": half_precision(
        H200, first=(8, 0), last=(9, 0), **UNCAPTURED, gaps=NO_ARCHITECTURE, padding=True
    ),
    "sage_varlen on cuda (sageattention>=1.0.6,<2)": sage_1(capturable=False),
    "_sage_qk_int8_pv_fp8_cuda on cuda": half_precision(H200, first=(8, 9), last=(12, 1), **UNCAPTURED, gaps=NO_ARCHITECTURE),
    "_sage_qk_int8_pv_fp8_cuda_sm90 on cuda": half_precision(
        H200, first=(9, 0), last=(9, 0), **UNCAPTURED, gaps=NO_ARCHITECTURE
    ),
    "_sage_qk_int8_pv_fp16_cuda on cuda": half_precision(
        H200, first=(8, 0), last=(9, 0), **UNCAPTURED, gaps=NO_ARCHITECTURE, asks=("kv_len",),
        more={"kv_len 1": (Code.LENGTH, "below 64 keys", "here are 1")},
    ),
    "_sage_qk_int8_pv_fp16_triton on cuda (sageattention>=2.1.1)": half_precision(
        H200, first=(8, 0), last=(9, 0), **SAGE, gaps=NO_ARCHITECTURE
    ),
    "_sage_qk_int8_pv_fp16_triton on cuda (sageattention>=1.0.6,<2)": sage_1(),
    "sol on cuda": sol_attn(),
    "sol_topk on cuda": sol_attn(),
    "sparge on cuda": sparge(),
    "sparge_topk on cuda": sparge(),
    "ck_int8 on cuda": without_causal((MaskKind.KEY_PADDING, BOOLEAN), multiple=64, window=True),
    "xformers on cuda": half_precision(
        H200, first=(8, 0), last=(9, 0), names="bfloat16, float16, float32", widest=None, backward=True,
        causal=UPPER_LEFT, masks=True, value_dim=True, window=True,
        more={"deterministic, with a gradient": (Code.DETERMINISTIC, "the backward of xformers", "algorithms(True)"),
              "4 key heads and a gradient": (Code.GQA, "without a gradient"),
              "4 key heads and a mask": (Code.GQA, "without a mask")},
    ),
    "aiter_fa2_hub on rocm": elsewhere(
        "rocm", Machine("rocm", packages=PACKAGES), names="bfloat16", causal=LOWER_RIGHT, large=False
    ),
    "_native_npu on npu": elsewhere(
        "npu", Machine("npu", packages=PACKAGES), large=False, window=True, widest=768, multiple=1, masks=True,
        causal=UPPER_LEFT, asks=("heads",), more={"257 heads": (Code.HEADS, "up to 256", "this is 257"),
        "65,536 heads": (Code.HEADS, "up to 256", "this is 65536")},
    ),
    "_native_xla on tpu": elsewhere(
        "tpu", Machine("tpu", packages=PACKAGES), large=False, window=True, names="bfloat16, float16, float32",
        widest=None, multiple=1, masks=True, gqa=False, causal=UPPER_LEFT, asks=("head_dim", "kv_len"),
        more=mask_dtypes("float64", "int64") | {"additive in float16": ACCEPTED, "additive in float32": ACCEPTED},
    ),
}  # fmt: skip
