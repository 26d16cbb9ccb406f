"""Samples ten handwritten digits from the same noise with eager attention and with every kernel this machine has.

    python examples/digits/demo.py [--out out/digits.png] [--steps 30]

Writes one PNG with a row for each kernel, and prints the reports, the largest pixel differences and the time of a step.
"""

import argparse
import logging
import time
import warnings
from pathlib import Path

import digits
import torch
from PIL import Image, ImageDraw

import attnrewrite
from attnrewrite.reports.progress_line import ProgressLine

KERNELS = ("native", "_native_flash", "_native_efficient", "_native_cudnn", "_native_math", "flex")
ZOOM = 8


def timed(denoiser, labels, noise, steps):
    """Returns the images, and the seconds of a step: the median of three samplings, after a first one that compiles."""
    images = digits.sample(denoiser, labels, noise, steps)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        digits.sample(denoiser, labels, noise, steps)
        seconds.append((time.perf_counter() - started) / steps)
    return images.cpu(), sorted(seconds)[1]


def picture(rows: dict[str, torch.Tensor]) -> Image.Image:
    """One row of ten digits for each name, with the name above the row."""
    text, side = 16, 8 * ZOOM
    sheet = Image.new("L", (10 * side, len(rows) * (side + text)), 0)
    draw = ImageDraw.Draw(sheet)
    for row, (name, images) in enumerate(rows.items()):
        draw.text((4, row * (side + text) + 2), name, fill=255)
        pixels = ((images[:, 0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        for column, digit in enumerate(pixels):
            tile = Image.fromarray(digit.numpy()).resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(tile, (column * side, row * (side + text) + text))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/digits.png"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # diffusers' own
    logging.getLogger("diffusers").setLevel(logging.ERROR)

    line = ProgressLine("demo", not arguments.quiet)
    line.say("eager")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = digits.load().to(device)
    labels = torch.arange(digits.CLASSES, device=device)
    noise = torch.randn(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(3)).to(device)

    eager, seconds = timed(model, labels, noise, arguments.steps)
    rows, lines, reports = {"eager": eager}, [f"{'eager':<17} {1000 * seconds:7.2f} ms a step"], []
    for kernel in KERNELS:
        line.say(f"compiling and sampling with {kernel}")
        backend = attnrewrite.with_backend(kernel)
        with torch.no_grad():
            report = attnrewrite.explain(
                model, noise, timestep=torch.zeros_like(labels), class_labels=labels, backend=backend
            )
        if report.left:
            lines.append(f"{kernel:<17} not on this machine: {report.sites[0].refusals[0][1]}")
            continue
        torch.compiler.reset()
        images, seconds = timed(torch.compile(model, backend=backend), labels, noise, arguments.steps)
        rows[kernel] = images
        difference = (images - eager).abs().max().item() * 127.5
        lines.append(
            f"{kernel:<17} {1000 * seconds:7.2f} ms a step, largest pixel difference to eager {difference:.5f} of 255"
        )
        reports.append(backend.report)

    line.end()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    picture(rows).save(arguments.out)
    print(*reports, sep="\n\n")
    print()
    print(*lines, sep="\n")
    print(f"\nten digits a row, {len(rows)} rows: {arguments.out}")


if __name__ == "__main__":
    main()
