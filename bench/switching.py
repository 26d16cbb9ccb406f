"""Measures what `attention_backend` adds to a call of a compiled model, in nanoseconds, and counts compilations over switches.

The compiled code computes nothing, so the times are those of Dynamo's entry, its guards, and the context manager. All variants
run in turn in each round, so that other load on the machine affects all of them. Figures are medians and quartiles over rounds.
"""

import argparse
import os
import statistics
import time
import warnings

import torch
import torch.nn.functional as F

import attnrewrite
from attnrewrite.entrances.contexts import active


def attend(query, key, value):
    return F.scaled_dot_product_attention(query, key, value)


def plain_backend(graph_module, example_inputs):
    return lambda *inputs: (inputs[0],)


def seconds(call, calls):
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--calls", type=int, default=2000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # about contexts that changed nothing

    inputs = [torch.randn(1, 2, 8, 16) for _ in range(3)]
    compilations = []

    def inner(graph_module, example_inputs):
        compilations.append(str(active()))
        return plain_backend(graph_module, example_inputs)

    plain = torch.compile(lambda *given: attend(*given), backend=plain_backend)
    ours = torch.compile(attend, backend=attnrewrite.with_backend("_native_flash", inner=inner))
    made = attnrewrite.attention_backend("_native_math")

    def within_made():
        with made:
            ours(*inputs)

    def within_new():
        with attnrewrite.attention_backend("_native_math"):
            ours(*inputs)

    def nothing():
        with made:
            pass

    for _ in range(20):
        ours(*inputs)
        within_new()
    switched = list(compilations)

    cases = {
        "plain torch.compile, another backend": lambda: plain(*inputs),
        "with_backend": lambda: ours(*inputs),
        "with_backend, in a context made before": within_made,
        "with_backend, in attention_backend('name')": within_new,
        "a context made before, around nothing": nothing,
    }
    times = {name: [] for name in cases}
    for _ in range(options.rounds):
        for name, call in cases.items():
            times[name].append(seconds(call, options.calls) / options.calls * 1e9)
    assert compilations == switched, "a call that was timed compiled something"

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"torch {torch.__version__}, {cores} cores; {options.rounds} rounds of {options.calls} calls")
    print(f"{'ns a call':45} {'median':>8} {'quartiles':>15}")
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"{name:45} {middle:8.0f} {low:7.0f}-{high:.0f}")
    plain_times, ours_times, *contexts = list(times.values())[:4]

    def more(values, base):
        return statistics.median(value - other for value, other in zip(values, base, strict=True))

    print(f"the guard of the choice: {more(ours_times, plain_times):.0f} ns a call")
    print(
        "a context around the call: {:.0f} ns, by name: {:.0f} ns".format(
            *(more(each, ours_times) for each in contexts)
        )
    )
    print(f"compilations over 20 switches there and back: {len(switched)} ({', '.join(switched)})")


if __name__ == "__main__":
    main()
