#!/usr/bin/env bash
# nn.MultiheadAttention takes a padding mask and an attention mask of two kinds, one boolean and one of numbers, and warns that this is
# deprecated. Under torch.compile the warning itself (warnings.warn in torch/nn/functional.py, _canonical_mask) cannot be traced: the
# graph breaks inside of the attention, whose frame runs uncompiled from then on. No compiler sees the attention, and nothing says so:
# the warning is about masks. With fullgraph=True it is an error. Masks of one kind are traced.
#
# Seen 2026-11-30 with torch 2.13.0 (CPU), Python 3.11: masks, graphs, graphs with the attention
#   boolean padding, numbers 2 0
#   both numbers 1 1
#   both boolean 1 1
#   fullgraph=True: Unsupported, `_warnings.warn`
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "numpy==2.2.6" 2>/dev/null
cat >"$folder/masks.py" <<'PYTHON'
import warnings

import torch

warnings.simplefilter("ignore")
TOKENS, WIDTH = 5, 12


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.attention = torch.nn.MultiheadAttention(WIDTH, 3, batch_first=True)
        self.linear = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x, padding, mask):
        x = self.norm(x)
        attended, _ = self.attention(x, x, x, key_padding_mask=padding, attn_mask=mask, need_weights=False)
        return x + self.linear(attended)


def names_of_graphs(padding, mask, **options):
    found = []

    def backend(module, inputs):
        nodes = [node for node in module.graph.nodes if node.op == "call_function"]
        found.append({getattr(node.target, "__name__", "") for node in nodes})
        return module.forward

    torch._dynamo.reset()
    block = Block().eval().requires_grad_(False)
    torch.compile(block, backend=backend, **options)(torch.randn(2, TOKENS, WIDTH), padding, mask)
    return found


ATTENTION = {"multi_head_attention_forward", "scaled_dot_product_attention"}
padded = torch.tensor([[False] * TOKENS, [False] * 3 + [True] * 2])
future = torch.ones(TOKENS, TOKENS).triu(1).bool()


def numbers(hidden):
    return torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))


for name, padding, mask in (
    ("boolean padding, numbers", padded, numbers(future)),
    ("both numbers", numbers(padded), numbers(future)),
    ("both boolean", padded, future),
):
    graphs = names_of_graphs(padding, mask)
    print(name, len(graphs), sum(bool(each & ATTENTION) for each in graphs))
try:
    names_of_graphs(padded, numbers(future), fullgraph=True)
except torch._dynamo.exc.Unsupported as error:
    print("fullgraph=True: Unsupported,", "`_warnings.warn`" if "`_warnings.warn`" in str(error) else error)
PYTHON
printed=$("$folder/venv/bin/python" "$folder/masks.py")
echo "$printed"
[ "$printed" = "boolean padding, numbers 2 0
both numbers 1 1
both boolean 1 1
fullgraph=True: Unsupported, \`_warnings.warn\`" ]
