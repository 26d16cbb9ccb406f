"""Writes the script of `Report.repro`, which rebuilds one site's call, runs its kernel and prints the error against float64."""

from __future__ import annotations

import keyword
import re
from collections.abc import Sequence

from torch import Tensor

from ..graphs.inner_compilers import known_inner
from ..kernels.calls import AttentionCall, Mask, MaskKind
from ..kernels.decisions import Step
from ..planning.registry import records_of
from ..planning.sites import Site

Layout = tuple[
    tuple[int, ...], tuple[int, ...], int
]  # shape, strides, and the place of the first element in its memory

TEMPLATE = '''\
"""Attention site {site!r} by itself, on {kernel}. Written by attnrewrite {version}.

    python THIS_FILE

Computes attention on random tensors of the site's sizes, dtype and layout: by the kernel, under torch.compile, and in float64.
{notes}"""

import torch
import torch.nn.functional as F

import attnrewrite

torch.manual_seed(0)
{settings}DEVICE, DTYPE = {device!r}, torch.{dtype}
{symbols}BATCH, HEADS, KV_HEADS = {call.batch}, {call.heads}, {call.kv_heads}
Q_LEN, KV_LEN = {call.q_len}, {call.kv_len}
HEAD_DIM, VALUE_DIM = {call.head_dim}, {call.value_dim}
SCALE = {scale}  # factor of the scores

{tensors}


def attention(query, key, value, *given):
{attention}


given = {given}
backend = attnrewrite.with_backend({kernel!r}{options})
compiled = torch.compile(attention, backend=backend, fullgraph=True, dynamic={dynamic})
output = compiled({operands}, *given).detach()

# The reference: attention in float64, on at most 256 query rows, head by head.
rows = torch.linspace(0, Q_LEN - 1, min(Q_LEN, 256), dtype=torch.float64).round().long().to(DEVICE)
mask = {reference_mask}
mask = None if mask is None else mask.expand(BATCH, HEADS, Q_LEN, KV_LEN)
exact = torch.empty(BATCH, HEADS, len(rows), VALUE_DIM, dtype=torch.float64, device=DEVICE)
q, k, v = (
    tensor.detach().expand(BATCH, heads, -1, -1) for tensor, heads in ((query, HEADS), (key, KV_HEADS), (value, KV_HEADS))
)
for head in range(HEADS):
    shared = head * KV_HEADS // HEADS
    scores = q[:, head, rows].double() @ k[:, shared].double().mT * SCALE
    if mask is not None:
        part = mask[:, head, rows]
        scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part.double()
    empty = (scores == -torch.inf).all(-1, keepdim=True)  # a row that sees no key is zero
    exact[:, head] = torch.where(empty, 0.0, scores.softmax(-1)) @ v[:, shared].double()

found = output[:, :, rows].double()
print(backend.report)
error = ((found - exact).norm() / exact.norm()).item()
print(f"relative error {{error:.3e}} to float64, on {{len(rows)}} of {{Q_LEN}} rows of each head")
print(f"{{int(output.isnan().sum())}} NaN, {{int(output.isinf().sum())}} inf of {{output.numel()}} values")
by_row = (found - exact).norm(dim=-1) / exact.norm(dim=-1).clamp_min(1e-30)
worst = by_row.flatten().nan_to_num(torch.inf).argmax().item()
head, row = divmod(worst, len(rows))
print(f"worst row: batch {{head // HEADS}}, head {{head % HEADS}}, query {{int(rows[row])}}")
'''


