"""Sol-Attn on joint sequences, of a video and a text with padding: the text's tokens are the sinks, as the graph shows them. On
the library's own reference, on a stand-in, and on a GPU."""

import sys

import pytest
import torch
from parity import attend, compiled, doubled, on_this_gpu, relative
from test_sol import local, needs_library, on_cpu

import attnrewrite
from attnrewrite import AttentionCall, Code, Machine, Mask, MaskKind
from attnrewrite.commands.bench.denoiser import Place
from attnrewrite.commands.bench.denoisers import MODELS

TEXT, REAL = 77, (30, 52)  # tokens of the text, and those of each prompt that are no padding
LAST = "sinks: the last 77 tokens to exact blocks, all tokens attend them, and they all tokens"
FIRST = LAST.replace("last", "first")


class Joint(torch.nn.Module):
    """Fused projections of a video and of a text, norms, a rotary embedding of the video, joined: the operands of the attention
    are views as models make them. `masking` makes the mask of what a caller passes."""

    def __init__(self, text_first, masking=lambda mask, video: mask):
        super().__init__()
        self.text_first, self.masking = text_first, masking

    def join(self, video, text):
        return torch.cat([text, video] if self.text_first else [video, text], dim=1)

    def forward(self, video, text, scale, table, mask=None):
        of_video = video.unflatten(-1, (3, 3, -1)).unbind(2)
        of_text = [each.unflatten(2, (3, -1)) for each in text.chunk(3, dim=-1)]
        query, key, value = (self.join(*pair) for pair in zip(of_video, of_text, strict=True))
        query, key = query * scale, key * scale  # a norm's weight
        query, key = (each * table[:, None, None] for each in (query, key))  # stands for a rotary embedding
        tensors = (each.transpose(1, 2) for each in (query, key, value))
        return attend(*tensors, self.masking(mask, video))


def inputs(text_first, device="cpu", louder=40.0, **sizes):
    """A video with structure, and a text whose padded tokens would change every row."""
    query, key, value = local(sinks=TEXT, device=device, **sizes)
    for prompt, real in enumerate(REAL[: query.shape[0]]):
        value[prompt, :, real:TEXT] *= louder
        key[prompt, :, real:TEXT] *= min(louder, 3.0)
    fused = torch.stack([each.transpose(1, 2) for each in (query, key, value)], dim=2).flatten(2)
    text, video = fused[:, :TEXT], fused[:, TEXT:]  # slices of one tensor, with offsets
    real = torch.arange(TEXT, device=device) < torch.tensor(REAL[: query.shape[0]], device=device)[:, None]
    ones = torch.ones(query.shape[-1], device=device, dtype=query.dtype)
    return video, text, ones, torch.ones(fused.shape[1], device=device, dtype=query.dtype), real


def whole(real, video, text_first):
    """The mask of all keys, (batch, keys)."""
    seen = torch.ones(video.shape[:2], dtype=torch.bool, device=video.device)
    return torch.cat([real, seen] if text_first else [seen, real], dim=1)


def run(name, model, given, inner="eager", dynamic=False):
    torch.compiler.reset()
    backend = on_cpu(name, inner) if given[0].device.type == "cpu" else name
    function, backend = compiled(model, backend, inner, dynamic)
    with torch.no_grad():
        output = function(*given)
    (site,) = backend.report.sites
    return site, output, relative(output, model(*map(doubled, given)))


def steps(site):
    return [str(step) for step in site.steps if step.name != "pad_head_dim"]


def checked(site):
    return any(step.name == "check_padding" for step in site.steps)


@needs_library
@pytest.mark.parametrize("name", ["sol", "sol_topk"])
@pytest.mark.parametrize("text_first", [True, False])
def test_the_text_s_tokens_are_the_sinks(text_first, name):
    *given, _ = inputs(text_first)
    site, _, error = run(name, Joint(text_first), given)
    assert site.chosen == name, site.refusals
    assert site.call.joined == ((77, 573) if text_first else (573, 77))
    assert steps(site) == [FIRST if text_first else LAST]
    (record,) = attnrewrite.records_of(name)
    assert error < record.tolerance.error
    _, _, at_the_wrong_end = run(f"{name}[sinks={'-' if text_first else ''}77]", Joint(text_first), given)
    _, _, without = run(f"{name}[sinks=0]", Joint(text_first), given)
    print(name, error, at_the_wrong_end, without)
    assert min(at_the_wrong_end, without) > 3 * error


