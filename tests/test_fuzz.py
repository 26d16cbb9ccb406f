"""`bench/fuzz.py`: fixed random calls through every kernel of a CPU are right, and a kernel that is wrong is found."""

import fuzz
import pytest
import torch

# A kernel that reads its operands from the start of their memory: wrong where a tensor begins elsewhere, as in a fused
# projection.
FROM_THE_START = """
from dataclasses import replace

import torch.nn.functional as F

from attnrewrite import MaskKind, records_of


def op(query, key, value, mask, *, call):
    moved = [tensor.as_strided(tensor.shape, tensor.stride(), 0) for tensor in (query, key, value)]
    return F.scaled_dot_product_attention(*moved, scale=call.scale)


RECORDS = (
    replace(
        records_of("_native_math")[0], name="from_the_start", op=op, masks=frozenset({MaskKind.NONE}), prepare=None,
        gqa=False, backward=False,
    ),
)
"""


@pytest.mark.filterwarnings("ignore")
def test_nothing_is_wrong():
    """Static and dynamic sizes, with and without a gradient."""
    counts = fuzz.search(1, ["native", "_native_math", "_native_flash", "flex"], fuzz.Setting(), calls=120, size=10)
    assert counts.wrong == []
    assert counts.all >= 120
    assert min(counts.swapped.values()) > 6, str(counts)


@pytest.mark.filterwarnings("ignore")
def test_a_kernel_that_is_wrong_is_found(plug_in, capsys):
    """As a script, which finds it too; and not where the fault does not show."""
    plug_in("from_the_start", FROM_THE_START)
    torch.manual_seed(0)
    parts = dict(written="sdpa", mask="none", dtype="float32", memory="chunk", heads=3, inside=True, needs_grad=False)
    calls = [fuzz.drawn(f"0/{number}", **parts) for number in range(4)]
    verdicts = fuzz.together(calls, ["from_the_start", "native"], fuzz.Setting())
    assert [verdict.chosen for verdict in verdicts["from_the_start"]] == ["from_the_start"] * 4
    assert all("relative errors" in verdict.wrong for verdict in verdicts["from_the_start"])
    assert not any(verdict.wrong for verdict in verdicts["native"])

    text = fuzz._script_of(calls[0], "from_the_start", verdicts["from_the_start"][0].wrong, fuzz.Setting())
    with pytest.raises(SystemExit) as ended:
        exec(compile(text, "script", "exec"), {"__name__": "__main__"})
    assert ended.value.code == 1
    assert "from_the_start" in capsys.readouterr().out

    dense = {"memory": "parts", "query_memory": "bhsd", "key_memory": "bshd", "value_memory": "transposed"}
    calls = [fuzz.drawn(f"0/{number}", **{**parts, **dense}) for number in range(4)]
    assert not any(each.wrong for each in fuzz.together(calls, ["from_the_start"], fuzz.Setting())["from_the_start"])


@pytest.mark.filterwarnings("ignore")
def test_no_backward_overwrites_the_inputs():
    """Of two graphs compiled in one frame, only the second may overwrite the second tensor that it saves for its backward."""

    def other(graph_module, example_inputs):
        graph = torch.fx.symbolic_trace(lambda x, w: (torch.mm(x, x).sin() * w.detach(),))
        return inductor(graph, example_inputs)

    inductor = torch._dynamo.lookup_backend("inductor")
    x, w = (torch.randn(30, 30, requires_grad=True) for _ in range(2))
    before = w.detach().clone()
    backend = fuzz.EveryKernel({"one": inductor, "other": other})
    with torch._inductor.config.patch(force_disable_caches=True):
        torch.compile(lambda x, w: x.detach() * w.cos(), backend=backend)(x, w).sum().backward()
    assert torch.equal(w, before)
    assert torch.allclose(w.grad, -x.detach() * before.sin())


def test_equal_seeds_give_equal_calls():
    """Also what was written in another version: a seed in a report stands for a call."""
    texts = [fuzz.written_out(fuzz.drawn(number), "cpu") for number in ("1/0/0", "1/0/1", "1/0/0")]
    assert texts[0] == texts[2] != texts[1]


def test_simpler_calls():
    """A search for the simplest call ends: no call is simpler than the simplest of its kind."""
    call, steps = fuzz.drawn("7/7/7", written="matmul", memory="stack"), 0
    while simpler := list(fuzz.simpler(call)):
        assert call not in simpler
        call, steps = simpler[0], steps + 1
        assert steps < 200
    assert (call.written, call.memory, call.mask, call.rank) == ("sdpa", "parts", "none", 4)
