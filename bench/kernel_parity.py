"""Measures the error of every kernel of this machine, called through torch.compile, to float64.

    python bench/kernel_parity.py [--kernels flash sage] [--json bench/results/kernel_parity_h200.json]

For each kernel and case it prints the relative error |out - ref| / |ref| (2-norms; the reference is the unchanged function,
eager in float64), or the code of the refusal, or the error of a library built without this dtype or width. All sizes differ.
Inductor compiles flex, because it generates flex's kernel. All other kernels are ops, which the uncompiled graph calls.
"""

import argparse
import json
import platform
from pathlib import Path

import torch
import torch.nn.functional as F

import attnrewrite
from attnrewrite.planning.usable import usable

BATCH, HEADS, Q_LEN, KV_LEN, DIM = 2, 6, 300, 270, 64


def cases(dtype: torch.dtype, device: str) -> dict[str, tuple[dict, dict]]:
    """Returns name -> (sizes that differ from the usual sizes, arguments of SDPA)."""
    boolean = torch.rand(BATCH, HEADS, Q_LEN, KV_LEN, device=device) > 0.4
    padding = torch.arange(KV_LEN, device=device) < torch.tensor([[200], [131]], device=device)
    empty = boolean.clone()
    empty[:, :, 5] = False
    bias = torch.randn(BATCH, 1, Q_LEN, KV_LEN, device=device, dtype=dtype)
    return {
        "no mask": ({}, {}),
        "causal": ({"kv_len": Q_LEN}, {"is_causal": True}),
        "causal, kv_len 270": ({}, {"is_causal": True}),
        "boolean": ({}, {"attn_mask": boolean}),
        "key padding": ({}, {"attn_mask": padding[:, None, None]}),
        "row without key": ({}, {"attn_mask": empty}),
        "additive": ({}, {"attn_mask": bias}),
        "scale 0.3": ({}, {"scale": 0.3}),
        "grouped 6:2": ({"kv_heads": 2}, {"enable_gqa": True}),
        "value_dim 32": ({"value_dim": 32}, {}),
        "head_dim 20": ({"dim": 20}, {}),
        "head_dim 72": ({"dim": 72}, {}),
        "head_dim 128": ({"dim": 128}, {}),
        "head_dim 256": ({"dim": 256}, {}),
        "q_len 1": ({"q_len": 1}, {}),
    }


def measure(kernel: str, dtype: torch.dtype, device: str, sizes: dict, given: dict) -> float | str:
    torch.compiler.reset()
    torch.manual_seed(0)
    of = {"q_len": Q_LEN, "kv_len": KV_LEN, "kv_heads": HEADS, "dim": DIM, **sizes}
    value_dim = of.get("value_dim", of["dim"])
    shapes = (
        (of["q_len"], HEADS, of["dim"]),
        (of["kv_len"], of["kv_heads"], of["dim"]),
        (of["kv_len"], of["kv_heads"], value_dim),
    )
    query, key, value = (torch.randn(BATCH, *shape, dtype=dtype, device=device).transpose(1, 2) for shape in shapes)
    inner = "inductor" if kernel == "flex" else "eager"
    backend = attnrewrite.with_backend(kernel, inner=inner, numerics="quantised")

    def attend(query, key, value, arguments):
        output = F.scaled_dot_product_attention(query, key, value, **arguments)
        return output.transpose(1, 2).flatten(2)

    try:
        output = torch.compile(attend, backend=backend, fullgraph=True, dynamic=False)(query, key, value, given)
    except RuntimeError as error:
        print(f"{kernel}: {error}")
        return type(error).__name__
    (site,) = backend.report.sites
    if site.chosen is None:
        return site.refusals[0][1].code.value
    exact = {
        name: item.double() if isinstance(item, torch.Tensor) and item.is_floating_point() else item
        for name, item in given.items()
    }
    reference = attend(query.double(), key.double(), value.double(), exact)
    return ((output.double() - reference).norm() / reference.norm()).item()


def runs_here(name: str, machine: attnrewrite.Machine) -> bool:
    """Whether the kernel is installed. Kernels of the hub are left out: they are other builds of the packages' kernels."""
    refused, record = usable(name, machine)
    return refused is None and not isinstance(record.source, attnrewrite.Hub)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=attnrewrite.names(), default=attnrewrite.names())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = attnrewrite.machine_of(torch.device(device))
    kernels = [name for name in arguments.kernels if runs_here(name, machine)]
    results: dict[str, dict[str, dict[str, float | str]]] = {}
    print(f"{machine}; python {platform.python_version()}")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rows = results[str(dtype).removeprefix("torch.")] = {}
        print(
            f"\n{dtype}, ({BATCH}, {HEADS}, {Q_LEN}, {DIM}) x {KV_LEN}\n{'':<20}"
            + "".join(f"{name:>32}" for name in kernels)
        )
        for case, (sizes, given) in cases(dtype, device).items():
            rows[case] = {kernel: measure(kernel, dtype, device, sizes, given) for kernel in kernels}
            cells = (f"{cell:>32.1e}" if isinstance(cell, float) else f"{cell:>32}" for cell in rows[case].values())
            print(f"{case:<20}" + "".join(cells), flush=True)
    if arguments.json:
        record = {
            "machine": machine.to_dict(),
            "python": platform.python_version(),
            "relative_error_or_refusal": results,
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
