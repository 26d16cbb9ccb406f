"""Random attention calls, each as the source of a function: what `bench/fuzz.py` compiles and prints."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

SELF = ("chunk", "unbind", "permute", "stack", "per_head", "split")  # query, key and value are parts of one tensor
MEMORY = ("bhsd", "bshd", "transposed", "sliced", "strided", "one_batch", "one_head")
MASKS = {  # name: (lines that make tensors, an expression for the mask)
    "none": ("", ""),
    "is_causal": ("", "torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device).tril()"),
    "causal": ("", "torch.arange(kv_len, device=query.device) <= torch.arange(q_len, device=query.device)[:, None]"),
    "lower_right": ("", "torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device).tril(kv_len - q_len)"),
    "window": (
        "",
        "(torch.arange(q_len, device=query.device)[:, None] - torch.arange(kv_len, device=query.device)).abs() < 4",
    ),
    "padding": ("valid = padding(BATCH, KV_LEN, LEAST)", "valid[:, None, None, :]"),
    "padding_expanded": (
        "valid = padding(BATCH, KV_LEN, LEAST)",
        "valid[:, None, None, :].expand(-1, HEADS, q_len, -1)",
    ),
    "padding_both": (
        "valid, valid_queries = padding(BATCH, KV_LEN, LEAST), padding(BATCH, Q_LEN, LEAST)",
        "valid_queries[:, None, :, None] & valid[:, None, None, :]",
    ),
    "causal_padding": (
        "valid = padding(BATCH, KV_LEN, LEAST)",
        "torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device).tril() & valid[:, None, None, :]",
    ),
    "documents": (
        "documents, of_queries = (torch.arange(n).expand(BATCH, n).to(DEVICE) // 5 for n in (KV_LEN, Q_LEN))",
        "of_queries[:, None, :, None] == documents[:, None, None, :]",
    ),
    "boolean": ("mask = torch.rand(SHAPE).to(DEVICE) < 0.6\nmask[..., 0] = LEAST > 0", "mask"),
    "rows_without_a_key": ("mask = torch.rand(SHAPE).to(DEVICE) < 0.6\nmask[..., -1, :] = False", "mask"),
    "additive": ("mask = torch.randn(SHAPE).to(DEVICE, DTYPE)", "mask"),
    "additive_float32": ("mask = torch.randn(SHAPE).to(DEVICE)", "mask"),
}
ADDITIVE = ("additive", "additive_float32")
# The last value of each: how a mask hides a score, and the number that stands for it. A boolean mask has none in SDPA.
HIDES = ("boolean", "where", "masked_fill", "times")
FILLS = ("-torch.inf", "torch.finfo(DTYPE).min", "-1e9", "-1e4")


@dataclass(frozen=True)
class Call:
    """One attention, and how it is written. The first value of each choice in `CHOICES` is the simplest."""

    seed: int = 0  # of the tensors
    dtype: str = "float32"
    batch: int = 2
    heads: int = 1
    kv_heads: int = 1
    q_len: int = 5
    kv_len: int = 7
    head_dim: int = 8
    value_dim: int | None = None  # None: as head_dim
    memory: str = "parts"  # "parts": each tensor by itself; "kv_chunk": key and value are parts of one; or one of SELF
    query_memory: str = "bhsd"
    key_memory: str = "bhsd"
    value_memory: str = "bhsd"
    inside: bool = False  # views are taken in the compiled function
    query_as: str = "{}"
    key_as: str = "{}"
    value_as: str = "{}"
    rank: int = 4
    written: str = "sdpa"
    groups: str = "enable_gqa"  # how several query heads share a key head
    scale: float | None = None
    scaled: str = "scores"  # the tensor that the scale multiplies
    softmax: str = "softmax"
    mask: str = "none"
    mask_shape: tuple[str, ...] = ("Q_LEN", "KV_LEN")
    least: int = 1  # the least number of keys that a padding leaves
    hides: str = "boolean"
    fill: str = "-torch.inf"
    after: str = "output"
    needs_grad: bool = False
    learned_mask: bool = False
    dynamic: bool = False


CHOICES: dict[str, tuple] = {
    "dtype": ("float32", "float64", "bfloat16", "float16"),
    "batch": (2, 1, 3),
    "heads": (1, 2, 3, 4, 6),
    "kv_heads": (1, 2, 3),
    "q_len": (5, 1, 3, 8, 12, 16, 33, 40, 130),
    "kv_len": (7, 1, 3, 8, 13, 16, 31, 40, 150),
    "head_dim": (8, 16, 4, 7, 32, 40, 64, 72),
    "value_dim": (*[None] * 9, 8, 16, 5, 24, 64),
    "memory": ("parts", "parts", "parts", "kv_chunk", *SELF),
    "query_memory": MEMORY[:5],
    "key_memory": MEMORY,
    "value_memory": MEMORY,
    "inside": (False, True),
    "query_as": ("{}", "{}", "{}", "{} * 2.0", "{}.sin()", "{}.contiguous()"),
    "key_as": ("{}", "{}", "{}", "{} + 0.5", "{}.clone()"),
    "value_as": ("{}", "{}", "{}", "{} * 0.5", "torch.cat([{}[..., 1:], {}[..., :1]], -1)"),
    "rank": (4, 4, 4, 3, 5),
    "written": ("sdpa", "sdpa", "matmul", "einsum", "bmm", "baddbmm"),
    "groups": ("enable_gqa", "repeat_interleave", "expand"),
    "scale": (None, 0.3, 1.0, 0.0, -0.2),
    "scaled": ("scores", "query", "key", "both", "divided"),
    "softmax": ("softmax", "softmax", "functional", "functional", "float32", "stable", "exp"),
    "mask": tuple(MASKS),
    "mask_shape": (
        ("Q_LEN", "KV_LEN"), ("BATCH", "1", "1", "KV_LEN"), ("BATCH", "HEADS", "Q_LEN", "KV_LEN"),
        ("1", "1", "Q_LEN", "KV_LEN"), ("BATCH", "1", "Q_LEN", "KV_LEN"), ("1", "HEADS", "Q_LEN", "KV_LEN"),
        ("HEADS", "1", "KV_LEN"),
    ),
    "least": (1, 0),
    "hides": HIDES,
    "fill": FILLS,
    "after": (
        "output", "output.transpose(-3, -2).flatten(-2)", "output * 2.0", "output[..., :1, :]", "output.contiguous()",
        "F.silu(output)",  # smooth: rounding may not switch a gradient on or off
    ),
    "learned_mask": (False, True),
}  # fmt: skip

ON_A_GPU: dict[str, tuple] = {
    "dtype": ("bfloat16", "float16", "bfloat16", "float32"),
    "head_dim": (64, 128, 72, 40, 16, 96, 256),
}


def drawn(number: str, device: str = "cpu", **fixed: Any) -> Call:
    """The random call of a text such as "1/27"; equal texts give equal calls. fixed: fields that are not drawn."""
    draw = random.Random(number)
    choices = CHOICES if device == "cpu" else {**CHOICES, **ON_A_GPU}
    found = {name: draw.choice(values) for name, values in choices.items()}
    return fitted(Call(**{**found, "seed": draw.randrange(1000), **fixed}))


def simpler(call: Call) -> Iterator[Call]:
    """Calls that differ from a call in one field, which is simpler."""
    for name in (field.name for field in fields(call)):
        values = list(dict.fromkeys((False, True) if name in ("needs_grad", "dynamic") else CHOICES.get(name, ())))
        now = getattr(call, name)
        for value in values[: values.index(now) if now in values else 1]:
            if (found := fitted(replace(call, **{name: value}))) != call:
                yield found


def fitted(call: Call) -> Call:
    """The same call with those fields changed that contradict others."""
    change: dict[str, Any] = {}
    if call.dynamic:  # PyTorch compiles a size of 1 by itself
        call = replace(call, batch=max(call.batch, 2), q_len=max(call.q_len, 2), kv_len=max(call.kv_len, 2))

    def now(name: str) -> Any:
        return change.get(name, getattr(call, name))

    if call.heads % call.kv_heads:
        change["kv_heads"] = call.heads
    if call.memory in SELF:
        change.update(kv_len=call.q_len, value_dim=None)
        if call.memory != "split":
            change["kv_heads"] = call.heads
    if call.memory == "kv_chunk":
        change["value_dim"] = None
    if call.memory != "parts":
        change.update(key_memory="bhsd", value_memory="bhsd")
        if call.memory != "kv_chunk":
            change["query_memory"] = "bhsd"
    if call.rank != 4 and call.written == "einsum":
        change["written"] = "matmul"
    if call.rank != 3 and call.written in ("bmm", "baddbmm"):
        change["written"] = "matmul"
    if now("kv_heads") == call.heads or (call.groups == "enable_gqa" and (now("written") != "sdpa" or call.rank == 3)):
        change["groups"] = "enable_gqa" if now("kv_heads") == call.heads else "expand"
    if now("written") == "sdpa":
        change.update(softmax="softmax", scaled="scores")
    elif call.softmax == "float32" and call.dtype in ("float32", "float64"):
        change["softmax"] = "functional"  # the reference would be no more exact than float32
    if call.scale is not None and call.scale <= 0 and now("scaled") in ("both", "divided"):
        change["scaled"] = "query"
    if now("written") == "baddbmm" and call.scale == 0 and call.dtype in ("bfloat16", "float16"):
        change["scale"] = 0.3  # with beta=0 and alpha=0 PyTorch returns the memory as it finds it
    if call.mask == "is_causal" and now("written") == "sdpa" and call.scale is not None and call.scale <= 0:
        change["scale"] = 0.3  # NaN from PyTorch's CPU kernel
    if call.mask in ("none", *ADDITIVE) or (call.mask == "is_causal" and now("written") == "sdpa"):
        change.update(hides="boolean", fill="-torch.inf", least=1)
    elif call.hides == "boolean" and now("written") == "sdpa":
        change["fill"] = "-torch.inf"
    if now("hides") == "times" and now("fill") == "-torch.inf":
        change["fill"] = "-1e4"  # 0 * inf is NaN
    if now("hides") == "where" and call.dtype == "float64":
        change["hides"] = "masked_fill"  # PyTorch takes the numbers of torch.where for float32
    if call.dtype == "float16" and now("fill") == "-1e9":
        change["fill"] = "-1e4"
    if call.mask == "additive_float32" and call.dtype == "float64" and now("written") == "sdpa":
        change["mask"] = "additive"  # PyTorch's CPU kernel reads such a mask as something else
    if "SHAPE" not in MASKS[str(now("mask"))][0]:
        change["mask_shape"] = ("Q_LEN", "KV_LEN")
    if "padding" not in str(now("mask")) and now("mask") != "boolean":
        change["least"] = 1
    if now("mask") not in ADDITIVE or not call.needs_grad:
        change["learned_mask"] = False
    return replace(call, **change)


def sizes(call: Call) -> list[tuple[int, int, int]]:
    """(batch, q_len, kv_len) of each run: a call with dynamic sizes runs with others, too."""
    first = (call.batch, call.q_len, call.kv_len)
    return [first, (call.batch + 2, call.q_len + 4, call.kv_len + 4)] if call.dynamic else [first]


def loses_scores(call: Call) -> bool:
    """Whether some row may have nothing but keys that a finite number, added to their scores, hides: its weights are
    those of scores that rounding has taken digits from, or all, and any kernel may round them in its own way."""
    added = call.hides != "boolean" and call.mask not in ("none", *ADDITIVE) and call.fill != "-torch.inf"
    shorter = call.mask in ("lower_right", "window", "documents") and call.q_len > call.kv_len
    return added and (shorter or call.least == 0 or call.mask in ("padding_both", "rows_without_a_key"))


def written_out(call: Call, device: str) -> str:
    """The source of constants, of `tensors(BATCH, Q_LEN, KV_LEN)`, and of `attention`, which takes what `tensors` returns."""
    given, views = _memory(call)
    lines, mask = MASKS[call.mask]
    used = [
        name for name in ("valid_queries", "valid", "documents", "of_queries", "mask") if name in lines.split("=")[0]
    ]
    names = [*(given if call.inside else ("query", "key", "value")), *used]
    make = [f"{name} = {code}" for name, code in given.items()]
    make += [] if call.inside else views
    shape = ", ".join(call.mask_shape)
    make += lines.replace("SHAPE", f"({shape})").replace("LEAST", str(call.least)).splitlines()
    learned = [name for name in names if name not in used or call.learned_mask] if call.needs_grad else []
    make += [f"{name} = {name}.detach().requires_grad_()" for name in learned]
    inside = (views if call.inside else []) + _attention(call, mask)
    text = CONSTANTS.format(call=call, device=device, value_dim=call.value_dim or call.head_dim)
    text += PADDING if "padding(" in lines else ""
    text += f"\n\ndef tensors(BATCH, Q_LEN, KV_LEN):\n    torch.manual_seed({call.seed})\n"
    text += "".join(f"    {line}\n" for line in make)
    text += f"    return {', '.join(names)}\n\n\ndef attention({', '.join(names)}):\n"
    return text + "".join(f"    {line}\n" for line in inside)


CONSTANTS = """\
DEVICE, DTYPE = {device!r}, torch.{call.dtype}
HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM = {call.heads}, {call.kv_heads}, {call.head_dim}, {value_dim}
"""
PADDING = '''

def padding(batch, length, least):
    """(batch, length), True where a token is no padding."""
    return (torch.arange(length) < torch.randint(least, length + 1, (batch, 1))).to(DEVICE)
'''
RANDOM = "torch.randn({}).to(DEVICE, DTYPE)"


def _memory(call: Call) -> tuple[dict[str, str], list[str]]:
    """What `tensors` draws, as code by name, and the lines of views that make (batch, heads, length, dim) of it."""
    given: dict[str, str] = {}
    views: list[str] = []

    def part(name: str, heads: str, length: str, dim: str, memory: str) -> None:
        shapes = {
            "bhsd": (f"BATCH, {heads}, {length}, {dim}", ""),
            "bshd": (f"BATCH, {length}, {heads}, {dim}", ".transpose(1, 2)"),
            "transposed": (f"BATCH, {heads}, {dim}, {length}", ".transpose(-2, -1)"),
            "sliced": (f"BATCH, {heads}, {length} + 3, {dim} + 2", "[:, :, 3:, 2:]"),
            "strided": (f"BATCH, {heads}, 2 * {length}, {dim}", "[:, :, ::2]"),
            "one_batch": (f"1, {heads}, {length}, {dim}", f".expand({'BATCH'}, -1, -1, -1)"),
            "one_head": (f"BATCH, 2, {length}, {dim}", f"[:, 1:].expand(-1, {heads}, -1, -1)"),
        }
        shape, view = shapes[memory]
        given[f"{name}_memory"] = RANDOM.format(shape)
        batch = "query.shape[0]" if call.inside else "BATCH"
        views.append(f"{name} = {name}_memory{view.replace('BATCH', batch)}")

    if call.memory in ("parts", "kv_chunk"):
        part("query", "HEADS", "Q_LEN", "HEAD_DIM", call.query_memory)
    if call.memory == "parts":
        part("key", "KV_HEADS", "KV_LEN", "HEAD_DIM", call.key_memory)
        part("value", "KV_HEADS", "KV_LEN", "VALUE_DIM", call.value_memory)
        return given, views
    heads = "(part.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for part in {})"
    if call.memory == "kv_chunk":
        given["memory"] = RANDOM.format("BATCH, KV_LEN, 2 * KV_HEADS * HEAD_DIM")
        return given, [*views, f"key, value = {heads.format('memory.chunk(2, -1)')}"]
    given["memory"] = RANDOM.format("BATCH, Q_LEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM")
    of = "memory.unflatten(-1, (3, HEADS, HEAD_DIM))"
    parts = {
        "chunk": heads.format("memory.chunk(3, -1)"),
        "split": heads.format("memory.split([HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM], -1)"),
        "unbind": f"(part.transpose(1, 2) for part in {of}.unbind(2))",
        "permute": f"{of}.permute(2, 0, 3, 1, 4)",
        "stack": f"torch.stack([part.transpose(1, 2) for part in {of}.unbind(2)]).unbind(0)",
        "per_head": "memory.unflatten(-1, (HEADS, 3 * HEAD_DIM)).transpose(1, 2).chunk(3, -1)",
    }
    return given, [f"query, key, value = {parts[call.memory]}"]


def _attention(call: Call, mask: str) -> list[str]:
    lines = [
        f"{name} = {how.format(name, name)}"
        for name, how in (("query", call.query_as), ("key", call.key_as), ("value", call.value_as))
        if how != "{}"
    ]
    argument = call.mask == "is_causal" and call.written == "sdpa"
    masked = bool(mask) and not argument
    if masked:
        lines += ["q_len, kv_len = query.shape[-2], key.shape[-2]"] if "q_len" in mask else []
        lines += [f"mask = {mask}"] if mask != "mask" else []
    times = "HEADS // KV_HEADS"
    for name in ("key", "value") if call.heads != call.kv_heads else ():
        if call.groups == "repeat_interleave":
            lines.append(f"{name} = {name}.repeat_interleave({times}, 1)")
        elif call.groups == "expand":
            lines.append(f"{name} = {name}[:, :, None].expand(-1, -1, {times}, -1, -1).flatten(1, 2)")
    if call.rank == 3:
        if masked and (len(call.mask_shape) > 2 or call.mask in _OF_RANK_4):
            lines.append("mask = mask.expand(query.shape[0], HEADS, -1, -1).flatten(0, 1)")
        lines.append("query, key, value = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)")
    elif call.rank == 5:
        lines.append("query, key, value = query[None], key[None], value[None]")
    hides = call.hides
    if masked and call.mask not in ADDITIVE and not (hides == "boolean" and call.written == "sdpa"):
        fill = call.fill
        if hides == "where":
            lines.append(f"mask = torch.where(mask, 0.0, {fill}).to(query.dtype)")
        elif hides == "masked_fill":
            lines.append(f"mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, {fill})")
        elif hides == "times":
            lines.append(f"mask = (1.0 - mask.to(query.dtype)) * {fill}")
    if call.written == "sdpa":
        options = [", attn_mask=mask"] if masked else []
        options += [", is_causal=True"] if argument else []
        options += [f", scale={call.scale}"] if call.scale is not None else []
        options += [", enable_gqa=True"] if call.heads != call.kv_heads and call.groups == "enable_gqa" else []
        lines.append(f"output = F.scaled_dot_product_attention(query, key, value{''.join(options)})")
    else:
        lines += _operations(call, masked)
    after = call.after
    if call.rank == 3:
        lines.append("output = output.unflatten(0, (-1, HEADS))")
    return [*lines, f"return {after}"]


_OF_RANK_4 = ("padding", "padding_expanded", "padding_both", "causal_padding", "documents")


def _operations(call: Call, masked: bool) -> list[str]:
    scale = "HEAD_DIM**-0.5" if call.scale is None else repr(call.scale)
    root = "HEAD_DIM**-0.25" if call.scale is None else f"{call.scale}**0.5"
    divisor = "HEAD_DIM**0.5" if call.scale is None else repr(1 / (call.scale or 1.0))
    lines = []
    if call.scaled in ("query", "key"):
        lines.append(f"{call.scaled} = {call.scaled} * {scale}")
    elif call.scaled == "both":
        lines.append(f"query, key = query * {root}, key * {root}")
    products = {
        "matmul": "query @ key.transpose(-2, -1)",
        "einsum": 'torch.einsum("bhqd,bhkd->bhqk", query, key)',
        "bmm": "torch.bmm(query, key.transpose(1, 2))",
        "baddbmm": "torch.baddbmm(query.new_zeros(1, 1, 1), query, key.transpose(1, 2), beta=0, alpha=ALPHA)",
    }
    product = products[call.written].replace("ALPHA", scale if call.scaled == "scores" else "1.0")
    if call.scaled == "scores" and call.written != "baddbmm":
        product = f"{product} * {scale}"
    elif call.scaled == "divided":
        product = f"{product} / {divisor}"
    lines.append(f"scores = {product}")
    if masked and call.hides == "boolean" and call.mask not in ADDITIVE:
        lines.append(f"scores = scores.masked_fill(~mask, {call.fill})")
    elif masked:
        lines.append("scores = scores + mask")
    weights = {
        "softmax": ["weights = scores.softmax(-1)"],
        "functional": ["weights = F.softmax(scores, dim=-1)"],
        "float32": ["weights = F.softmax(scores, dim=-1, dtype=torch.float32)"],
        "stable": ["weights = (scores - scores.amax(-1, keepdim=True)).softmax(-1)"],
        "exp": [
            "weights = (scores - scores.amax(-1, keepdim=True)).exp()",
            "weights = weights / weights.sum(-1, keepdim=True)",
        ],
    }
    lines += weights[call.softmax]
    if call.softmax == "float32" or call.mask == "additive_float32":
        lines.append("weights = weights.to(value.dtype)")
    out = {
        "einsum": 'torch.einsum("bhqk,bhkd->bhqd", weights, value)',
        "bmm": "torch.bmm(weights, value)",
    }
    return [*lines, f"output = {out.get(call.written, 'weights @ value')}"]
