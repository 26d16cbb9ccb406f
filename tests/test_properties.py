"""Any attention that can be called, compiled through any kernel, against float64 of the unchanged function."""

import re
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from fuzz import EveryKernel
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import FLEX_TAKES_MASKS, TOLERANCE, compiled, doubled

from attnrewrite import AttentionCall, Code, Machine, Report, make_plan, make_policy, with_backend
from attnrewrite.reports.report import GraphReport

modest = settings(deadline=None, derandomize=True, database=None, max_examples=60)

# -- any call


def bhsd(batch, heads, length, dim):
    return torch.randn(batch, heads, length, dim)


def bshd(batch, heads, length, dim):
    return torch.randn(batch, length, heads, dim).transpose(1, 2)


def fused(batch, heads, length, dim):
    """A chunk of one projection for queries, keys and values."""
    return torch.randn(batch, length, 3 * heads * dim).chunk(3, -1)[1].unflatten(-1, (heads, dim)).transpose(1, 2)


def strided(batch, heads, length, dim):
    """No dimension is dense."""
    return torch.randn(batch, heads, dim, 2 * length).transpose(2, 3)[:, :, ::2]


LAYOUTS = {function.__name__: function for function in (bhsd, bshd, fused, strided)}
KERNELS = ("_native_flash", "_native_math", "flex")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Asked:
    """An attention as a model may ask for it."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    dim: int
    value_dim: int
    dtype: str
    layouts: tuple[str, str, str]
    scale: float | None
    mask: str | None  # None, "causal", "boolean", or the dtype of an additive one
    mask_shape: tuple[int, ...]
    seed: int

    def tensors(self):
        torch.manual_seed(self.seed)
        sizes = (
            (self.heads, self.q_len, self.dim),
            (self.kv_heads, self.kv_len, self.dim),
            (self.kv_heads, self.kv_len, self.value_dim),
        )
        made = [
            LAYOUTS[name](self.batch, *size).to(DTYPES[self.dtype])
            for name, size in zip(self.layouts, sizes, strict=True)
        ]
        if self.mask == "boolean":
            made.append(torch.rand(self.mask_shape) > 0.4)
        elif self.mask in DTYPES:
            made.append(torch.randn(self.mask_shape).to(DTYPES[self.mask]))
        return made

    def __call__(self, *tensors):
        return F.scaled_dot_product_attention(
            *tensors, is_causal=self.mask == "causal", scale=self.scale, enable_gqa=self.heads != self.kv_heads
        )


@st.composite
def asked(draw):
    heads = draw(st.integers(1, 6))
    batch, q_len, kv_len = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 40))
    dim, dtype = draw(st.integers(1, 40)), draw(st.sampled_from(sorted(DTYPES)))
    full = (batch, heads, q_len, kv_len)
    rank = draw(st.integers(2, 4))
    mask = draw(st.sampled_from([None, "causal", "boolean", dtype, "float32"]))
    if dtype == "float64" and mask == "float32":
        mask = dtype  # below: test_a_float32_mask_for_float64
    # PyTorch's own CPU kernel multiplies -inf by the scale: with is_causal one of 0 or below gives NaN.
    scales = [None, 0.3] if mask == "causal" else [None, 0.3, 0.0, -0.2]
    return Asked(
        batch,
        heads,
        draw(st.sampled_from([number for number in range(1, heads + 1) if heads % number == 0])),
        q_len,
        kv_len,
        dim,
        draw(st.just(dim) | st.integers(1, 40)),
        dtype,
        draw(st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 3)),
        draw(st.sampled_from(scales)),
        mask,
        tuple(draw(st.sampled_from([1, size])) for size in full[4 - rank :]),
        draw(st.integers(0, 1000)),
    )


def refusals_of(kernel, asked):
    """The codes that a call may be refused with, written out for the kernels of a CPU."""
    codes = set()
    if kernel == "_native_flash" and asked.value_dim != asked.dim:
        codes.add(Code.VALUE_DIM)
    if kernel == "flex" and asked.dtype == "float64":
        codes.add(Code.DTYPE)
    elif kernel == "flex" and asked.mask == "boolean" and not FLEX_TAKES_MASKS:
        codes.add(Code.VERSION)
    if kernel == "_native_math" and asked.mask == "float32" and asked.dtype != "float32":
        codes.add(Code.MASK)
    return codes


def error(output, reference):
    """Relative in the 2-norm. The mean of many values may be near zero, where the rounding of what was summed is more than it:
    a number of the output counts at least as a tenth."""
    norm = max(reference.norm().item(), 0.1 * reference.numel() ** 0.5)
    return ((output.double() - reference).norm() / norm).item()


@given(asked())
@modest
def test_every_kernel(asked):
    """Dynamo traces the call once for all of them."""
    torch.compiler.reset()
    tensors = asked.tensors()
    every = EveryKernel({kernel: with_backend(kernel, inner="eager") for kernel in KERNELS})
    run = torch.compile(lambda *given: asked(*given), backend=every, fullgraph=True, dynamic=False)
    expected = asked(*map(doubled, tensors))
    for kernel, backend in every.backends.items():
        every.now = kernel
        output = run(*tensors)
        (site,) = backend.report.sites
        codes = {refused.code for _, refused in site.refusals}
        possible = refusals_of(kernel, asked)
        assert codes <= possible
        assert bool(codes) == bool(possible) == (site.chosen is None)
        assert (output.shape, output.dtype) == (expected.shape, DTYPES[asked.dtype])
        assert error(output, expected) < TOLERANCE[output.dtype], (site, error(output, expected))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_float32_mask_for_float64(kernel):
    """PyTorch's CPU kernel reads such a mask as something else, from 16 keys on: no kernel may be given it."""
    query, key, value = (bhsd(1, 1, length, 8).double() for length in (3, 40, 40))
    run, backend = compiled(F.scaled_dot_product_attention, kernel)
    mask = torch.randn(3, 40)
    output = run(query, key, value, mask)
    (site,) = backend.report.sites
    assert site.chosen is None or error(output, written_out(query, key, value, mask.double())) < 1e-12


