"""Samples digits with the program that export_digits.py wrote, in a process that cannot import diffusers.

    python examples/aot/run_digits.py [--out out/aot]

Prints the plan in the file, and the largest difference of the images to those of the eager model.
"""

import argparse
import sys
from pathlib import Path

sys.modules["diffusers"] = None  # imports of it raise
sys.modules["transformers"] = None

import torch  # noqa: E402
from sampling import sample  # noqa: E402

import attnrewrite  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/aot"))
    folder = parser.parse_args().out
    program = attnrewrite.load(folder / "digits.pt2")
    expected = torch.load(folder / "expected.pt", weights_only=True)
    step = program.module()
    with torch.no_grad():
        images = sample(step, expected["labels"], expected["noise"], expected["signal"])
    print(attnrewrite.report_of(program))
    difference = (images - expected["images"]).abs().max().item()
    print(f"largest difference to the eager model's images, whose pixels are in -1..1: {difference:.1e}")
    if difference > 1e-4:
        raise SystemExit("the images differ")
    try:
        step(expected["noise"].double(), expected["labels"], expected["labels"])
    except attnrewrite.AttentionAssertionError as error:
        print(f"called with float64: {error}")


if __name__ == "__main__":
    main()
