#!/usr/bin/env bash
# A softmax written by hand in the stable way, exp(s - s.amax(-1)), has NaN gradients under torch.compile in bfloat16 and float16 where
# s is computed in the same graph (here a division): all of them NaN, eager finite, float32 finite. Inductor computes s in float32 for
# the comparison with its maximum, and the maximum was rounded to the narrow dtype: no element equals it, and amax's backward divides
# by the number of equal elements, 0. torch.softmax is not concerned. With emulate_precision_casts=True the gradients are finite.
#
# Seen 2026-11-29 on a CPU, NaN of 80 elements:
#   torch 2.13.0: eager 0, compiled 80, float16 80, float32 0, emulate_precision_casts 0; torch 2.15.0: the same
#
# Exits 0 while that is so, 1 when it has changed. Needs a C++ compiler.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "numpy==2.2.6" 2>/dev/null
cat >"$folder/gradient.py" <<'PYTHON'
import torch


def weights(scores):
    scores = scores / 6.3
    return (scores - scores.amax(-1, keepdim=True)).exp()


def missing(function, dtype=torch.bfloat16):
    torch.manual_seed(0)
    scores = torch.randn(4, 20).to(dtype).requires_grad_()
    function(scores).float().sum().backward()
    return scores.grad.isnan().sum().item()


def compiled(**options):
    torch.compiler.reset()
    return torch.compile(weights, options=options)


print(
    "eager", missing(weights), "compiled", missing(compiled()), "float16", missing(compiled(), torch.float16),
    "float32", missing(compiled(), torch.float32), "emulated", missing(compiled(emulate_precision_casts=True)),
)
PYTHON
said=$("$folder/venv/bin/python" -W ignore "$folder/gradient.py" 2>/dev/null | tail -1)
echo "NaN of 80: $said"
[ "$said" = "eager 0 compiled 80 float16 80 float32 0 emulated 0" ]
