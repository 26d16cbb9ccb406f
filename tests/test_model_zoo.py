"""Real models: every attention is found, the chosen kernel takes it, and the numbers stay those of the model."""

import copy
import functools
import os

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import attnrewrite

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from fuzz import EveryKernel
from model_zoo import MODELS, SETTINGS
from parity import FLEX_TAKES_MASKS

from attnrewrite import Code

pytestmark = [
    # Chroma itself imports it from where it no longer belongs.
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
    # Mochi enters torch.autocast with float32, to have it off.
    pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported:UserWarning"),
    # Qwen-Image rotates by complex numbers.
    pytest.mark.filterwarnings(
        "ignore:Torchinductor does not support code generation for complex operators:UserWarning"
    ),
    # Inductor imports modules that still script.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

KERNELS = ("_native_flash", "_native_math", "flex")
# The smallest graphs (compiling takes most of the time), a mask in each.
INDUCTOR = ("clip_text", "qwen_image") + (("sana",) if os.environ.get("ATTNREWRITE_SLOW") else ())
BACKWARD = (("flux", "eager"), ("pixart", "aot_eager"), ("hunyuan_dit", "eager")) + (
    (("hunyuan_video", "aot_eager"),) if os.environ.get("ATTNREWRITE_SLOW") else ()
)
NAMED = ("flux", "sdxl_unet", "wan", "z_image", "hunyuan_dit", "clip_text")
# The masks of each model that has some, and what the graph proves of them.
MASKS = {
    # its refiner's mask lets every query see the first key: dense
    "hunyuan_video": ["boolean (3, 2, 9, 9)", *["key padding (3, 33)"] * 3],
    "qwen_image": ["key padding (2, 152)"] * 2,
    # (1 - mask) * -10000 of an integer mask, which may hold any numbers
    "pixart": ["additive (2, 3, 1, 11)"] * 2,
    "ltx_video": ["additive (2, 3, 1, 10)"] * 2,
    "allegro": ["key padding (2, 36)", "additive (2, 2, 1, 10)"] * 2,
    "chroma": ["padding of queries and keys"] * 3,
    "lumina2": ["key padding (3, 9)", *["key padding (3, 29)"] * 2],
    "mochi": ["key padding (2, 10)"],
    "clip_text": ["causal and key padding (4, 17)"] * 2,
    "qwen2": ["causal and key padding (3, 135)"] * 2,
    "t5_encoder": ["additive (2, 3, 141, 141)"] * 2,
    "sana": ["additive (2, 4, 1, 12)"] * 2,
    "z_image": [*["key padding (2, 64)"] * 2, *["key padding (2, 128)"] * 2],
}
REPEATED = ("flux", "wan", "z_image", "sdxl_unet")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class CountAttention(TorchFunctionMode):
    """Counts the attentions of an eager forward.

    `F.multi_head_attention_forward` is one attention: a mode is off inside its own handler, so the SDPA call within is
    not seen again. With need_weights=True it computes the softmax by hand and holds no SDPA. The fused kernels of
    `torch.nn` never run here: their modules avoid them while a mode is on.
    """

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch._C._nn.scaled_dot_product_attention:
            self.count += 1
        elif function is torch.nn.functional.multi_head_attention_forward:
            self.count += kwargs.get("need_weights", True) is False
        return function(*args, **kwargs)


def tensors(output):
    return [value for value in tree_leaves(output) if isinstance(value, torch.Tensor)]


def doubled(values):
    """Floating tensors in float64, the rest as it is, at any depth."""
    return tree_map(
        lambda value: value.double() if torch.is_tensor(value) and value.is_floating_point() else value, values
    )


def distance(outputs, references):
    """The largest relative error among the outputs."""
    assert [output.shape for output in outputs] == [reference.shape for reference in references]
    assert all(reference.dtype == torch.float64 for reference in references)
    return max(
        ((output.double() - reference).norm() / reference.norm()).item()
        for output, reference in zip(outputs, references, strict=True)
    )


@functools.cache
def expected(name):
    """The float64 outputs of the unchanged model, how far its float32 outputs are from them, and its attentions."""
    module, kwargs = MODELS[name]()
    with torch.no_grad():
        with CountAttention() as attention:
            outputs = tensors(module(**kwargs))
        references = tensors(module.double()(**doubled(kwargs)))
    return references, distance(outputs, references), attention.count


def check_outputs(outputs, name):
    references, eager_error, _ = expected(name)
    assert distance(tensors(outputs), references) <= 3 * eager_error + 1e-6


def check_sites(report, name, kernel):
    """Every attention is in the report, once, and the kernel has it: none refuses what these models ask for."""
    _, _, count = expected(name)
    assert count > 0
    assert len(report.sites) == len({site.name for site in report.sites}) == count
    left = [site for site in report.sites if site.chosen is None]
    assert all(site.chosen == kernel and not site.refusals for site in report.sites if site not in left)
    assert sum(graph.unchanged for graph in report.graphs) == len(left)
    if kernel == "flex" and not FLEX_TAKES_MASKS:
        assert all([refused.code for _, refused in site.refusals] == [Code.VERSION] for site in left)
        assert all(site.call.mask.is_boolean for site in left)
    else:
        assert left == []


def run_compiled(name, kernel, inner):
    backend = attnrewrite.with_backend(kernel, inner=inner)
    module, kwargs = MODELS[name]()
    with torch.no_grad(), torch._dynamo.config.patch(SETTINGS.get(name, {})):
        outputs = torch.compile(module, backend=backend)(**kwargs)
    return outputs, backend.report


def every_kernel():
    """All kernels for one trace of Dynamo, which takes most of the time."""
    return EveryKernel({kernel: attnrewrite.with_backend(kernel, inner="eager") for kernel in KERNELS})


@pytest.mark.parametrize("name", MODELS)
def test_every_attention_is_found_and_its_output_kept(name):
    every, (module, kwargs) = every_kernel(), MODELS[name]()
    compiled = torch.compile(module, backend=every)
    for kernel, backend in every.backends.items():
        every.now = kernel
        with torch.no_grad(), torch._dynamo.config.patch(SETTINGS.get(name, {})):
            outputs = compiled(**kwargs)
        check_sites(backend.report, name, kernel)
        check_outputs(outputs, name)
    masks = [str(site.call.mask) for site in backend.report.sites]
    assert [mask for mask in masks if mask != "none"] == MASKS.get(name, [])
    if name in NAMED:  # sites have the paths of their modules
        assert {site.name.partition("#")[0] for site in backend.report.sites} <= set(dict(module.named_modules()))


def test_attention_that_dynamo_does_not_trace_is_left_alone():
    """Without its setting Mochi's joint attentions run in Python; the one that pools the prompt is still traced.

    Dynamo then compiles what the frame that it gave up calls, each for itself; the path is that of the model all the same.
    """
    backend = attnrewrite.with_backend("_native_flash", inner="eager")
    module, kwargs = MODELS["mochi"]()
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match=r"in no graph.*graph break at line \d+: Dynamic shape operator"),
    ):
        outputs = torch.compile(module, backend=backend)(**kwargs)
    assert [site.name for site in backend.report.sites] == ["time_embed.pooler"]
    assert backend.report.swapped == 1
    check_outputs(outputs, "mochi")


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        *((name, "_native_flash") for name in INDUCTOR),
        *((("clip_text", "_native_math"), ("clip_text", "flex")) if os.environ.get("ATTNREWRITE_SLOW") else ()),
    ],
)
def test_under_inductor(name, kernel):
    outputs, report = run_compiled(name, kernel, "inductor")
    check_sites(report, name, kernel)
    check_outputs(outputs, name)


