#!/usr/bin/env bash
# PyTorch 2.13.0: a torch.compile backend that gives two graphs to Inductor in one call (two versions of a graph, to keep the faster
# one), in training: the backward of the first graph overwrites the tensors that the caller gave, in silence.
#
# AOTAutograd notes in Dynamo's tracing context which saved tensors a backward may overwrite ("donated buffers"), and compiles a
# backward when it is first called. By then the notes are those of the second graph. With one graph, with a copy of the tracing
# context for each (torch._guards.tracing(copy.copy(context))), or without donated buffers it is right.
#
# Seen 2026-11-30 with torch 2.13.0 (CPU), Python 3.11:
#   one graph: the weight is unchanged
#   two graphs: the weight is changed by the backward
#   two graphs, a context each: the weight is unchanged
#   two graphs, donated_buffer=False: the weight is unchanged
#
# Exits 0 while that is so, 1 when it has changed. Needs a C++ compiler.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "numpy==2.2.6" 2>/dev/null
cat >"$folder/run.py" <<'PYTHON'
import contextlib
import copy
import sys

import torch

torch._inductor.config.force_disable_caches = True
inductor = torch._dynamo.lookup_backend("inductor")


def two_graphs(own_context, graph_module, example_inputs):
    other = torch.fx.symbolic_trace(lambda x, weight: (torch.mm(x, x).sin() * weight.detach(),))
    compiled = []
    for graph in (graph_module, other):
        context = copy.copy(torch._guards.TracingContext.get())
        with torch._guards.tracing(context) if own_context else contextlib.nullcontext():
            compiled.append(inductor(graph, example_inputs))
    return compiled[0]


cases = {
    "one graph": (inductor, True, True),
    "two graphs": (lambda *given: two_graphs(False, *given), True, False),
    "two graphs, a context each": (lambda *given: two_graphs(True, *given), True, True),
    "two graphs, donated_buffer=False": (lambda *given: two_graphs(False, *given), False, True),
}
as_seen = True
for name, (backend, donated, right) in cases.items():
    torch.compiler.reset()
    torch._functorch.config.donated_buffer = donated
    x, weight = (torch.randn(30, 30, requires_grad=True) for _ in range(2))
    before = weight.detach().clone()
    output = torch.compile(lambda x, weight: x.detach() * weight.cos(), backend=backend)(x, weight)
    assert torch.equal(weight, before)
    output.sum().backward()
    unchanged = torch.equal(weight, before)
    print(f"torch {torch.__version__}: {name}: the weight is {'unchanged' if unchanged else 'changed by the backward'}")
    as_seen &= unchanged == right
sys.exit(not as_seen)
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/run.py"
