"""Queries and keys with the structure of a video (`attnrewrite bench --numerics sparse`), and what Sol-Attn makes of them."""

import importlib.util

import pytest
import torch
from parity import on_this_gpu, relative

import attnrewrite
from attnrewrite.commands.bench.denoiser import Place
from attnrewrite.commands.bench.denoisers import MODELS
from attnrewrite.commands.bench.model_level import exact
from attnrewrite.commands.bench.structure import Rotary, smooth
from attnrewrite.commands.bench.video_denoisers import wan
from attnrewrite.entrances.choices import make_policy
from attnrewrite.measuring.capturing import capture
from attnrewrite.measuring.reference import reference

CPU = torch.device("cpu")
needs_library = pytest.mark.skipif(
    importlib.util.find_spec("comfy_kitchen") is None,
    reason="comfy-kitchen is not installed: pip install comfy-kitchen",
)


def of_self_attention(structured, measure):
    """What `measure` returns for the self attention of each of two blocks of Wan: one head of 128, 2,048 tokens."""
    at = Place(CPU, torch.float32, structured=structured)
    made = wan(at, "Wan", heads=1, inner=96, layers=2, of=2, size=(8, 32, 32))
    found = []

    def receive(captured):
        if captured.call.role == "self":
            found.append(measure(captured))

    with torch.no_grad():
        capture(made.model, (), {**made.inputs, "return_dict": False}, receive, make_policy(["native"]))
    assert len(found) == 2
    return found


def part_of_keys(captured):
    """The part of the keys that has 90 % of the weight, the mean over all queries."""
    query, key = (each.float() for each in (captured.query, captured.key))
    weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
    most = weights.sort(-1, descending=True).values.cumsum(-1)
    return (most < 0.9).float().mean().item()


def test_the_weights_lie_on_few_keys():
    """2,048 tokens are few frames and rows; of 32,760 a few per cent have the weight."""
    assert max(of_self_attention(True, part_of_keys)) < 0.2
    assert min(of_self_attention(False, part_of_keys)) > 0.5


@needs_library
def test_sol_is_right_with_structure_and_wrong_without():
    import comfy_kitchen

    def error(captured):
        tensors = (captured.query, captured.key, captured.value)
        output = comfy_kitchen.sol_attn(*(each.transpose(1, 2).contiguous() for each in tensors), tau=1.0)
        return reference(captured.call, *tensors, None).error(output.transpose(1, 2))

    right, wrong = of_self_attention(True, error), of_self_attention(False, error)
    print("structured", right, "random", wrong)
    assert max(right) < 2e-2
    assert min(wrong) > 0.3


@pytest.mark.gpu
@pytest.mark.parametrize("structured", [True, False])
def test_tune_tells_structure_on_a_gpu(structured):
    device = torch.device("cuda", 0)
    on_this_gpu("sol")
    at = Place(device, torch.bfloat16, structured=structured)
    made = wan(at, "Wan", heads=2, inner=96, layers=2, of=2, size=(9, 64, 66))
    with torch.no_grad():
        plan = attnrewrite.tune(
            made.model,
            **made.inputs,
            return_dict=False,
            candidates=["sol"],
            numerics="sparse",
            max_error=2e-2,
            progress=False,
        )
    found = [each for site in plan.sites for each in site.measured if each.name == "sol"]
    print("structured" if structured else "random", [each.error for each in found])
    assert len(found) == 2
    assert all(each.error < 2e-2 if structured else each.error > 0.3 for each in found)
    # `sol` may be dropped for its time, as on few tokens.
    assert all(("its error is above" in (each.dropped or "")) is not structured for each in found)


STRUCTURED = ("wan-14b", "wan-14b-720p", "wan-1.3b", "hunyuan", "cogvideox")


@pytest.mark.parametrize("name", MODELS)
def test_models_that_can_have_structure(name):
    """They say that they have it, and compute finite values; the other models say that theirs are random."""
    made = MODELS[name](Place(CPU, torch.float32, small=True, structured=True))
    assert made.data == ("structured, random part 0.3" if name in STRUCTURED else "random")
    with torch.no_grad():
        output, expected = made.step(), exact(made)
    assert output.norm() > 0
    assert relative(output, expected) < 1e-5


@pytest.mark.parametrize(
    ("rotary", "pairs"),
    [
        (Rotary((21, 30, 52), (44, 42, 42), 1e4), (6, 6, 0)),  # Wan, 480p
        (Rotary((21, 45, 80), (44, 42, 42), 1e4), (6, 8, 0)),  # Wan, 720p
        (Rotary((17, 40, 48), (16, 56, 56), 256.0), (4, 14, 0)),  # HunyuanVideo
        (Rotary((13, 30, 45), (16, 24, 24), 1e4), (2, 3, 0)),  # CogVideoX
        (Rotary((9, 7, 4000), (4, 6, 8), 1e4), (1, 1, 2)),  # rows so long that a block is a small part of one
    ],
)
def test_channels_that_follow_position(rotary, pairs):
    found = rotary.followed().split([dim // 2 for dim in rotary.dims])
    assert tuple(int(each.sum()) for each in found) == pairs


def test_a_video_that_is_too_small_for_structure():
    with pytest.raises(ValueError, match=r"tokens=\(1, 2, 3\).* has no channels whose angle turns over the video"):
        Rotary((1, 2, 3), (4, 4, 4), 1e4).followed()


def test_neighbours_are_alike():
    torch.manual_seed(0)
    latents = smooth(Place(CPU, torch.float32), 1, 5, 9, 48, 64)
    assert latents.shape == (1, 5, 9, 48, 64)
    assert latents.std().item() == pytest.approx(1, abs=1e-3)
    for axis in (2, 3, 4):
        near = (latents.diff(dim=axis).std() / latents.std()).item()
        assert near < 0.7, axis  # of independent values: 1.4
