"""`context_parallel_plan`: the plan that is printed, and what it finds in plans that are wrong."""

import pytest
import torch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

import attnrewrite


class Positions(torch.nn.Module):
    def forward(self, hidden_states):
        angles = torch.outer(torch.arange(hidden_states.shape[1]).float(), torch.tensor([1.0, 0.1]))
        return angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)


class Joint(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.image_qkv, self.text_qkv, self.out = (torch.nn.Linear(16, size) for size in (48, 48, 16))

    def forward(self, image, text, mask=None, rotary=None):
        heads = [part.unflatten(-1, (4, 4)).transpose(1, 2) for part in self.image_qkv(image).chunk(3, -1)]
        cos, sin = rotary
        query, key = (each * cos + each.flip(-1) * sin for each in heads[:2])
        texts = [part.unflatten(-1, (4, 4)).transpose(1, 2) for part in self.text_qkv(text).chunk(3, -1)]
        joint = [torch.cat(pair, dim=2) for pair in zip(texts, (query, key, heads[2]), strict=True)]
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(image.shape[:2])], dim=1)[:, None, None]
        output = torch.nn.functional.scaled_dot_product_attention(*joint, attn_mask=mask)
        output = self.out(output.transpose(1, 2).flatten(2))
        return output[:, text.shape[1] :], output[:, : text.shape[1]]


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attn = torch.nn.LayerNorm(16), Joint()

    def forward(self, image, text, mask, rotary, pooled):
        of_image, of_text = self.attn(self.norm(image) * pooled, self.norm(text), mask, rotary=rotary)
        return image + of_image, text + of_text


class Model(torch.nn.Module):
    """Two joint blocks; positions are computed from the number of image tokens."""

    def __init__(self):
        super().__init__()
        self.image_in, self.text_in, self.proj_out = (torch.nn.Linear(16, 16) for _ in range(3))
        self.rope = Positions()
        self.blocks = torch.nn.ModuleList([Block(), Block()])

    def forward(self, image, text, mask=None, weights=None):
        rotary = self.rope(image)
        image, text = self.image_in(image), self.text_in(text)
        pooled = 1.0 if weights is None else (text * weights[..., None]).sum(1, keepdim=True)
        for block in self.blocks:
            image, text = block(image, text, mask, rotary, pooled)
        return self.proj_out(image)


def inputs(image=8, text=6, **more):
    return {
        "image": torch.randn(2, image, 16),
        "text": torch.randn(2, text, 16),
        "mask": torch.ones(2, text) > 0,
        **more,
    }


def cut(dim, dims, output=False):
    return ContextParallelInput(split_dim=dim, expected_dims=dims, split_output=output)


def right():
    return {
        "": {"mask": cut(1, 2)},
        "rope": {0: cut(0, 2, True), 1: cut(0, 2, True)},
        "blocks.0": {"image": cut(1, 3), "text": cut(1, 3)},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }


def evaluated(plan):
    """The plan as a user would paste it."""
    names = {each.__name__: each for each in (ContextParallelInput, ContextParallelOutput)}
    return eval(plan.code(), names) if plan.splits else None


def found(given, **kwargs):
    plan = attnrewrite.context_parallel_plan(Model(), ranks=2, given=given, **(kwargs or inputs()))
    return {each.where: each.reason for each in plan.disagreements}


def test_the_plan_of_a_model():
    """Images cut at the model's inputs would get positions of half the length: the plan cuts them where the blocks begin."""
    plan = attnrewrite.context_parallel_plan(Model(), **inputs())
    assert evaluated(plan) == right()
    assert not plan.unsaid
    assert not plan.given
    assert "of Model over 2 ranks" in str(plan)
    again = attnrewrite.context_parallel_plan(Model(), given=evaluated(plan), **inputs())
    assert not again.disagreements
    assert "given agrees with the graph" in str(again)


def test_the_models_own_plan_is_compared():
    model = Model()
    model._cp_plan = right() | {"blocks.0": {"image": cut(2, 3), "text": cut(1, 3)}}
    plan = attnrewrite.context_parallel_plan(model, **inputs())
    (wrong,) = plan.disagreements
    assert str(wrong) == "image of 'blocks.0': the plan splits dimension 2, and the tokens (8) are dimension 1"
    assert "_cp_plan disagrees with the graph:" in str(plan)


def test_a_mask_that_is_missing():
    given = right()
    del given[""]
    (reason,) = found(given).values()
    assert "leaves it whole (its dimension 1 is the one to split)" in reason
    assert "blocks.0.attn: scaled_dot_product_attention needs each rank's part" in reason


def test_text_that_would_count_twice():
    wrong = found(right() | {"blocks.0": {"image": cut(1, 3)}})
    assert list(wrong) == ["text of the model"]
    assert "blocks.0.attn: cat joins it with a sequence" in wrong["text of the model"]
    assert "would count 2 times" in wrong["text of the model"]


