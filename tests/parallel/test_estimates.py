"""The estimate of what exchanges take: FLOPs from shapes, bytes from the plan, rates that are stated and never made up."""

import json

import pytest
import torch
import torch.nn.functional as F
from lockstep import traced
from torch.utils.flop_counter import FlopCounterMode

import attnrewrite
from attnrewrite import DescribedRanks, Machine, Rates
from attnrewrite.__main__ import main
from attnrewrite.parallel.estimates import percent
from attnrewrite.parallel.products import products

H200 = Machine("cuda", (9, 0), {"torch": "2.11.0", "cudnn": "9.19.0"}, "NVIDIA H200")
H20 = Machine("cuda", (9, 0), {}, "NVIDIA H20")  # the same capability, and other rates
BATCH, HEADS, TOKENS, DIM = 3, 4, 40, 16
WIDTH = HEADS * DIM
TENSOR = BATCH * TOKENS * WIDTH * 2  # bytes of the tokens, and of query, key, value and output each
LINEAR = 2 * BATCH * TOKENS * WIDTH * 4 * WIDTH  # FLOPs of all projections
ATTENTION = 4 * BATCH * HEADS * TOKENS * TOKENS * DIM
PER_MS = 450e9 * 0.68 / 1e3  # bytes


def attend(x, qkv, out, causal=False):
    query, key, value = (each.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for each in F.linear(x, qkv).chunk(3, -1))
    result = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    return F.linear(result.transpose(1, 2).flatten(2), out)


def explained(context_parallel, machine=H200, function=attend, dtype=torch.bfloat16, **options):
    shapes = ((BATCH, TOKENS, WIDTH), (3 * WIDTH, WIDTH), (WIDTH, WIDTH))
    tensors = [torch.zeros(*shape, dtype=dtype, device="meta") for shape in shapes]
    with torch.no_grad():
        report = attnrewrite.explain(
            function, *tensors, backend="native", machine=machine, context_parallel=context_parallel, **options
        )
    (graph,) = report.graphs
    assert attnrewrite.Report.from_json(report.to_json()) == report
    return graph.parallel, " ".join(str(report).split())


def test_known_shapes_give_known_numbers():
    plan, text = explained(DescribedRanks(2, "ulysses"))
    found = plan.estimate
    assert found.tflop == pytest.approx((LINEAR + ATTENTION) / 2 / 1e12)
    assert found.products == pytest.approx((LINEAR + ATTENTION) / 2 / (989e12 * 0.6) * 1e3)
    # Of query, key, value and output a rank has a half, and sends the half of that; then the output is gathered.
    (site,) = found.sites
    assert site == pytest.approx(2 * 0.05 + 4 * TENSOR / 4 / PER_MS)
    assert found.others == pytest.approx(0.05 + TENSOR / 2 / PER_MS)
    total = site + found.others + found.products
    assert found.share == pytest.approx((site + found.others) / total)
    assert "estimated: exchanges take more than 99% of the forward of this graph, if nothing runs beside them" in text
    assert f"MiB, estimated {percent(site / total)} of the time each" in text
    for rate in ("NVIDIA H200: 989 TFLOP/s, 60% of it", "450 GB/s to the others, 68% of it", "0.05 ms an exchange"):
        assert rate in text


@pytest.mark.parametrize(
    ("kind", "size", "exchanges", "sent"),
    [
        ("gather", 2, 1, 2 * TENSOR / 2),
        ("ring", 4, 3, 3 * 2 * TENSOR / 4),
        # Two groups of four: three quarters of all four tensors, then keys and values once.
        ("ulysses+ring", 8, 2 + 1, (4 * 3 / 4 + 2) * TENSOR / 8),
    ],
)
def test_rates_that_are_given(kind, size, exchanges, sent):
    rates = Rates(tflops=1, link=0.01, tflops_reached=0.5, link_reached=0.25, exchange_ms=2)
    plan, text = explained(DescribedRanks(size, kind, rates), Machine("cuda", (8, 0)))
    (site,) = plan.estimate.sites
    assert site == pytest.approx(exchanges * 2 + sent / (0.01e9 * 0.25) * 1e3)
    assert plan.estimate.products == pytest.approx((LINEAR + ATTENTION) / size / 0.5e12 * 1e3)
    assert "(1 TFLOP/s, 50% of it reached; 0.01 GB/s to the others, 25% of it reached; 2 ms an exchange)" in text


def test_a_given_link_of_a_known_machine():
    plan, text = explained(DescribedRanks(2, "gather", Rates(link=50)))
    assert plan.estimate.sites == (pytest.approx(0.05 + TENSOR / (50e9 * 0.68) * 1e3),)
    assert "NVIDIA H200: 989 TFLOP/s, 60% of it reached; 50 GB/s" in text


def test_the_last_rank_of_a_causal_ring_computes_most():
    plan, _ = explained(DescribedRanks(4, "ring"), function=lambda *given: attend(*given, causal=True))
    pairs = 10 * 30 + 10 * 11 // 2
    assert plan.estimate.tflop == pytest.approx((LINEAR / 4 + 4 * BATCH * HEADS * pairs * DIM) / 1e12)


