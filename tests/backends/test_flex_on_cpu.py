"""flex on a CPU, compiled by Inductor: operands that are parts of a tensor or computed, masks that are parts, every reader.

Inductor's CPU template reads whole buffers (`stored` in backends/flex.py). All forms stand in one model: one compilation.
"""

import pytest
import torch
import torch.nn.functional as F
from parity import compiled, doubled, relative

from attnrewrite import Code

HEADS, DIM = 3, 8


def chunk(x):
    return [each.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for each in x.chunk(3, -1)]


def permute(x):
    """Scaled queries, keys with a bias, values as they lie."""
    query, key, value = x.unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
    return query * 0.5, key + 0.25, value


def groups(x):
    """Key heads that are expanded."""
    query, key, value = (each.transpose(1, 2) for each in x.unflatten(-1, (3, HEADS, DIM)).unbind(2))
    return query, key[:, 1:2].expand(-1, HEADS, -1, -1), value[:, 1:2].expand(-1, HEADS, -1, -1)


FORMS = {  # each form has another layout and another reader
    "chunk": lambda x, *_: F.scaled_dot_product_attention(*chunk(x)).transpose(1, 2).flatten(2),
    "permute": lambda x, *_: F.scaled_dot_product_attention(*permute(x)).relu() + 1,
    "groups": lambda x, *_: torch.cat([F.scaled_dot_product_attention(*groups(x)), chunk(x)[0]], 2),
    "transposed": lambda x, transposed, _: F.scaled_dot_product_attention(chunk(x)[0], *transposed),
    "mask": lambda x, _, bias: F.scaled_dot_product_attention(*chunk(x), bias[..., 2:]) * 2,
}


@pytest.fixture(scope="module")
def outputs():
    """The outputs of the compiled and of the unchanged function by form, and the report."""
    torch.manual_seed(0)
    x, bias = torch.randn(2, 7, 3 * HEADS * DIM), torch.randn(7, 9)
    transposed = [torch.randn(2, HEADS, DIM, 7).mT for _ in range(2)]
    run, backend = compiled(lambda *given: {name: form(*given) for name, form in FORMS.items()}, "flex", "inductor")
    with torch.no_grad():
        found = run(x, transposed, bias)
    wide = doubled(x), [*map(doubled, transposed)], doubled(bias)
    return found, {name: form(*wide) for name, form in FORMS.items()}, backend.report


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_right(outputs, form):
    found, exact, report = outputs
    assert [site.chosen for site in report.sites] == ["flex"] * len(FORMS)
    assert relative(found[form], exact[form]) < 1e-5


def test_narrow_heads():
    """Inductor's C++ for vectors of 8 floats computes 16 keys at a time, and is wrong where 8 are left (`_odd`)."""
    torch.manual_seed(0)
    sizes = [(8, 8), (8, 136), (16, 40), (16, 41), (20, 12), (24, 40)]
    given = [[torch.randn(2, 3, count, dim) for count in (5, keys, keys)] for dim, keys in sizes]
    with torch.no_grad(), torch._inductor.config.patch({"cpp.simdlen": 256}):
        run, backend = compiled(
            lambda given: [F.scaled_dot_product_attention(*each) for each in given], "flex", "inductor"
        )
        outputs = run(given)
    assert [site.chosen for site in backend.report.sites] == ["flex"] * len(sizes)
    for size, each, output in zip(sizes, given, outputs, strict=True):
        assert relative(output, F.scaled_dot_product_attention(*map(doubled, each))) < 1e-5, size


@pytest.mark.parametrize(("keys", "chosen"), [(1, None), (2, "flex")])
def test_one_key_under_a_mask_is_refused(keys, chosen):
    """Inductor's code for it does not compile."""
    tensors = [torch.randn(2, HEADS, length, DIM) for length in (5, keys, keys)]
    mask = torch.ones(2, 1, 1, keys, dtype=torch.bool)
    run, backend = compiled(F.scaled_dot_product_attention, "flex")
    output = run(*tensors, (1.0 - mask.float()) * -1e9)
    (site,) = backend.report.sites
    assert site.chosen == chosen
    assert chosen or site.refusals[0][1].code is Code.LENGTH
    assert relative(output, F.scaled_dot_product_attention(*map(doubled, tensors))) < 1e-5
