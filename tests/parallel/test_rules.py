"""Each rule by itself: an operation whose tensors are shared gives what it gives on the whole, on every number of ranks.

A rule that says more than is true gives other numbers here; one that says less gathers, which `exchanges` would show.
"""

import pytest
import torch
import torch.nn.functional as F
from lockstep import run, traced

from attnrewrite.parallel import rows
from attnrewrite.parallel.analysis import NotSharedError, analyse


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


X = randn(3, 12, 8)  # (batch, tokens, width): sizes that all differ
WEIGHT, TABLE = randn(6, 8), randn(12, 8)


def image(operation):
    return operation, [randn(6, 4, 12, 10)]


# What is shared: the first tensor, along the dimension of its size in `along`. None is gathered but the output.
STAYS = {
    "add": (lambda x: x + 1, [X], 1),
    "broadcasts": (lambda x, t: x * t, [X, TABLE], 1),
    "broadcasts the batch": (lambda x, t: x * t, [X, randn(3, 1, 8)], 0),
    "a size of one": (lambda x, t: x * t, [X, randn(3, 1, 8)], 1),
    "where": (lambda x, t: torch.where(x > t, x, t), [X, TABLE], 1),
    "masked_fill": (lambda x: x.masked_fill(x > 0, 2.0), [X], 1),
    "to": (lambda x: x.to(torch.float32).double(), [X], 1),
    "type_as": (lambda x, t: x.float().type_as(t), [X, TABLE], 1),
    "linear": (lambda x, w: F.linear(x, w), [X, WEIGHT], 1),
    "matmul rows": (lambda x, w: x @ w.t(), [X, WEIGHT], 1),
    "matmul columns": (lambda x, w: w @ x.transpose(1, 2), [X, WEIGHT], 1),
    "matmul batch": (lambda x, y: x @ y, [randn(2, 6, 5, 8), randn(6, 8, 3)], 1),
    "bmm": (torch.bmm, [randn(4, 6, 5), randn(4, 5, 3)], 1),
    "addmm": (torch.addmm, [randn(7), randn(6, 5), randn(5, 7)], None),
    "baddbmm": (lambda a, b, c: torch.baddbmm(c, a, b), [randn(4, 6, 5), randn(4, 5, 3), randn(4, 6, 3)], 1),
    "einsum": (lambda x, w: torch.einsum("btc,oc->bto", x, w), [X, WEIGHT], 1),
    "einsum reorders": (lambda x: torch.einsum("nhwpqc->nchpwq", x), [randn(2, 6, 4, 3, 2, 5)], 1),
    "outer": (torch.outer, [randn(12), randn(5)], 0),
    "layer_norm": (lambda x: F.layer_norm(x, (8,)), [X], 1),
    "rms_norm": (lambda x: F.rms_norm(x, (8,)), [X], 1),
    "group_norm": (lambda x: F.group_norm(x, 2), [randn(6, 4, 5)], 0),
    "softmax": (lambda x: x.softmax(-1), [X], 1),
    "glu": (lambda x: F.glu(x, -1), [X], 1),
    "cumsum": (lambda x: x.cumsum(-1), [X], 1),
    "dropout in eval": (lambda x: F.dropout(x, 0.5, training=False), [X], 1),
    "mean of width": (lambda x: x.mean(-1), [X], 1),
    "mean of width, kept": (lambda x: x.mean(-1, keepdim=True), [X], 1),
    "mean of batch": (lambda x: x.mean(0), [X], 1),
    "max of width": (lambda x: x.max(-1).values, [X], 1),
    "norm": (lambda x: torch.linalg.vector_norm(x, dim=-1), [X], 1),
    "view": (lambda x: x.view(3, 12, 2, 4), [X], 1),
    "flatten": (lambda x: x.view(3, 12, 2, 4).flatten(2), [X], 1),
    "unflatten": (lambda x: x.unflatten(-1, (2, -1)), [X], 1),
    "unsqueeze": (lambda x: x.unsqueeze(1), [X], 1),
    "squeeze": (lambda x: x.unsqueeze(1).squeeze(1), [X], 1),
    "squeeze of all": (lambda x: x.squeeze(), [randn(1, 2, 1, 8)], 1),
    "merges the batch": (lambda x: x.flatten(0, 1), [randn(6, 5, 8)], 0),
    "splits the batch": (lambda x: x.unflatten(0, (6, 2)), [randn(12, 5)], 0),
    "transpose": (lambda x: x.transpose(1, 2), [X], 1),
    "permute": (lambda x: x.permute(2, 0, 1), [X], 1),
    "movedim": (lambda x: x.movedim((0, 1), (2, 0)), [X], 1),
    "swapaxes": (lambda x: x.swapaxes(0, 1), [X], 1),
    "t": (lambda x: x.t(), [TABLE], 0),
    "expand": (lambda x: x.expand(5, 3, 12, 8), [X], 1),
    "repeat": (lambda x: x.repeat(2, 1, 3), [X], 1),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, -1), [X], 1),
    "chunk": (lambda x: torch.cat(x.chunk(2, -1)[::-1], -1), [X], 1),
    "split": (lambda x: x.split(3, -1)[1], [X], 1),
    "unbind": (lambda x: x.unbind(-1)[2], [X], 1),
    "select": (lambda x: x[:, :, 3], [X], 1),
    "select of batch": (lambda x: x[1], [X], 1),
    "slice": (lambda x: x[..., 1::2], [X], 1),
    "flip": (lambda x: x.flip(-1), [X], 1),
    "roll": (lambda x: x.roll(1, -1), [X], 1),
    "stack": (lambda x: torch.stack([x, -x], -1).flatten(-2), [X], 1),
    "stack in front": (lambda x: torch.stack([x, -x]), [X], 1),
    "cat of width": (lambda x, t: torch.cat([x, t.expand(3, 12, 8)], -1), [X, TABLE], 1),
    "pad of width": (lambda x: F.pad(x, (0, 2)), [X], 1),
    "embedding": (lambda w, i: F.embedding(i, w), [randn(9, 4), torch.arange(12)[None] % 9], None),
    "complex": (lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * 1j).flatten(2), [X], 1),
    "conv2d of a batch": (lambda x, w: F.conv2d(x, w, padding=1), [randn(6, 4, 5, 7), randn(3, 4, 3, 3)], 0),
    "upsample of a batch": (lambda x: F.interpolate(x, scale_factor=2.0), [randn(6, 4, 5, 7)], 0),
    "writes a part": (lambda x: _rope(x), [X], 1),
}  # fmt: skip