def script(site: Site, version: str, known: Sequence[Layout] = (), inner: str = "inductor") -> str:
    """Returns the script.

    known: shape, strides and place of query, key and value, which are then views of their memory in the compiled function, as
        in the model. If empty, the script makes tensors of rank 4, in SDPA's form, from the call.
    inner: the name of the compiler of the script's graph.

    Raises `ValueError` for a user's own record without a registered name, which the script could not import, and for a
    compiler without a name.
    """
    if not isinstance(inner, str):
        raise ValueError(f"inner is {inner!r}, which a script cannot name: give a name, as 'eager'")
    known_inner(inner)
    call = site.call.described()
    kernel = site.chosen or "native"
    try:
        record = records_of(kernel)[0]
    except ValueError as error:
        raise ValueError(
            f"site {site.name!r} runs on {kernel!r}, which is a record of your own and has no name that a script could ask "
            "for: give it one by an entry point of the group attnrewrite.backends (CONTRIBUTING.md)"
        ) from error
    symbols = _symbols(call)
    options = f', numerics="{record.numerics.word}"' if record.numerics.is_inexact else ""
    cast = next((step for step in site.steps if step.name == "cast"), None)
    options += f", cast={str(cast.after)!r}" if cast is not None else ""
    options += f", inner={inner!r}" if inner != "inductor" else ""
    masked = _MaskCode(call)
    scale = repr(call.scale) if call.scale is not None else "HEAD_DIM**-0.5"
    return TEMPLATE.format(
        site=site.name,
        kernel=kernel,
        version=version,
        notes=_notes(site, cast),
        settings="torch.use_deterministic_algorithms(True)\n" if call.deterministic else "",
        device=call.device,
        dtype=call.dtype,
        symbols="".join(f"{name} = 128  # a symbol in the graph: put a size here\n" for name in symbols),
        call=call,
        scale=scale,
        tensors=_tensors(call, known) + "\n".join(masked.made),
        attention="\n".join(f"    {line}" for line in [*([LYING] if known else []), *_attention(call, masked)]),
        operands="*memory" if known else "query, key, value",
        given="(" + "".join(f"{name}, " for name in masked.given).rstrip() + ")" if masked.given else "()",
        options=options,
        dynamic=bool(symbols),
        reference_mask=masked.reference,
    )


def _notes(site: Site, cast: Step | None) -> str:
    lines = [f"In the model {name} was refused: {refused}" for name, refused in site.refusals]
    if site.chosen is None:
        lines.append("Every choice refused the site, so the call stayed unchanged.")
    if site.source:
        lines.append(f"The kernel came from {site.source}.")
    if site.call.written_as == "operations":
        lines.append("The model spells the attention out in tensor operations.")
    elif site.call.written_as == "flex":
        lines.append("The model calls flex_attention.")
    if site.call.obstacle:
        lines.append(f"In the model no kernel may replace the call: {site.call.obstacle}.")
    if site.call.dropout:
        lines.append("The call has dropout: its error against float64 means nothing.")
    return "".join(f"{line}\n" for line in lines).replace("\\", "\\\\").replace('"""', "'''")


def _symbols(call: AttentionCall) -> list[str]:
    sizes = (call.batch, call.heads, call.kv_heads, call.q_len, call.kv_len, call.head_dim, call.value_dim)
    texts = [size for size in (*sizes, *call.mask.shape, *(call.mask.window or ())) if isinstance(size, str)]
    names = {name for text in texts for name in re.findall(r"[A-Za-z_]\w*", text) if not keyword.iskeyword(name)}
    return sorted(names)


