#!/usr/bin/env bash
# PyTorch 2.13.0, torch.compile of flex_attention on a CPU (Inductor's C++ template): a value, or a computed query, that is a part
# of another tensor is read from the beginning of that tensor, in silence. Eager flex_attention is right.
#
# Seen 2026-11-29 with torch 2.13.0 (CPU), Python 3.11, relative errors to scaled_dot_product_attention:
#   values[1]: eager 3e-07, compiled 1.4e+00      the second of two values in one tensor: the first one was read
#   values[0]: eager 3e-07, compiled below 1e-06  no storage offset: right
#   query.mT:  eager 3e-07, compiled 1.1e+00      a query that is computed from a transposed one: read as if it were dense
#
# Exits 0 while that is so, 1 when it has changed. Needs a C++ compiler.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "numpy==2.2.6" 2>/dev/null
cat >"$folder/run.py" <<'PYTHON'
import sys

import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

torch.manual_seed(0)
query, key = torch.randn(2, 4, 160, 16), torch.randn(2, 4, 160, 16)
values = torch.randn(2, 2, 4, 160, 16)
transposed = query.mT.contiguous()
cases = {
    "values[1]": (lambda q, k, v: flex_attention(q, k, v[1]), (query, key, values), values[1], True),
    "values[0]": (lambda q, k, v: flex_attention(q, k, v[0]), (query, key, values), values[0], False),
    "query.mT": (lambda q, k, v: flex_attention(q.mT * 1.0, k, v[0]), (transposed, key, values), values[0], True),
}
as_seen = True
for name, (function, tensors, value, wrong) in cases.items():
    torch.compiler.reset()
    exact = scaled_dot_product_attention(query, key, value)
    with torch.no_grad():
        eager, compiled = ((run(*tensors) - exact).norm() / exact.norm() for run in (function, torch.compile(function)))
    print(f"torch {torch.__version__}: {name}: eager {eager:.0e}, compiled {compiled:.1e}")
    as_seen &= eager < 1e-6 and (compiled > 0.5 if wrong else compiled < 1e-6)
sys.exit(not as_seen)
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/run.py"
