#!/usr/bin/env bash
# PyTorch 2.13.0: a program begins an all-gather, computes a matrix product that does not need it, and then waits. Inductor's code waits
# first and computes after: nothing runs while the exchange is under way.
#
# Two passes do it, each by itself. One moves each operation in front of its first use (reorder_for_locality; what is only returned
# goes to the end), the other looks for a low peak of memory and puts the wait behind its exchange (reorder_for_peak_memory). Both
# are on by default, and both have to be off.
#
# Seen 2026-11-30 with torch 2.13.0 (CPU, a fake process group), Python 3.11; 2.15.0 does the same:
#   {}: all_gather_into_tensor, wait_tensor, mm
#   {'reorder_for_locality': False}: all_gather_into_tensor, wait_tensor, mm
#   {'reorder_for_peak_memory': False}: all_gather_into_tensor, wait_tensor, mm
#   {'reorder_for_locality': False, 'reorder_for_peak_memory': False}: all_gather_into_tensor, mm, wait_tensor
#
# Exits 0 while that is so, 1 when it has changed. Needs a C++ compiler.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "numpy==2.2.6" 2>/dev/null
cat >"$folder/run.py" <<'PYTHON'
import re
import sys

import torch
import torch.distributed as dist
from torch._inductor.utils import run_and_get_code
from torch.testing._internal.distributed.fake_pg import FakeStore

torch._inductor.config.force_disable_caches = True
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
collectives = torch.ops._c10d_functional
CALLS = r"(mm|all_gather_into_tensor|wait_tensor)(?:\.default)?\("


def step(x, wide):
    begun = collectives.all_gather_into_tensor(x, 2, "0")
    beside = torch.mm(x, wide)
    gathered = collectives.wait_tensor(begun)
    return gathered.sum(0) * 2.0, beside


as_seen = True
for off in ((), ("reorder_for_locality",), ("reorder_for_peak_memory",), ("reorder_for_locality", "reorder_for_peak_memory")):
    options = dict.fromkeys(off, False)
    torch.compiler.reset()
    with torch.no_grad():
        _, codes = run_and_get_code(torch.compile(step, options=options), torch.randn(6, 8), torch.randn(8, 40))
    calls = re.findall(CALLS, codes[0][codes[0].index("def call(") :])
    print(f"torch {torch.__version__}: {options}: {', '.join(calls)}")
    beside = ["mm", "wait_tensor"] if len(off) == 2 else ["wait_tensor", "mm"]
    as_seen &= calls == ["all_gather_into_tensor", *beside]
sys.exit(not as_seen)
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/run.py"