@needs_library
@pytest.mark.parametrize("text_first", [True, False])
def test_padding_of_the_text(text_first):
    """The mask as an input of the block, which proves nothing, built in the graph, and added to the scores."""
    (record,) = attnrewrite.records_of("sol")
    *given, real = inputs(text_first)
    mask = whole(real, given[0], text_first)

    def built(mask, video):
        return whole(mask, video, text_first)[:, None, None]

    def added(mask, video):
        return torch.zeros_like(built(mask, video), dtype=video.dtype).masked_fill(~built(mask, video), -torch.inf)

    for masking, passed, proven in (
        (lambda mask, video: mask, mask[:, None, None], False),
        (built, real, True),
        (added, real, True),
    ):
        site, output, error = run("sol", Joint(text_first, masking), [*given, passed])
        assert site.chosen == "sol", site.refusals
        assert site.call.mask.kind is MaskKind.KEY_PADDING
        assert checked(site) is not proven
        print(text_first, masking.__name__, error)
        assert error < record.tolerance.error
        assert relative(output, Joint(text_first)(*map(doubled, given))) > 0.3  # without a mask it is another result


@needs_library
def test_padding_of_other_keys_than_the_sinks():
    """Every block is exact then, also where a prompt has no key at all; and by an option too narrow for the padding."""
    *given, real = inputs(False)
    mask = whole(real, given[0], False)
    mask[0, 5:300] = False
    site, _, error = run("sol", Joint(False), [*given, mask[:, None, None]])
    assert (site.chosen, checked(site)) == ("sol", True)
    assert error < 1.2e-2
    mask[1] = False
    _, output, error = run("sol", Joint(False), [*given, mask[:, None, None]])
    assert error < 1.2e-2
    assert not output[1].any()
    site, _, error = run("sol[sinks=-8]", Joint(False), [*given, whole(real, given[0], False)[:, None, None]])
    assert (site.chosen, checked(site)) == ("sol[sinks=-8]", True)
    assert error < 1.2e-2


def test_a_proof_that_is_wrong_is_seen(stand_ins, monkeypatch):
    """What the tests above rest on: if the graph's proof named the wrong part, the bias would lie in no sink."""
    *given, real = inputs(False)
    model = Joint(False, lambda mask, video: whole(mask, video, False)[:, None, None])
    assert run("sol", model, [*given, real])[2] < 1.2e-2
    mask = whole(real, given[0], False)
    mask[:, 5] = False
    monkeypatch.setattr(sys.modules["attnrewrite.passes.understand_masks"], "_whole", lambda *_: [0])
    with pytest.raises(RuntimeError, match="the bias of a block that is no sink"):
        run("sol", Joint(False), [*given, mask[:, None, None]])


def test_sizes_that_change(stand_ins):
    """One graph for all lengths of video and text: the sinks follow the text, and the mask is read at each call."""
    model = Joint(False)
    function, backend = compiled(model, on_cpu("sol", "inductor"), dynamic=True)
    for length in (650, 519, 701):
        *given, real = inputs(False, length=length)
        mask = whole(real, given[0], False)
        mask[:, 1] = length != 519
        with torch.no_grad():
            output = function(*given, mask[:, None, None])
        assert relative(output, model(*map(doubled, given), mask[:, None, None])) < 1.2e-2
    (site,) = backend.report.sites
    assert site.chosen == "sol", site.refusals


def test_padding_without_a_text(stand_ins):
    """Where nothing is joined, or the option says that there are no sinks, key padding is refused; an option says the rest."""
    query, key, value = local(length=300)
    mask = (torch.arange(300) < 280).expand(2, 1, 1, 300)
    for name, taken in (("sol", False), ("sol[sinks=0]", False), ("sol[sinks=-77]", True)):
        function, backend = compiled(attend, on_cpu(name))
        with torch.no_grad():
            output = function(query, key, value, mask)
        (site,) = backend.report.sites
        if taken:
            assert (site.chosen, checked(site)) == (name, True)
        else:
            assert site.refusals[0][1].code is Code.MASK
            assert "the graph does not show a short part" in site.refusals[0][1].detail
            assert "sinks=-N" in site.refusals[0][1].fix
        assert relative(output, attend(*map(doubled, (query, key, value)), mask)) < 1.2e-2
        torch.compiler.reset()


