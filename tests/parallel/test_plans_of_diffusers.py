"""`context_parallel_plan` of diffusers' own models, and of the plans that diffusers ships."""

import os

import pytest
import torch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from model_zoo import MODELS

import attnrewrite
from attnrewrite.commands.bench import denoisers

slow = pytest.mark.skipif(
    not os.environ.get("ATTNREWRITE_SLOW"),
    reason="a plan takes up to half a minute: ATTNREWRITE_SLOW=1 runs all models",
)
AT = denoisers.Place(torch.device("cpu"), torch.float32, small=True)


def shortened(inputs, **lengths):
    """The inputs with lengths that 2 ranks divide: the first ones along a dimension, as `text=(1, 6)`."""
    return inputs | {name: inputs[name].narrow(dim, 0, length) for name, (dim, length) in lengths.items()}


def small(name, **lengths):
    built = denoisers.MODELS[name](AT)
    return built.model, shortened(built.inputs, **lengths)


def flux():
    return small("flux", hidden_states=(1, 24), img_ids=(0, 24), encoder_hidden_states=(1, 6), txt_ids=(0, 6))


def wan():
    return small("wan-14b")


def qwen_image():
    text = {"encoder_hidden_states": (1, 8), "encoder_hidden_states_mask": (1, 8)}
    model, inputs = small("qwen-image", hidden_states=(1, 24), **text)
    return model, inputs | {"img_shapes": [[(1, 4, 6)], [(1, 4, 6)]]}


def ltx():
    return small("ltx", encoder_hidden_states=(1, 8), encoder_attention_mask=(1, 8))


def cut(dim, dims, output=False):
    return ContextParallelInput(split_dim=dim, expected_dims=dims, split_output=output)


def evaluated(plan):
    return eval(plan.code(), {each.__name__: each for each in (ContextParallelInput, ContextParallelOutput)})


def shipped(model, *without):
    """diffusers' own plan, but for entries that these inputs have nothing for."""
    found = {}
    for path, entry in model._cp_plan.items():
        kept = {key: each for key, each in entry.items() if key not in without} if isinstance(entry, dict) else entry
        if kept:
            found[path] = kept
    return found


@pytest.mark.parametrize(
    ("build", "without"),
    [
        pytest.param(flux, (), marks=slow),
        (wan, ("timestep",)),  # of one dimension: a plan for Wan 2.2, which has a time for each token
        pytest.param(qwen_image, ("modulate_index",), marks=slow),
        # Text stays whole, as every rank's queries need all of it. diffusers shares it and exchanges it at each block.
        pytest.param(ltx, ("encoder_hidden_states", "encoder_attention_mask"), marks=slow),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_shipped_plans(build, without):
    model, inputs = build()
    plan = attnrewrite.context_parallel_plan(model, **inputs)
    assert evaluated(plan) == shipped(model, *without)
    assert plan.given == "_cp_plan"
    assert not plan.disagreements


@slow
def test_models_without_a_plan():
    model, inputs = small("sd3.5", encoder_hidden_states=(1, 6))
    plan = attnrewrite.context_parallel_plan(model, **inputs)
    gathered = ContextParallelOutput(gather_dim=1, expected_dims=3)
    assert evaluated(plan) == {
        "": {"encoder_hidden_states": cut(1, 3)},
        "pos_embed": {0: cut(1, 3, True)},
        "proj_out": gathered,
    }
    model, inputs = MODELS["cogvideox"]()
    plan = attnrewrite.context_parallel_plan(model, **inputs)
    assert evaluated(plan) == {
        "": {"image_rotary_emb": [cut(0, 2), cut(0, 2)]},
        "transformer_blocks.0": {"hidden_states": cut(1, 3), "encoder_hidden_states": cut(1, 3)},
        "proj_out": gathered,
    }


def test_a_mask_that_no_plan_can_split():
    """HunyuanVideo joins the mask of image and text in its forward: one cut cannot give each rank its part of both."""
    model, inputs = small("hunyuan")
    plan = attnrewrite.context_parallel_plan(model, **inputs)
    assert not plan.splits
    assert any(
        "part of attention_mask of 'transformer_blocks.0.attn', along dimension 3 (36 + 9)" in each
        for each in plan.unsaid
    )


@slow
def test_the_mask_of_qwen_image():
    """Split at the model's inputs, as in an old plan, the text has positions of half its length."""
    model, inputs = qwen_image()
    given = shipped(model, "modulate_index", "encoder_hidden_states_mask")
    plan = attnrewrite.context_parallel_plan(model, given=given, **inputs)
    assert {each.where for each in plan.disagreements} & {
        "encoder_hidden_states_mask of the model", "encoder_hidden_states_mask of 'transformer_blocks.0'"
    }  # fmt: skip
    del given["transformer_blocks.0"]
    given[""] = {
        "hidden_states": cut(1, 3),
        "encoder_hidden_states": cut(1, 3),
        "encoder_hidden_states_mask": cut(1, 2),
    }
    plan = attnrewrite.context_parallel_plan(model, given=given, **inputs)
    assert [each.where for each in plan.disagreements] == ["the model"]
    assert "its code does not run with the tensors split so" in plan.disagreements[0].reason
