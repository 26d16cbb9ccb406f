"""Measures the overhead of a swapped attention in a compiled model over a call of the library's own function, on a GPU.

    python bench/op_overhead.py [--kernels flash sage] [--shapes Flux s1k] [--json bench/results/op_overhead_h200.json]

Two programs run in turn, each round in another order: a chain of calls of the library's function (each output is the next
query), and the same chain of `F.scaled_dot_product_attention`, compiled by Inductor with the kernel swapped in. Tensors are
bfloat16 in the memory layout (batch, length, heads, dim), as in diffusers. Nothing needs a gradient.

GPU ratio    GPU time, compiled / library: CUDA events around the chain, which is queued while the GPU is busy, so that host
             time does not count; the median of rounds, and the quartiles of the ratio by rounds
same         the same ratio of the library's chain to itself: its distance from 1 is the noise of the machine
host us      host time of a call, library and compiled: a chain of 60 calls, as many as in a large model, on tensors with one
             query and 64 keys, by the wall clock; the guards of the compiled program (once a chain) are included
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnrewrite
from attnrewrite.planning.usable import usable

# batch, heads, q_len, kv_len, dim
SHAPES = {
    "Flux": (2, 24, 4608, 4608, 128),
    "Wan14B": (1, 40, 32760, 32760, 128),
    "Wan1.3B": (1, 12, 32760, 32760, 128),
    "s16k": (1, 24, 16384, 16384, 64),
    "SDXL": (2, 10, 4096, 4096, 64),
    "s1k": (2, 24, 1024, 1024, 128),
    "cross": (1, 40, 32760, 512, 128),
}
TINY = (1, 1, 1, 64, 128)
ROUNDS, CHAIN, HOST_CHAIN = 9, 10, 60

Chain = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def native(kind: SDPBackend) -> Callable[..., torch.Tensor]:
    def call(q, k, v):
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return call


def flash_2():
    from flash_attn import flash_attn_func

    return flash_attn_func


def flash_3():
    from fa3_fwd_interface import flash_attn_func

    return flash_attn_func


def flash_4():
    from flash_attn.cute import flash_attn_func

    return lambda q, k, v: flash_attn_func(q, k, v)[0]


def sage(name: str) -> Callable[..., torch.Tensor]:
    import sageattention

    function = getattr(sageattention, name)
    return lambda q, k, v: function(q, k, v, tensor_layout="NHD")


def xformers():
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention


LIBRARY = {
    "_native_flash": lambda: native(SDPBackend.FLASH_ATTENTION),
    "_native_cudnn": lambda: native(SDPBackend.CUDNN_ATTENTION),
    "_native_efficient": lambda: native(SDPBackend.EFFICIENT_ATTENTION),
    "flash": flash_2,
    "_flash_3": flash_3,
    "flash_4": flash_4,
    "sage": lambda: sage("sageattn"),
    "_sage_qk_int8_pv_fp8_cuda_sm90": lambda: sage("sageattn_qk_int8_pv_fp8_cuda_sm90"),
    "_sage_qk_int8_pv_fp16_triton": lambda: sage("sageattn_qk_int8_pv_fp16_triton"),
    "xformers": xformers,
}


def chained(function: Callable[..., torch.Tensor], count: int) -> Chain:
    def chain(q, k, v):
        for _ in range(count):
            q = function(q, k, v)
        return q

    return chain


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def compiled(name: str, count: int) -> Chain:
    torch.compiler.reset()
    backend = attnrewrite.with_backend(name, numerics="quantised", strict=True)
    return torch.compile(chained(sdpa, count), backend=backend, fullgraph=True, dynamic=False)


def tensors(shape):
    batch, heads, q_len, kv_len, dim = shape
    return [torch.randn(batch, n, heads, dim, device="cuda", dtype=torch.bfloat16) for n in (q_len, kv_len, kv_len)]


def gpu_ms(chain: Chain, given, count: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(20_000_000)  # 10 ms: the host queues the chain before the GPU starts it
    start.record()
    chain(*given)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / count


def host_us(chain: Chain, given) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(5):
        chain(*given)
    seconds = time.perf_counter() - started
    torch.cuda.synchronize()
    return seconds / 5 / HOST_CHAIN * 1e6


def measure(name: str, function: Callable[..., torch.Tensor], shape) -> dict[str, float | list[float]]:
    count = CHAIN if shape[2] * shape[3] < 2**28 else 2
    given = tensors(shape)
    programs = {
        "library": chained(function, count),
        "same": chained(function, count),
        "compiled": compiled(name, count),
    }
    for chain in programs.values():
        for _ in range(3):
            chain(*given)
    times: dict[str, list[float]] = {program: [] for program in programs}
    order = list(programs)
    for number in range(ROUNDS):
        for program in order[number % 3 :] + order[: number % 3]:
            times[program].append(gpu_ms(programs[program], given, count))
    ratios = sorted(a / b for a, b in zip(times["compiled"], times["library"], strict=True))
    median = {program: statistics.median(each) for program, each in times.items()}
    return {
        "library_ms": median["library"],
        "ratio": median["compiled"] / median["library"],
        "quartiles": [ratios[ROUNDS // 4], ratios[-1 - ROUNDS // 4]],
        "same": median["same"] / median["library"],
    }


def measure_host(name: str, function: Callable[..., torch.Tensor]) -> dict[str, float]:
    given = tensors(TINY)
    programs = {"library": chained(function, HOST_CHAIN), "compiled": compiled(name, HOST_CHAIN)}
    for chain in programs.values():
        host_us(chain, given)
    times: dict[str, list[float]] = {program: [] for program in programs}
    for _ in range(ROUNDS):
        for program, chain in programs.items():
            times[program].append(host_us(chain, given))
    return {program: min(each) for program, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=LIBRARY, default=list(LIBRARY))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench/op_overhead.py needs a CUDA GPU: the kernels that it compares run on no other device")
    machine = attnrewrite.machine_of(torch.device("cuda", 0))
    print(machine)
    results: dict[str, dict[str, object]] = {}
    with torch.no_grad():
        for name in arguments.kernels:
            refused, _ = usable(name, machine)
            if refused is not None:
                print(f"{name}: {refused}")
                continue
            function = LIBRARY[name]()
            host = measure_host(name, function)
            results[name] = {"host_us": host}
            print(f"{name}: host us a call: library {host['library']:.0f}, compiled {host['compiled']:.0f}", flush=True)
            for shape in arguments.shapes:
                found = measure(name, function, SHAPES[shape])
                results[name][shape] = found
                low, high = found["quartiles"]
                print(
                    f"  {shape:<8} library {found['library_ms']:8.3f} ms   GPU ratio {found['ratio']:.3f} "
                    f"({low:.3f} to {high:.3f})   same {found['same']:.3f}",
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine.to_dict(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
