"""The error of `_flash_3_fp8` with each of its options on four kinds of data, and what the options cost.

    python bench/fp8_error.py [--json bench/results/fp8_error_h200.json] [--rounds 21]

For each kind of data and each variant it prints the relative error |out - ref| / |ref| at (1, 8, 8192, 128) against float64, on
256 query rows of each head. Then it times one attention at (1, 40, 32760, 128), compiled with Inductor, behind the steps that a
transformer block has there: an RMS norm and a rotation by position, so that Inductor has something to fuse the casts with. All
variants take turns in every round; it prints the median of the rounds' ratios to `_flash_3_fp8` without options.

Needs a Hopper GPU and fa3-fwd.
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import attnrewrite
from attnrewrite.commands.bench.rounds import by_rounds, in_turn
from attnrewrite.measuring.timing import Stopwatch

NAME = "_flash_3_fp8"
VARIANTS = (NAME, f"{NAME}[rotate=1]", f"{NAME}[center=1]", f"{NAME}[center=1,rotate=1]")
KERNELS = ("_flash_3", *VARIANTS)
SHAPE = (1, 8, 8192, 128)  # of the errors
LARGE = (1, 40, 32760, 128)  # of the times: Wan2.1 14B at 480p
ROWS = 256


def data(kind: str, shape: tuple[int, ...] = SHAPE) -> list[torch.Tensor]:
    """Query, key and value (batch, heads, length, dim) in bfloat16, laid out (batch, length, heads, dim) in memory."""
    batch, heads, length, dim = shape
    torch.manual_seed(0)
    query, key, value = (torch.randn(batch, length, heads, dim, device="cuda") for _ in range(3))
    if kind == "channels":  # a few channels of query and key are 12 times as large
        large = torch.ones(dim, device="cuda")
        large[:: dim // 4] = 12.0
        query, key = query * large / 4, key * large
    elif kind == "common key":  # all keys of a head share a large vector
        key = key + 12 * torch.randn(batch, 1, heads, dim, device="cuda")
    elif kind == "tokens":  # a few tokens have keys 8 and values 30 times as large
        few = torch.zeros(length, 1, 1, device="cuda")
        few[:: length // 4] = 1.0
        key, value = key * (1 + 7 * few), value * (1 + 29 * few)
    return [each.to(torch.bfloat16).transpose(1, 2) for each in (query, key, value)]


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def in_block(query, key, value, angle):
    """The attention behind a norm and a rotation by position, as in a block: tensors (batch, length, heads, dim)."""

    def placed(tensor):
        tensor = F.rms_norm(tensor, tensor.shape[-1:])
        even, odd = tensor.float().unflatten(-1, (-1, 2)).unbind(-1)
        cosine, sine = angle.cos()[:, None], angle.sin()[:, None]
        return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), -1).flatten(-2).to(tensor.dtype)

    return attend(*(tensor.transpose(1, 2) for tensor in (placed(query), placed(key), value))).transpose(1, 2)


def compiled(function, kernel: str):
    backend = attnrewrite.with_backend(kernel, numerics="quantised", strict=True)
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)


def error(kernel: str, given: list[torch.Tensor]) -> float:
    torch.compiler.reset()
    found = compiled(attend, kernel)(*given)
    rows = torch.linspace(0, given[0].shape[2] - 1, ROWS, device="cuda").round().long()
    wrong = total = 0.0
    for head in range(given[0].shape[1]):
        query, key, value = (each[:, head].double() for each in given)
        exact = ((query[:, rows] @ key.mT) / query.shape[-1] ** 0.5).softmax(-1) @ value
        wrong += float((found[:, head, rows].double() - exact).square().sum())
        total += float(exact.square().sum())
    return (wrong / total) ** 0.5


def times(rounds: int) -> dict[str, dict[str, float]]:
    batch, heads, length, dim = LARGE
    given = [torch.randn(batch, length, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    given.append(torch.rand(length, dim // 2, device="cuda"))
    watch, timed = Stopwatch(given[0].device), {}
    for kernel in KERNELS:
        torch.compiler.reset()
        run = partial(compiled(in_block, kernel), *given)
        for _ in range(3):
            run()
        timed[kernel] = partial(watch.sample, run, 3)
    samples = in_turn(timed, rounds)
    return {
        kernel: {"milliseconds": 1e3 * statistics.median(found), "ratio": by_rounds(found, samples[NAME])}
        for kernel, found in samples.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench/fp8_error.py needs a Hopper GPU: FlashAttention 3 runs on no other device in fp8")
    machine = attnrewrite.machine_of(torch.device("cuda", 0))
    print(machine)
    errors: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for kind in ("gauss", "channels", "common key", "tokens"):
            given = data(kind)
            errors[kind] = {kernel: error(kernel, given) for kernel in KERNELS}
            for kernel, found in errors[kind].items():
                print(f"{kind:<11} {kernel:<34} error {found:.1e}", flush=True)
        found_times = times(arguments.rounds)
    for kernel, found in found_times.items():
        print(f"{LARGE} {kernel:<34} {found['milliseconds']:8.3f} ms  {found['ratio']:.3f} of {NAME}")
    if arguments.json:
        result = {"machine": machine.to_dict(), "errors": errors, "times": found_times}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