@pytest.mark.parametrize(
    ("machine", "rates", "words"),
    [
        (Machine("cpu"), Rates(), "cpu is no H200, and the rate of its products and the rate of its link to the others"),
        (Machine("cuda", (9, 0)), Rates(), "cuda sm_90 without a name is no H200"),
        (H20, Rates(tflops=148), "NVIDIA H20 is no H200, and the rate of its link to the others must be given"),
        (H20, Rates(link=450), "Rates(tflops=...)), or --tflops at the command line"),
    ],
)  # fmt: skip
def test_no_number_is_made_up(machine, rates, words):
    plan, text = explained(DescribedRanks(2, rates=rates), machine)
    assert plan.estimate.share is None
    assert "no estimate of what exchanges take: " in text
    assert words in text
    assert "estimated" not in text
    assert "TFLOP" not in text


def test_a_dtype_without_a_known_rate(monkeypatch):
    monkeypatch.setattr("attnrewrite.parallel.rates.TFLOPS", {"H200": {"bfloat16": 989.0}})
    plan, _ = explained(2, dtype=torch.float32)
    assert plan.estimate.refused.startswith("the rate of products in float32 is not known for H200: DescribedRanks(")


def test_symbolic_sizes():
    x = torch.zeros(BATCH, TOKENS, WIDTH)
    torch._dynamo.mark_dynamic(x, 1)
    with torch.no_grad():
        given = x, torch.zeros(3 * WIDTH, WIDTH), torch.zeros(WIDTH, WIDTH)
        report = attnrewrite.explain(
            attend, *given, backend="native", machine=H200, context_parallel=DescribedRanks(2, "ulysses")
        )
    (graph,) = report.graphs
    assert graph.parallel.estimate.refused.startswith("sizes are symbolic")


def test_nothing_shared_has_no_estimate():
    plan, text = explained(2, function=lambda x, qkv, out: F.linear(x, out))
    assert plan.estimate is None
    assert "estimate" not in text


def many(x, image, weight, kernel, three):
    """Every operator that has a formula here, beside those of PyTorch's flop counter."""
    tokens = F.linear(x, weight)
    heads = tokens.unflatten(-1, (4, 6)).transpose(1, 2)
    attended = F.scaled_dot_product_attention(heads, heads[:, :2], heads[:, :2, :, :5], enable_gqa=True)
    products = [
        attended,
        heads @ heads.mT,
        tokens @ weight,
        tokens @ weight[0],
        torch.inner(tokens, weight[:3]),
        torch.einsum("bhqd,bhkd->bhqk", heads, heads[:, :, :7]),
        torch.einsum("...i,ij", tokens, weight),
        torch.einsum("ij->ji", weight),
        torch.bmm(tokens, tokens.mT),
        torch.addmm(weight, weight, weight),
        torch.baddbmm(tokens[:, :, :13], tokens, tokens.mT),
        F.conv2d(image, kernel, stride=2, padding=1, groups=2),
        F.conv_transpose2d(image, three, stride=2, groups=2),
        F.conv1d(tokens.mT, weight[:, :, None].expand(-1, -1, 3)),
    ]
    return sum(each.sum() for each in products)


def test_products_are_those_of_the_flop_counter():
    shapes = ((2, 13, 24), (3, 8, 11, 9), (24, 24), (10, 4, 3, 3), (8, 5, 2, 2))
    inputs = [torch.randn(*shape) for shape in shapes]
    found = products(traced(many, inputs).graph)
    with FlopCounterMode(display=False) as counter:
        many(*inputs)
    vector = 2 * 2 * 13 * 24  # of a product with a vector, which has no formula there
    assert found.flops == {"float32": counter.get_total_flops() + vector}
    assert found.uncounted == ()


def test_products_that_are_not_counted_are_named():
    lstm = torch.nn.LSTM(8, 6).requires_grad_(False)
    found = products(traced(lambda x: lstm(x)[0] @ x.mT[:, :, :6].mT, [torch.randn(5, 7, 8)]).graph)
    assert "aten::lstm" in found.uncounted


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({"tflops": 0}, ValueError, "tflops is 0: give a rate above 0"),
        ({"link": float("nan")}, ValueError, "link is nan: give a rate above 0"),
        ({"link": "450"}, TypeError, "link is '450' (str): give a number"),
        ({"link_reached": 1.5}, ValueError, "link_reached is 1.5: give the part that is reached"),
        ({"exchange_ms": -1}, ValueError, "exchange_ms is -1: give a time in ms, 0 or more"),
    ],
)
def test_rates_are_checked(given, kind, words):
    with pytest.raises(kind) as raised:
        Rates(**given)
    assert words in str(raised.value)


def test_rates_that_are_none():
    with pytest.raises(TypeError, match="rates is 450 "):
        DescribedRanks(2, rates=450)


def test_at_the_command_line(capsys):
    machine = json.dumps({"device": "cuda", "capability": [9, 0], "name": "NVIDIA H200"})
    main(["explain", "--context-parallel", "2", "--machine", machine, "--link", "50"])
    assert "50 GB/s to the others" in " ".join(capsys.readouterr().out.split())
    for arguments, words in (
        (["--link", "50"], "--link needs --context-parallel N"),
        (["--context-parallel", "2", "--tflops", "-3"], "--tflops is -3.0: give a rate above 0"),
        (["--machine", machine, "some.pt2"], "--machine needs --backend beside a file"),
    ):
        with pytest.raises(SystemExit):
            main(["explain", *arguments])
        assert words in capsys.readouterr().err
