"""The example that trains a video DiT: its videos, its weights in 8 bits, and its sampler where the answer is known."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from attnrewrite.entrances.choices import make_policy
from attnrewrite.measuring.capturing import capture

sys.path.insert(0, str(Path(__file__).parent.parent / "examples/moving_digits"))
import moving_digits
import train


def test_digits_move_in_straight_lines_and_bounce():
    images, _ = moving_digits.digits()
    drawn = moving_digits.videos(images[:5], (40, 48, 33), torch.Generator().manual_seed(0))
    assert drawn.shape == (5, 1, 40, 48, 33)
    assert drawn.min() == -1
    assert drawn.max() <= 1
    ink = ((drawn[:, 0] + 1) / 2).double()
    total = ink.sum((-2, -1))
    assert torch.allclose(total, total.mean(1, keepdim=True), rtol=0.05)  # no digit leaves the frame
    for dim, length in ((-2, 33), (-1, 48)):
        middle = (ink.sum(dim) * torch.arange(length)).sum(-1) / total
        speed = middle.diff(dim=1).abs()
        typical = speed.median(1, keepdim=True).values
        assert ((typical > 0.45) & (typical < 2.05)).all()
        turns = (speed - typical).abs() > 0.15
        assert 0 < turns.sum() < 0.2 * turns.numel()  # only where a digit meets an edge


def test_weights_survive_eight_bits(tmp_path):
    torch.manual_seed(0)
    model = moving_digits.build(layers=1)
    moving_digits.save(model, tmp_path / "w.safetensors")
    assert (tmp_path / "w.safetensors").stat().st_size < 1.1 * sum(each.numel() for each in model.parameters())
    loaded = moving_digits.load(tmp_path / "w.safetensors", torch.bfloat16)
    kept = {name: each.dtype for name, each in loaded.named_parameters()}
    assert kept["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    assert kept["scale_shift_table"] == kept["condition_embedder.time_embedder.linear_1.weight"] == torch.float32
    for name, weight in moving_digits.load(tmp_path / "w.safetensors").state_dict().items():
        before = model.state_dict()[name].flatten(1) if weight.dim() > 1 else model.state_dict()[name][None]
        step = before.abs().amax(1, keepdim=True) / 254
        assert (
            ((weight.flatten(1) if weight.dim() > 1 else weight[None]) - before).abs().le(1.01 * step + 1e-6).all()
        ), name
    with pytest.raises(FileNotFoundError):
        moving_digits.load(tmp_path / "none.safetensors")


def test_attention_that_starts_local():
    """Each head attends few keys, the nearest; the second head more than the first; queries and keys still learn."""
    torch.manual_seed(0)
    model = moving_digits.build(layers=1)
    train.start_local(model)
    attention, grid, seen = model.blocks[0].attn1, (6, 10, 12), {}

    def receive(captured):
        if captured.call.role == "self":
            query, key = captured.query[0], captured.key[0]
            seen["weights"] = (query @ key.mT / 128**0.5).softmax(-1)

    inputs = {
        "hidden_states": torch.randn(1, 1, 6, 20, 24), "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": moving_digits.prompts(torch.tensor([3])), "return_dict": False,
    }  # fmt: skip
    with torch.no_grad():
        capture(model, (), inputs, receive, make_policy(["native"]))
    places = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), -1).flatten(0, 2)
    apart = (places[:, None] - places).abs().amax(-1)
    near = [(seen["weights"] * (apart <= reach)).sum(-1).mean(-1) for reach in (1, 2, 4)]
    assert near[0][0] > 0.95 > near[0][1] > 0.7, near
    assert near[2].min() > 0.99, near
    learned = {name for name, each in attention.named_parameters() if each.requires_grad}
    assert {"to_q.weight", "to_k.weight", "to_v.weight", "to_v.bias"} <= learned
    assert not {"to_q.bias", "to_k.bias", "norm_q.weight", "norm_k.weight"} & learned
    fast, slow = train.groups(model, local=True)
    assert {id(each) for each in slow["params"]} == {id(attention.to_q.weight), id(attention.to_k.weight)}
    assert slow["relative"] < fast["relative"] == 1
    assert len(fast["params"]) + len(slow["params"]) == len(list(model.parameters()))


def test_the_sampler_follows_the_flow():
    """A denoiser that knows the video gives the velocity noise - video, whatever the step: the sampler ends at the video."""
    video = moving_digits.videos(moving_digits.digits()[0][:2], (3, 28, 24), torch.Generator().manual_seed(0))
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(1))
    times = []

    def denoiser(hidden_states, timestep, encoder_hidden_states, return_dict):
        assert encoder_hidden_states.shape == (2, *moving_digits.TEXT)
        times.append(timestep[0].item())
        return (noise - video,)

    denoiser.proj_out = SimpleNamespace(weight=torch.zeros(1))
    drawn = moving_digits.Pipeline(denoiser, steps=7)(torch.tensor([3, 8]), noise)
    assert times == sorted(times, reverse=True)
    assert len(times) == 7
    assert (drawn - video).abs().max() < 1e-4