def _tensors(call: AttentionCall, known: Sequence[Layout]) -> str:
    grad = ".requires_grad_()" if call.needs_grad else ""
    sizes = (("HEADS", "Q_LEN", "HEAD_DIM"), ("KV_HEADS", "KV_LEN", "HEAD_DIM"), ("KV_HEADS", "KV_LEN", "VALUE_DIM"))
    if known:
        return "\n".join(
            [
                "# Shape, strides, and the place of the first element in memory, as in the model: query, key, value.",
                f"PLACES = [{', '.join(str((tuple(shape), tuple(strides), at)) for shape, strides, at in known)}]",
                "",
                "",
                "def numbers(shape, strides, place):",
                '    """Random numbers: memory in which such a tensor lies."""',
                "    extent = 1 + place + sum((size - 1) * stride for size, stride in zip(shape, strides))",
                f"    return torch.randn(extent, device=DEVICE, dtype=DTYPE){grad}",
                "",
                "",
                "memory = [numbers(*place) for place in PLACES]",
                "query, key, value = (each.as_strided(*place) for each, place in zip(memory, PLACES))",
                "",
            ]
        )
    how = {
        "bhsd": ("(batch, heads, length, dim), dense", "BATCH, heads, length, dim", ""),
        "bshd": ("in memory as (batch, length, heads, dim)", "BATCH, length, heads, dim", ".transpose(1, 2)"),
    }
    fused = ("a third of one projection in memory", "BATCH, length, 3, heads, dim", "[:, :, 1].transpose(1, 2)")
    words, shape, views = how.get(call.layout, fused)
    lines = [
        "",
        "def tensor(heads, length, dim):",
        f'    """Random numbers, (batch, heads, length, dim), {words}."""',
        f"    return torch.randn({shape}, device=DEVICE, dtype=DTYPE){views}",
        "",
    ]
    made = [f"tensor({', '.join(size)})" for size in sizes]
    lines += [f"\n{name} = {code}{grad}" for name, code in zip(("query", "key", "value"), made, strict=True)]
    return (
        "\n".join(lines).replace("\n\n\nkey", "\nkey").replace("\n\nkey", "\nkey").replace("\n\nvalue", "\nvalue")
        + "\n"
    )


LYING = "query, key, value = (memory.as_strided(*place) for memory, place in zip((query, key, value), PLACES))"


def _attention(call: AttentionCall, mask: _MaskCode) -> list[str]:
    arguments = ["query, key, value"]
    if mask.inside:
        arguments.append("attn_mask=mask")
    if mask.is_causal:
        arguments.append("is_causal=True")
    if call.dropout:
        arguments.append(f"dropout_p={call.dropout!r}")
    if call.scale is not None:
        arguments.append("scale=SCALE")
    if call.heads != call.kv_heads:
        arguments.append("enable_gqa=True")
    return [*mask.inside, f"return F.scaled_dot_product_attention({', '.join(arguments)})"]


