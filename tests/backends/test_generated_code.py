"""Inductor's code for a swapped attention inside a model copies no query, key, value or output. Runs on stand-ins."""

import re

import pytest
import torch
import torch.nn.functional as F
from stand_ins import RECORDS, compiler, name_of
from torch._inductor.utils import run_and_get_code

import attnrewrite
from attnrewrite import MaskKind


class Block(torch.nn.Module):
    """A transformer block's attention as diffusers writes it: projections, heads split off, attention, projection."""

    def __init__(self, fused=False, heads=4, dim=64):
        super().__init__()
        self.fused, self.shape = fused, (heads, dim)
        width = heads * dim
        self.qkv = (
            torch.nn.Linear(width, 3 * width)
            if fused
            else torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in "qkv")
        )
        self.out = torch.nn.Linear(width, width)

    def forward(self, hidden, mask=None):
        parts = self.qkv(hidden).chunk(3, -1) if self.fused else [project(hidden) for project in self.qkv]
        query, key, value = (part.unflatten(-1, self.shape).transpose(1, 2) for part in parts)
        output = F.scaled_dot_product_attention(query, key, value, mask)
        return self.out(output.transpose(1, 2).flatten(2))


def code_for(backend, fused, mask=None):
    torch.manual_seed(0)
    block = Block(fused).bfloat16().requires_grad_(False)
    hidden = torch.randn(3, 64, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        compiled = torch.compile(block, backend=backend, fullgraph=True)
        _, (code,) = run_and_get_code(compiled, hidden, *([] if mask is None else [mask]))
    assert all(site.chosen for site in backend.report.sites), backend.report
    return code


def written_by_kernels(code):
    """Half-precision tensors that a kernel of Inductor's own writes: copies, or arithmetic."""
    return re.findall(r"at::(?:BFloat16|Half)\* (?:in_)?out_ptr\d", code)


LEFT_TO_THEMSELVES = {
    "_flash_3_fp8": "casts to fp8 and back",
    "_native_xla": "its keys are masked by segment ids",
    "ck_int8": "(batch, heads, length, dim) is what the library writes",
    "sage_blackwell_hub": "(batch, heads, length, dim): its op makes the dense copies that the kernel needs",
}
PLAIN = [record for record in RECORDS if record.name not in LEFT_TO_THEMSELVES]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("record", PLAIN, ids=name_of)
def test_no_copies(record, fused, stand_ins):
    """Strided views of (batch, length, heads, dim) reach the kernel without a copy, from three projections or from one."""
    code = code_for(compiler(stand_ins(record), "inductor"), fused)
    assert ("torch.ops.attnrewrite." in code) or ("torch.ops.npu." in code)
    assert written_by_kernels(code) == []


@pytest.mark.parametrize("record", [record for record in PLAIN if MaskKind.KEY_PADDING in record.masks], ids=name_of)
def test_packing_gathers_keys_and_values_once(record, stand_ins):
    """With a mask, two tensors are written: the packed keys and the packed values."""
    mask = torch.rand(3, 1, 1, 64) > 0.4
    assert len(written_by_kernels(code_for(compiler(stand_ins(record), "inductor"), fused=False, mask=mask))) <= 2


@pytest.mark.parametrize("fused", [False, True])
def test_copies_would_be_seen(fused):
    """A kernel that wants (batch, heads, length, dim) dense costs copies, and the test above finds them."""

    def dense(query, key, value, _, *, call):
        query, key, value = (tensor.contiguous() for tensor in (query, key, value))
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(query, key, value)[0]

    record = attnrewrite.Backend("dense", "tests", dense, frozenset({"cpu"}), frozenset({"bfloat16"}))
    assert len(written_by_kernels(code_for(attnrewrite.with_backend(record), fused))) >= 3