def test_models_of_diffusers():
    """HunyuanVideo counts the keys of its text before its blocks; a block of Qwen-Image appends ones to the text's mask."""
    backend = attnrewrite.with_backend("sol", numerics="sparse")
    machine = Machine("cuda", (9, 0), {"comfy-kitchen": "0.2.40"})
    made = MODELS["hunyuan"](Place(torch.device("cpu"), torch.bfloat16, small=True))
    with torch.no_grad():
        report = attnrewrite.explain(made.model, **made.inputs, backend=backend, machine=machine)
    sites = [site for site in report.sites if "transformer_blocks" in site.name]
    assert len(sites) == 2
    for site in sites:
        assert (site.chosen, site.call.joined, checked(site)) == ("sol", (36, 9), True), site.refusals

    made = MODELS["qwen-image"](Place(torch.device("cpu"), torch.bfloat16, small=True))
    block = next(each for each in made.model.modules() if type(each).__name__ in made.blocks)
    calls = []
    with torch.no_grad(), block.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True):
        made.model(**made.inputs)
    ((args, kwargs),) = calls
    with torch.no_grad():
        report = attnrewrite.explain(block, *args, **kwargs, backend=backend, machine=machine)
    (site,) = report.sites
    assert (site.chosen, site.call.joined, checked(site)) == ("sol", (9, 25), False), site.refusals


def test_calls_in_files():
    mask = Mask(MaskKind.KEY_PADDING, "bool", (1, 1, 1, 45), whole=(0,))
    call = AttentionCall("a", 1, 2, 2, 45, 45, 8, 8, "bfloat16", mask=mask, joined=(36, 9))
    assert AttentionCall.from_dict(call.to_dict()) == call
    old = call.to_dict()
    del old["joined"], old["mask"]["whole"]
    assert AttentionCall.from_dict(old).joined == ()


@pytest.mark.parametrize(
    ("joined", "said"),
    [
        ((573, 77), "the last 77 tokens"),
        ((77, 573), "the first 77 tokens"),
        ((573, 40, 37), "the last 77 tokens"),
        ((70, 573, 7), None),  # a text at each side
        ((325, 325), None),
    ],
)
def test_which_part_is_short(joined, said):
    (record,) = attnrewrite.records_of("sol")
    call = AttentionCall("a", 1, 2, 2, sum(joined), sum(joined), 128, 128, "bfloat16", "cuda", joined=joined)
    decision = attnrewrite.decide(record, call, Machine("cuda", (9, 0), {"comfy-kitchen": "0.2.40"}), record.numerics)
    assert [step.before for step in decision.steps] == ([said] if said else [])


@pytest.mark.gpu
@pytest.mark.parametrize("text_first", [True, False])
def test_joint_sequences_on_a_gpu(text_first):
    """The kernel's own bias: padding that is proven, that is checked, and that hides other keys too."""
    record = on_this_gpu("sol")
    # Values in int8 share a scale: padding that is much louder than the rest would take their precision.
    *given, real = inputs(text_first, "cuda", louder=4.0, batch=2, length=6050, width=2000)
    mask = whole(real, given[0], text_first)
    wide = mask.clone()
    wide[:, 3000:3100] = False
    proven = Joint(text_first, lambda mask, video: whole(mask, video, text_first)[:, None, None])
    for model, passed, limit in (
        (proven, real, record.tolerance.error),
        (Joint(text_first), mask[:, None, None], record.tolerance.error),
        (Joint(text_first), wide[:, None, None], record.tolerance.error),
    ):
        backend = attnrewrite.with_backend("sol", numerics="sparse", strict=True)
        site, _, error = run(backend, model, [*given, passed], inner="inductor")
        print(f"text first: {text_first}, {steps(site)}: error {error:.1e}")
        assert error < limit
        unmasked = Joint(text_first)(*map(doubled, given))
        assert relative(unmasked, model(*map(doubled, [*given, passed]))) > 2 * limit
