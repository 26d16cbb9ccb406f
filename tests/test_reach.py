"""`bench/reach.py`: its own count of attentions, made below the graph, and what it says of a model."""

import reach
import reach_models
import torch
from torch import nn


class Mixed(nn.Module):
    """Three attentions: SDPA, operations, and operations whose weights are mixed between heads, which nothing can take. The
    softmax of a router and a product without a softmax are none."""

    def __init__(self, width):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        q, k, v = (each.unflatten(-1, (3, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        kernel = nn.functional.scaled_dot_product_attention(q, k, v)
        written = (q @ k.mT * 0.25).softmax(-1) @ v
        mixed = torch.einsum("bhij,hg->bgij", (q @ k.mT).softmax(-1), self.mix) @ v
        routed = x.mean(1).softmax(-1)
        return kernel + written + mixed + (q.mT @ k).mean() + routed.mean()


def test_attentions_are_counted_below_the_graph(monkeypatch):
    models = {"mine==1": (("Mixed", "test_reach.Mixed", {"width": 24}, (("real", 2, 7, 24),)),)}
    monkeypatch.setattr(reach_models, "PACKAGES", models)
    row = reach.measured("mine==1", "Mixed")
    assert (row["attention"], row["found"], row["swapped"]) == (3, 2, 2)
    assert row["error"] < 1e-5
    assert row["exact"] == "float64"
    assert len(row["left"]) == 1
    assert "softmax" in row["left"][0]
    said = reach.told("mine==1", "Mixed", row)
    assert said.split("\n")[0].split()[:5] == ["mine", "Mixed", "3", "2", "2"]
    assert said.split("\n")[1].startswith("    1 x ")


def test_a_model_that_does_not_run_is_told():
    assert reach.told("mine==1", "Gone", {"failed": "TypeError: no"}).endswith("failed: TypeError: no")