def gradients(module, outputs):
    """Of all parameters, by name, for a loss that depends on every element of the first output."""
    weight = torch.linspace(-1, 2, outputs[0].numel(), dtype=outputs[0].dtype).view(outputs[0].shape)
    (outputs[0] * weight).sum().backward()
    found = {
        name: parameter.grad.double() for name, parameter in module.named_parameters() if parameter.grad is not None
    }
    assert found
    return found


@pytest.mark.parametrize(("name", "inner"), BACKWARD)
def test_gradients(name, inner):
    module, kwargs = MODELS[name]()
    exact = copy.deepcopy(module).double()
    eager = copy.deepcopy(module)
    backend = attnrewrite.with_backend("_native_flash", inner=inner)
    got = gradients(module, tensors(torch.compile(module, backend=backend)(**kwargs)))
    check_sites(backend.report, name, "_native_flash")
    assert all(site.call.needs_grad for site in backend.report.sites)

    wanted = gradients(exact, tensors(exact(**doubled(kwargs))))
    plain = gradients(eager, tensors(eager(**kwargs)))
    assert got.keys() == wanted.keys()
    # A bias of a key has a gradient of zero: rounding there is measured against the whole gradient.
    whole = torch.cat([gradient.flatten() for gradient in wanted.values()]).norm()
    for parameter, gradient in wanted.items():
        rounding = (plain[parameter] - gradient).norm()
        assert (got[parameter] - gradient).norm() <= 3 * rounding + 1e-6 * gradient.norm() + 1e-8 * whole, parameter


@pytest.mark.parametrize("name", REPEATED)
def test_repeated_blocks(name):
    every, (module, kwargs) = every_kernel(), MODELS[name]()
    module.compile_repeated_blocks(backend=every, fullgraph=True)
    for kernel, backend in every.backends.items():
        every.now = kernel
        with torch.no_grad():
            outputs = module(**kwargs)
        # Blocks of one class share a graph as long as their inputs look alike, so there are fewer sites than attentions.
        # A graph that is compiled again for other sizes has symbolic ones, which a kernel may refuse.
        assert 0 < len(backend.report.sites) < expected(name)[2]
        if kernel != "flex" or FLEX_TAKES_MASKS:
            assert backend.report.sites[0].chosen == kernel
        assert all(site.chosen == kernel or str(site.refusals[0][1]) for site in backend.report.sites)
        check_outputs(outputs, name)