def _rope(x):
    """As Wan's rotary embedding: the halves are written into an empty tensor."""
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 0::2] - x[..., 1::2]
    out[..., 1::2] = x[..., 0::2] + x[..., 1::2]
    return out


def doubled(function):
    """The function of a tensor of which a rank has a part alone, where it has an input whole too."""
    return lambda x: function(x * 2)


def close(result, expected):
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("name", STAYS)
def test_a_part_stays_a_part(name, size):
    function, inputs, dim = STAYS[name]
    dims = {0: dim} if dim is not None else {1: int(name == "embedding")}
    position, along = next(iter(dims.items()))
    if inputs[position].shape[along] < size:
        pytest.skip("fewer elements than ranks")
    batch = name in ("merges the batch", "splits the batch")
    result, plan, counts = run(function, inputs, size, dims=dims)
    close(result, function(*inputs))
    assert plan.begins
    if not (batch and inputs[0].shape[0] % size):
        outputs = [each for each in plan.gathered if each.reason == "an output of the graph"]
        assert plan.gathered == tuple(outputs), plan.gathered
        assert counts == {"all_gather_into_tensor": 1}


# What needs the whole: it is gathered, and the result is right. Each looks like something that stays.
GATHERS = {
    "cumsum of tokens": (lambda x: x.cumsum(1), X, 1),
    "softmax over tokens": (lambda x: x.softmax(1), X, 1),
    "max over tokens": (lambda x: x.amax(1), X, 1),
    "flip of tokens": (lambda x: x.flip(1), X, 1),
    "roll of tokens": (lambda x: x.roll(1, 1), X, 1),
    "roll of all": (lambda x: x.roll(1), X, 1),
    "norm of tokens": (lambda x: F.layer_norm(x, (12, 8)), X, 1),
    "group_norm of tokens": (lambda x: F.group_norm(x.transpose(1, 2), 2), X, 1),
    "every second token": (lambda x: x[:, ::2], X, 1),
    "a slice that is no segment": (lambda x: x[:, 2:7], X, 1),
    "a token": (lambda x: x[:, 3], X, 1),
    "repeat of tokens": (lambda x: x.repeat(1, 2, 1), X, 1),
    "repeat_interleave of tokens": (lambda x: x.repeat_interleave(2, 1), X, 1),
    "pad of tokens": (lambda x: F.pad(x, (0, 0, 1, 1)), X, 1),
    "chunk of tokens": (lambda x: torch.add(*x.chunk(2, 1)), X, 1),
    "contraction": (lambda x: x.transpose(1, 2) @ x, X, 1),
    "einsum contracts": (lambda x: torch.einsum("btc,btd->bcd", x, x), X, 1),
    "scores of all pairs": (lambda x: x @ x.transpose(1, 2), X, 1),
    "conv1d of tokens": (lambda x: F.conv1d(x.transpose(1, 2), torch.ones(2, 8, 3).double(), padding=1), X, 1),
    "conv2d of rows": (lambda x: F.conv2d(x, torch.ones(2, 4, 3, 3).double(), padding=1), randn(2, 4, 12, 5), 2),
    "upsample of rows": (lambda x: F.interpolate(x, scale_factor=2.0), randn(2, 4, 12, 5), 2),
    "pool of rows": (lambda x: F.max_pool2d(x, 2), randn(2, 4, 12, 6), 2),
    "view across": (lambda x: x.transpose(1, 2).reshape(3, 96), X, 1),
    "merges behind the batch": (lambda x: x.flatten(0, 1), X, 1),
    "index": (lambda x: x[:, torch.tensor([3, 0, 5])], X, 1),
    "sort": (lambda x: x.sort(1).values, X, 1),
    "unfold": (lambda x: x.unfold(1, 3, 1), X, 1),
    "interleaves tokens": (lambda x: torch.stack([x, -x], 2).flatten(1, 2), randn(2, 11, 8), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", GATHERS)
def test_what_mixes_elements_is_gathered(name):
    function, x, dim = GATHERS[name]
    result, plan, _ = run(doubled(function), [x], 2, dims={0: dim})
    close(result, function(x * 2))
    assert any(each.reason != "an output of the graph" for each in plan.gathered), plan.gathered


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("lengths", [(8, 24), (5, 13), (1, 12), (9, 8)])
def test_text_and_image_are_joined_and_cut(size, lengths):
    text, image = (randn(2, length, 8) for length in lengths)
    first = lengths[0]

    def joint(text, image, table):
        both = torch.cat([text, image], 1) * table
        back, front = both[:, first:], both[:, :first]
        one, other = both.split([first, both.shape[1] - first], 1)
        return back, front, one + front, both.narrow(1, first, both.shape[1] - first) + other

    inputs = [text, image, randn(sum(lengths), 8)]
    result, plan, _ = run(joint, inputs, size, dims={1: 1})
    for one, other in zip(result, joint(*inputs), strict=True):
        close(one, other)
    if first > 1:  # one token of text is gathered: a dimension of size 1 broadcasts
        assert {each.reason for each in plan.gathered} == {"an output of the graph"}


@pytest.mark.parametrize("how", ["mean", "sum"])
def test_a_reduction_over_tokens_is_added_up(how):
    def function(x):
        return x * getattr(x, how)(1, keepdim=True)

    result, plan, counts = run(doubled(function), [X], 2, dims={0: 1})
    close(result, function(X * 2))
    assert (plan.summed, counts) == (1, {"all_reduce": 1, "all_gather_into_tensor": 1})
    result, plan, counts = run(doubled(function), [X], 5, dims={0: 1})  # copies behind the end must not count
    close(result, function(X * 2))
    assert plan.summed == 0
    assert counts == {"all_gather_into_tensor": 2}


def test_random_numbers_are_drawn_for_the_whole():
    module = traced(lambda x: F.dropout(x * 2, 0.5, training=True), [X])
    plan = analyse(module, {}, 2, wanted={module.graph.find_nodes(op="placeholder")[0]: 1}).plan
    assert any("dropout" in each.reason for each in plan.gathered)


def test_a_write_through_a_copy_is_refused():
    def function(x):
        y = x * 2
        y.view(36, 8)[:4] = 0  # the view needs the whole tensor: a write into it would not be seen in the rank's part
        return y + 1

    with pytest.raises(NotSharedError, match="written in place"):
        run(function, [X], 2, dims={0: 1})


def test_a_tensor_gathered_before_a_write_is_gathered_anew():
    def function(x):
        y = x * 2
        before = y.cumsum(1)
        y.add_(1)
        return before, y.cumsum(1)

    result, _, counts = run(function, [X], 2, dims={0: 1})
    for one, other in zip(result, function(X), strict=True):
        close(one, other)
    assert counts == {"all_gather_into_tensor": 2}


def test_a_wrong_rule_would_be_seen(monkeypatch):
    """Convolution without its neighbours, as DTensor has it in PyTorch 2.13 and 2.15."""
    function, x, dim = GATHERS["conv2d of rows"]

    def without_halo(call):
        for each in range(4):
            if each != 1:
                yield rows.Row(each, (each, None))

    monkeypatch.setitem(rows.ROWS, "conv2d", without_halo)
    with pytest.raises(AssertionError, match="not close"):
        close(run(doubled(function), [x], 2, dims={0: dim})[0], function(x * 2))
