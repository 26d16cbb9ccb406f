"""Finds the fastest kernel for each attention of the small digits DiT, and samples ten digits with these kernels.

    python examples/tune_digits.py [--out out/tuned_digits.png] [--plan out/plan.json] [--steps 30]

Prints the plan with all timings and errors, the report of the tuned model, the time of a step with torch.compile and with the
plan, and the largest pixel difference. Writes the plan, and one PNG with a row of digits for each of the two models.
"""

import argparse
import logging
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch

import attnrewrite

sys.path.insert(0, str(Path(__file__).parent / "digits"))
import demo
import digits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/tuned_digits.png"))
    parser.add_argument("--plan", type=Path, default=Path("out/plan.json"))
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # diffusers' own
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    for path in (options.out, options.plan):
        path.parent.mkdir(parents=True, exist_ok=True)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = digits.load().to(device)
    labels = torch.arange(digits.CLASSES, device=device)
    noise = torch.randn(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(3)).to(device)

    with torch.no_grad():
        plan = attnrewrite.tune(model, noise, timestep=torch.zeros_like(labels), class_labels=labels)
    print(plan)
    plan.save(options.plan)

    tuned = attnrewrite.with_backend(attnrewrite.Plan.load(options.plan))
    variants = {"torch.compile": torch.compile(model), "tuned": torch.compile(model, backend=tuned)}
    rows = {name: digits.sample(variant, labels, noise, options.steps).cpu() for name, variant in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(5):  # in turn, so that other load on the machine slows both
        for name, variant in variants.items():
            started = time.perf_counter()
            digits.sample(variant, labels, noise, options.steps).cpu()
            seconds[name].append((time.perf_counter() - started) / options.steps)
    lines = [f"{name:<13} {1000 * statistics.median(seconds[name]):7.2f} ms a step" for name in variants]
    difference = (rows["tuned"] - rows["torch.compile"]).abs().max().item() * 127.5
    demo.picture(rows).save(options.out)
    print("", tuned.report, "", *lines, f"largest difference of a pixel {difference:.5f} of 255", sep="\n")
    print(f"ten digits a row, {len(rows)} rows: {options.out}; the plan: {options.plan}")


if __name__ == "__main__":
    main()