def written_out(query, key, value, bias):
    return torch.softmax(query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5 + bias, -1) @ value


# -- any report

CPU = Machine("cpu", packages={"torch": "2.13.0"})
PARTS = st.sampled_from(["blocks", "down", "attn1", "attn2", "0", "1", "2", "3", "10"])
NAMES = st.lists(PARTS, min_size=1, max_size=5).map(".".join)
# Few different calls, so that many sites fall into one row.
CALLS = st.sampled_from([(7, "float32"), (9, "float32"), (7, "float64"), (7, "int8")])
CHOICES = st.lists(st.sampled_from(["native", "_native_math", "_native_flash", "flex"]), min_size=1, unique=True)


@st.composite
def reports(draw):
    policy = make_policy(draw(CHOICES), draw(st.sampled_from([{}, {"*.attn1": "flex"}])))
    report = Report(str(policy), unmatched_rules=draw(st.lists(st.text(max_size=5), max_size=2)))
    for number in range(draw(st.integers(0, 3))):
        sites = draw(st.lists(st.tuples(NAMES, CALLS), max_size=12, unique_by=lambda site: site[0]))
        calls = [AttentionCall(name, 2, 4, 4, q_len, 11, 16, 16, dtype) for name, (q_len, dtype) in sites]
        plan = make_plan(calls, policy, [CPU] * len(calls)).described()
        machine = draw(st.sampled_from([None, CPU, replace(CPU, name="a CPU")]))
        seconds = draw(st.floats(0, 10))
        report.add(GraphReport(f"{number}/0", plan, machine, seconds, len(calls) - plan.swapped))
    return report


@given(reports())
@modest
def test_reports_through_json(report):
    again = Report.from_json(report.to_json())
    assert again == report
    assert (str(again), again.to_json()) == (str(report), report.to_json())


@given(reports())
@modest
def test_the_table_loses_no_site(report):
    """The counts of the rows add up, and a row that is written in full has every name of its sites."""
    text = str(report)
    rows = [row for row in text.splitlines() if re.search(r"  \(2, 4, ", row)]
    counted = 0
    named = set()
    cut = False
    for row in rows:
        cell = row.split("  ")[0]
        folded = re.fullmatch(r"(.*) \((\d+)\)", cell)
        counted += int(folded[2]) if folded else 1
        cut |= cell.count("...") > 0
        named |= unfolded(folded[1] if folded else cell)
    names = {site.name for site in report.sites}
    assert counted == len(report.sites)
    assert named <= names
    assert cut or named == names
    if report.graphs:
        assert report.swapped + report.native + report.left == len(report.sites)
        assert f"{report.swapped} swapped, {report.native} native, {report.left} left as they were" in text


def unfolded(cell):
    """blocks.0-2,5.attn1, head -> blocks.0.attn1, blocks.1.attn1, blocks.2.attn1, blocks.5.attn1, head"""
    names = set()
    for name in cell.split(", "):
        ranges = re.search(r"(?<=\.)[\d,-]+(?=\.|$)", name)
        if name == "..." or not ranges:
            names |= {name} - {"..."}
            continue
        for span in ranges[0].split(","):
            first, _, last = span.partition("-")
            for number in range(int(first), int(last or first) + 1):
                names.add(name[: ranges.start()] + str(number) + name[ranges.end() :])
    return names
