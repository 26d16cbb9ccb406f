#!/usr/bin/env bash
# A model compiled with `torch.compile(..., dynamic=False)` sets torch._dynamo.config.automatic_dynamic_shapes to False while it is called,
# and then puts back what it found. Before PyTorch 2.13 this setting is one for the whole process. Where calls in two threads overlap,
# as in a server with two pipelines, and the one that began first ends first, the second puts back the False of the first: from then on
# no size becomes dynamic in this process, and a function that is compiled without `dynamic=` compiles anew for each new size. No
# warning says so. Only the calls overlap here, not the compilations.
#
# Seen 2026-11-30 with torch 2.11.0 (CPU), Python 3.11; 2.9.1 and 2.11.0 print the same, 2.13.0 "True 2" in both lines:
# the setting, graphs of a function for five sizes
#   before True 2
#   after False 5
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.11.0" "numpy==2.2.6" 2>/dev/null
cat >"$folder/threads.py" <<'PYTHON'
import threading

import torch


def told(when):
    torch._dynamo.reset()
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    function = torch.compile(lambda x: x.sin() + 1, backend=backend)
    for size in (5, 6, 7, 8, 9):
        function(torch.randn(size))
    print(when, torch._dynamo.config.automatic_dynamic_shapes, len(graphs))


told("before")
inside, leave = {}, {}


def backend(module, inputs):
    def run(*tensors):
        name = threading.current_thread().name
        if name in inside:
            inside[name].set()
            leave[name].wait(60)
        return module(*tensors)

    return run


model = torch.compile(lambda x: x.cos() * 2, backend=backend, dynamic=False)
x = torch.randn(3)
model(x)  # compiled once, here
threads = [threading.Thread(target=model, args=(x,), name=name) for name in ("first", "second")]
for thread in threads:
    inside[thread.name], leave[thread.name] = threading.Event(), threading.Event()
for thread in threads:
    thread.start()
    inside[thread.name].wait(60)
for thread in threads:
    leave[thread.name].set()
    thread.join()
told("after")
PYTHON
printed=$("$folder/venv/bin/python" "$folder/threads.py")
echo "$printed"
[ "$printed" = "before True 2
after False 5" ]
