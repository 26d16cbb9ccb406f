"""Real models of diffusers, built small, shared among ranks that run side by side: equal to one process, with the exchanges
that the plan names."""

import os

import pytest
import torch
from lockstep import Shared
from model_zoo import MODELS, SETTINGS
from parity import relative

from attnrewrite.parallel import plans

pytestmark = [
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported:UserWarning"),
]

# ATTNREWRITE_SLOW=1 runs all of them: tracing takes seconds a model.
# (model, ranks, kind): lengths and heads that divide and that do not, batches that do.
QUICK = (("wan", 2, "ulysses"), ("qwen_image", 2, "ulysses"))
CASES = (
    *QUICK,
    ("flux", 3, "auto"), ("vae", 2, "ulysses"),
    ("wan", 2, "auto"), ("flux2", 2, "ulysses"), ("sd3", 2, "ulysses"), ("sd3", 4, "auto"), ("hunyuan_video", 2, "ulysses"),
    ("hunyuan_video", 3, "ulysses"), ("ltx_video", 2, "gather"), ("cogvideox", 2, "ulysses"), ("pixart", 2, "ulysses"),
    ("mochi", 2, "ulysses"), ("allegro", 3, "ulysses"), ("z_image", 2, "ulysses"), ("lumina2", 2, "ulysses"),
    ("sdxl_unet", 2, "ulysses"), ("sdxl_unet", 3, "auto"), ("svd_unet", 2, "ulysses"), ("chroma", 2, "ulysses"),
    ("cogview4", 2, "ulysses"), ("aura_flow", 2, "ulysses"), ("latte", 2, "ulysses"), ("hunyuan_dit", 2, "ulysses"),
)  # fmt: skip
# Their attentions run whole on every rank, and why.
WHOLE = {"mochi": "reads a number out of a tensor"}


def double(value):
    if isinstance(value, dict):
        return {name: double(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(double, value))
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize(
    ("name", "size", "kind"), CASES if os.environ.get("ATTNREWRITE_SLOW") else QUICK, ids=lambda each: str(each)
)
def test_a_model_is_shared(name, size, kind):
    model, kwargs = MODELS[name]()
    model, kwargs = model.double(), double(kwargs)
    backend = Shared(size, kind)
    with torch.no_grad(), torch._dynamo.config.patch(SETTINGS.get(name, {})):
        expected = model(**kwargs)[0]
        (result,) = torch.compile(model, backend=backend, dynamic=False)(**kwargs)[:1]
    if isinstance(expected, list):
        expected, result = (torch.cat([each.flatten() for each in every]) for every in (expected, result))
    assert relative(result, expected) < 1e-11
    shared = [plan for plan in backend.plans if plan.sites or plan.refused]
    assert shared
    if name in WHOLE:
        assert all(WHOLE[name] in plan.refused for plan in shared)
        return
    sites = [site for plan in shared for site in plan.sites]
    assert all(site.exchange != plans.WHOLE or site.reason for site in sites)
    assert sum(site.exchange != plans.WHOLE for site in sites) > len(sites) / 2
    assert backend.counts.get("all_to_all_single", 0) >= 2 * sum(site.exchange == plans.ALL_TO_ALL for site in sites)
    gathers = sum(len(plan.gathered) for plan in shared) + sum(site.exchange == plans.KEYS_GATHERED for site in sites)
    assert backend.counts.get("all_gather_into_tensor", 0) == gathers