def test_text_that_is_split_and_needed_whole():
    more = inputs(weights=torch.ones(2, 6))
    assert not found(right(), **more)
    wrong = found(right() | {"": {"mask": cut(1, 2), "weights": cut(1, 2)}}, **more)
    assert any("weights of the model" in where for where in wrong)


def test_a_gather_that_is_missing_or_elsewhere():
    given = right()
    del given["proj_out"]
    wrong = found(given)
    assert list(wrong) == ["output 0 of 'proj_out'"]
    assert "gathers nothing here" in wrong["output 0 of 'proj_out'"]
    wrong = found(right() | {"text_in": ContextParallelOutput(gather_dim=1)})
    assert "it would be 2 times as long" in wrong["output 0 of 'text_in'"]
    wrong = found(right() | {"proj_out": ContextParallelOutput(gather_dim=2)})
    assert "along another dimension" in wrong["output 0 of 'proj_out'"]


def test_a_size_that_the_code_reads_elsewhere():
    """Each operation is right, and the code of the model makes positions of a part's length."""
    wrong = found(right() | {"": {"image": cut(1, 3), "mask": cut(1, 2)}, "blocks.0": {"text": cut(1, 3)}})
    assert "its code does not run with the tensors split so" in wrong["the model"]


def test_lengths_that_the_ranks_do_not_divide():
    wrong = found(right(), **inputs(image=8, text=7))
    assert set(wrong) == {"mask of the model", "text of 'blocks.0'"}
    assert all("2 ranks do not divide its length 7" in reason for reason in wrong.values())


def test_names_that_the_model_does_not_have():
    wrong = found(right() | {"blocks.7": {"image": cut(1, 3)}, "rope": right()["rope"] | {"images": cut(1, 3)}})
    assert wrong["the entry 'blocks.7'"] == "Model has no such module"
    assert "Positions has no such parameter" in wrong["images of 'rope'"]


def test_a_number_of_dimensions_that_differs():
    plan = attnrewrite.context_parallel_plan(Model(), given=right() | {"": {"mask": cut(1, 4)}}, **inputs())
    assert any("the plan expects 4: diffusers warns, and splits nothing" in remark for remark in plan.remarks)
    assert [each.where for each in plan.disagreements] == ["mask of the model"]


def test_keys_of_cross_attention():
    """The graph does not show whether a model's processor exchanges them."""

    class Cross(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = torch.nn.Identity(), torch.nn.Identity()

        def forward(self, image, text):
            sdpa = torch.nn.functional.scaled_dot_product_attention
            image = self.inner(image)
            image, text = (each.unflatten(-1, (4, 4)).transpose(1, 2) for each in (image, text))
            return self.outer(sdpa(sdpa(image, image, image), text, text).transpose(1, 2).flatten(2))

    tensors = {"image": torch.randn(2, 8, 16), "text": torch.randn(2, 6, 16)}
    plan = attnrewrite.context_parallel_plan(Cross(), **tensors)
    assert evaluated(plan) == {"": {"image": cut(1, 3)}, "outer": ContextParallelOutput(gather_dim=1, expected_dims=3)}
    given = evaluated(plan) | {"": {"image": cut(1, 3), "text": cut(1, 3)}}
    plan = attnrewrite.context_parallel_plan(Cross(), given=given, **tensors)
    assert not plan.disagreements
    assert any("right only if the model's attention processor exchanges keys" in remark for remark in plan.remarks)


def test_a_model_stays_as_it_is():
    model, tensors = Model(), inputs()
    before = model(**tensors)
    attnrewrite.context_parallel_plan(model, **tensors)
    assert torch.equal(model(**tensors), before)
    # A plan that fails was tried: Dynamo must not have given up on the model's code.
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(**tensors), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_nothing_to_share():
    plan = attnrewrite.context_parallel_plan(torch.nn.Linear(3, 3), torch.ones(2, 3))
    assert "no scaled_dot_product_attention is in a graph" in str(plan)


@pytest.mark.parametrize(
    ("model", "options", "kind", "text"),
    [
        (Model(), {"ranks": 1}, ValueError, "ranks is 1: give the number of devices, 2 or more"),
        (Model(), {"ranks": "2"}, TypeError, "ranks is '2' (str)"),
        (Model(), {"given": [1]}, TypeError, "give a dict of module paths"),
        (Model(), {"given": {"": {"image": 1}}}, TypeError, "give a ContextParallelInput of diffusers"),
        (Model(), {"given": {"proj_out": 1}}, TypeError, "give a ContextParallelOutput of diffusers"),
        (torch.sin, {}, TypeError, "give a torch.nn.Module, whose modules a plan names"),
    ],
)
def test_bad_input(model, options, kind, text):
    with pytest.raises(kind) as raised:
        attnrewrite.context_parallel_plan(model, **options, **inputs())
    assert text in str(raised.value)