class _MaskCode:
    """The mask of a call as Python code.

    made: lines that make tensors.
    given: the names of these tensors, which the attention takes as arguments.
    inside: lines in the attention that set `mask`; attnrewrite recognises the kind of mask from them.
    is_causal: True if SDPA gets is_causal=True and no mask.
    reference: an expression for the same mask.
    """

    def __init__(self, call: AttentionCall) -> None:
        self.call, self.kind, self.shape = call, call.mask.kind, _mask_shape(call)
        self.made: list[str] = []
        self.given: list[str] = []
        self.inside: list[str] = []
        self.is_causal = self.kind is MaskKind.CAUSAL_UPPER_LEFT and call.mask.dtype is None
        self.reference = "None"
        if self.is_causal:
            self.reference = "torch.ones(Q_LEN, KV_LEN, dtype=torch.bool, device=DEVICE).tril()"
        elif self.kind is not MaskKind.NONE:
            self._write(call.mask)

    def _write(self, mask: Mask) -> None:
        expression = self._expression(mask)
        fill = {"all keys": "-10000.0", "mean": f"torch.finfo(torch.{mask.dtype}).min"}.get(mask.no_key, "-torch.inf")
        if mask.is_boolean or mask.is_causal:
            expression = self._shaped(expression)
            if mask.dtype not in (None, "bool"):
                expression = f"torch.where({expression}, 0.0, {fill}).to(torch.{mask.dtype})"
        self.inside = [f"({', '.join(self.given)},) = given"] if self.given else []
        if expression != "mask":
            self.inside.append(f"mask = {expression}")
        self.reference = expression.replace("query.device", "DEVICE")

    def _tensor(self, name: str, code: str) -> str:
        self.made.append(f"{name} = {code}")
        self.given.append(name)
        return name

    def _padding(self, name: str, length: str) -> str:
        batch = "BATCH" if not self.shape or (len(self.shape) == 4 and self.shape[0] != "1") else "1"
        longest = f"torch.randint(1, {length} + 1, ({batch}, 1), device=DEVICE)"
        return self._tensor(name, f"torch.arange({length}, device=DEVICE) < {longest}  # True: no padding")

    def _expression(self, mask: Mask) -> str:
        """An expression: a boolean mask (batch or 1, 1, q_len or 1, kv_len or 1), or a random tensor of the model's shape."""
        rows, keys = (f"torch.arange({length}, device=query.device)" for length in ("Q_LEN", "KV_LEN"))
        if self.kind is MaskKind.KEY_PADDING:
            return f"{self._padding('valid', 'KV_LEN')}[:, None, None, :]"
        if self.kind is MaskKind.QUERY_KEY_PADDING:
            if self.call.q_len == self.call.kv_len:
                there = self._padding("valid", "KV_LEN")
                return f"{there}[:, None, :, None] & {there}[:, None, None, :]"
            both = self._padding("valid_queries", "Q_LEN"), self._padding("valid", "KV_LEN")
            return f"{both[0]}[:, None, :, None] & {both[1]}[:, None, None, :]"
        triangle = "torch.ones(Q_LEN, KV_LEN, dtype=torch.bool, device=query.device).tril({})[None, None]"
        if self.kind is MaskKind.CAUSAL_UPPER_LEFT:
            return triangle.format("")
        if self.kind is MaskKind.CAUSAL_LOWER_RIGHT:
            return triangle.format("KV_LEN - Q_LEN")
        if self.kind is MaskKind.CAUSAL_PADDING:
            return f"{triangle.format('')} & {self._padding('valid', 'KV_LEN')}[:, None, None, :]"
        if self.kind is MaskKind.SLIDING_WINDOW:
            left, right = mask.window or (None, None)
            apart = f"({rows}[:, None] - {keys})"
            parts = [f"({apart} <= {left})"] if left is not None else []
            parts += [f"({apart} >= -({right}))"] if right is not None else []
            return f"({' & '.join(parts)})[None, None]"
        if self.kind is MaskKind.BLOCKS:
            names = self._tensor(
                "document", "torch.arange(KV_LEN, device=DEVICE)[None] * 3 // KV_LEN  # three documents"
            )
            return f"({names}[:, None, :, None] == {names}[:, None, None, :])"
        shape = ", ".join(self.shape) + ("," if len(self.shape) == 1 else "")
        if self.kind is MaskKind.BOOLEAN:
            name = self._tensor("mask", f"torch.rand(({shape}), device=DEVICE) < 0.7")
            self.made.append("mask[..., 0] = True  # every row sees a key")
            return name
        grad = ".requires_grad_()" if mask.needs_grad else ""
        return self._tensor("mask", f"torch.randn(({shape}), device=DEVICE, dtype=torch.{mask.dtype}){grad}")

    def _shaped(self, expression: str) -> str:
        """The expression of a mask in the rank and sizes of the model's mask."""
        if not self.shape or self.kind is MaskKind.BOOLEAN:
            return expression
        if expression.endswith("[:, None, None, :]") and self.shape[1:] == ("1", "1", str(self.call.kv_len)):
            return expression
        dropped = f"[{', '.join(['0'] * (4 - len(self.shape)))}]" if len(self.shape) < 4 else ""
        return f"({expression}){dropped}.expand({', '.join(self.shape)})"


def _mask_shape(call: AttentionCall) -> tuple[str, ...]:
    """The mask's sizes as text, so that they broadcast to scores of rank 4."""
    shape = tuple(str(size) for size in call.mask.shape)
    if len(shape) > 4:
        return ("BATCH", *shape[-3:])
    if len(shape) == 3 and call.heads == 1:  # (batch, q_len, kv_len): tensors without a dimension for heads
        return (shape[0], "1", *shape[1:])
    return shape


def layouts(*tensors: Tensor) -> tuple[Layout, ...]:
    """Shape, strides and place of query, key and value, as `script` takes them; () if one of them is not of rank 4."""
    if any(tensor.dim() != 4 for tensor in tensors):
        return ()
    return tuple((tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset())) for tensor in tensors)
