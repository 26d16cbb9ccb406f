"""Measures what the rewrite adds to compile time: seconds of find + plan + swap + tidy on FLUX.1's graph, by depth.

    python bench/pass_cost.py                 # 8, 16, 32 and 57 blocks; about five minutes, most of them Inductor's
    python bench/pass_cost.py --no-inner      # without Inductor: under a minute
    python bench/pass_cost.py --hand-written  # 25, 50 and 100 layers of diffusers' AttnProcessor with a mask instead

The model is diffusers' FluxTransformer2DModel at the published widths: 24 heads of 128, 4096 image and 512 text tokens,
bfloat16. FLUX.1 has 57 blocks (19 double, 38 single); smaller depths keep the proportion. Weights and inputs are fake CPU
tensors, so the 24 GB take no memory. Dynamo, the rewrite and Inductor read no values, so all three work on the graph of the
real model. The model never runs.

first, median   seconds of `rewrite_graph`: the first call on this graph (as in use), and the median over fresh copies of it
per block       median / blocks, in ms: constant over depths if the cost is linear
Dynamo          seconds of Dynamo before and after the backend (tracing, guards)
inner           seconds of Inductor with empty caches on the same graph, as `with_backend("native")` passes it on
share           first / inner

The goal, on two cores: under 1 s at 57 blocks, share under 5 %.
"""

import argparse
import copy
import os
import statistics
import sys
import time

import diffusers
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch._inductor.utils import fresh_cache
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule

import attnrewrite
from attnrewrite.pipeline import rewrite_graph

IMAGE_TOKENS, TEXT_TOKENS = 4096, 512


def flux(blocks):
    """FLUX.1 at its published widths, and its inputs. Call it under a FakeTensorMode."""
    double = round(blocks / 3)
    torch.set_default_dtype(torch.bfloat16)  # fake parameters cannot be cast in place
    model = FluxTransformer2DModel(
        num_layers=double, num_single_layers=blocks - double, num_attention_heads=24, attention_head_dim=128,
        in_channels=64, joint_attention_dim=4096, pooled_projection_dim=768, axes_dims_rope=(16, 56, 56),
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.empty(1, IMAGE_TOKENS, 64),
        "encoder_hidden_states": torch.empty(1, TEXT_TOKENS, 4096),
        "pooled_projections": torch.empty(1, 768),
        "timestep": torch.empty(1),
        "img_ids": torch.empty(IMAGE_TOKENS, 3),
        "txt_ids": torch.empty(TEXT_TOKENS, 3),
    }
    torch.set_default_dtype(torch.float32)
    return model.eval(), inputs


class HandWritten(torch.nn.Module):
    """Layers of diffusers' `AttnProcessor` (baddbmm, softmax, bmm). Each layer repeats an additive mask over its heads."""

    def __init__(self, layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            Attention(320, heads=8, dim_head=40, processor=AttnProcessor()) for _ in range(layers)
        )

    def forward(self, hidden, valid, return_dict=False):
        bias = ((1 - valid.to(hidden.dtype)) * -10000.0)[:, None, :]
        for layer in self.layers:
            hidden = hidden + layer(hidden, attention_mask=bias)
        return (hidden,)


def hand_written(layers):
    return HandWritten(layers).eval(), {
        "hidden": torch.empty(2, 4096, 320),
        "valid": torch.ones(2, 4096, dtype=torch.bool),
    }


def fresh(graph_module):
    """A copy of the graph to rewrite. It shares the fake values, which a rewrite only reads."""
    return GraphModule(graph_module, copy.deepcopy(graph_module.graph))


def measure(blocks, backend, repeats, inner, build=flux):
    """Returns one row of the table: traces the model with Dynamo and measures within the backend call."""
    row = {"blocks": blocks}

    def measure_graph(graph_module, example_inputs):
        started = time.perf_counter()
        row["nodes"] = len(graph_module.graph.nodes)
        policy = attnrewrite.with_backend(backend).policy
        outcomes = [rewrite_graph(fresh(graph_module), policy) for _ in range(repeats)]
        row["sites"], row["swapped"] = len(outcomes[0].plan.sites), outcomes[0].plan.swapped
        row["first"] = outcomes[0].seconds
        row["median"] = statistics.median(outcome.seconds for outcome in outcomes)
        outputs = graph_module.graph.output_node().args[0]
        values = tuple(node.meta["example_value"] for node in outputs)
        if inner:
            compiler = attnrewrite.with_backend("native", inner="inductor")
            with fresh_cache():
                before = time.perf_counter()
                compiler(graph_module, example_inputs)
                row["inner"] = time.perf_counter() - before - compiler.report.seconds
        row["turn"] = time.perf_counter() - started
        return lambda *_: values  # the model never runs

    with FakeTensorMode(), torch.no_grad():
        model, inputs = build(blocks)
        torch._dynamo.reset()
        started = time.perf_counter()
        torch.compile(model, backend=measure_graph, fullgraph=True)(**inputs, return_dict=False)
        row["dynamo"] = time.perf_counter() - started - row["turn"]
    return row


def main():
    parser = argparse.ArgumentParser(description="Seconds of the rewrite on FLUX.1's graph, at several depths.")
    parser.add_argument("--blocks", type=int, nargs="+")
    parser.add_argument(
        "--hand-written", action="store_true", help="measure attention written as matmul and softmax instead of FLUX.1"
    )
    parser.add_argument("--backend", default="_native_flash", help="the kernel that is swapped in")
    parser.add_argument("--repeats", type=int, default=7, help="how many copies of each graph to rewrite")
    parser.add_argument("--no-inner", action="store_true", help="leave Inductor's compilation out")
    options = parser.parse_args()

    build = hand_written if options.hand_written else flux
    depths = options.blocks or ([25, 50, 100] if options.hand_written else [8, 16, 32, 57])
    if options.hand_written:
        print(
            "layers of AttnProcessor with an additive mask, 8 heads of 40, 4096 tokens, float32, fake CPU tensors; not run"
        )
    else:
        print(
            f"FLUX.1 at published widths on fake CPU tensors, bfloat16, {IMAGE_TOKENS} + {TEXT_TOKENS} tokens; not run"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(
        f"{cores} cores, torch {torch.__version__}, diffusers {diffusers.__version__}, Python {sys.version.split()[0]}"
    )
    print(f"swapped in: {options.backend}; inner: Inductor on the same graph, its caches empty")
    # A model of two blocks first: it pays for imports and Inductor's start, once a process.
    measure(2, options.backend, 1, not options.no_inner, build)
    print("blocks  nodes  sites  swapped  first s  median s  per block ms  Dynamo s  inner s  share %", flush=True)
    for blocks in depths:
        row = measure(blocks, options.backend, options.repeats, not options.no_inner, build)
        line = (
            f"{row['blocks']:6d} {row['nodes']:6d} {row['sites']:6d} {row['swapped']:8d} {row['first']:8.3f} "
            f"{row['median']:9.3f} {1000 * row['median'] / blocks:13.2f} {row['dynamo']:9.1f}"
        )
        if "inner" in row:
            line += f" {row['inner']:8.1f} {100 * row['first'] / row['inner']:8.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
