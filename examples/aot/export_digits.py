"""Exports the digits model with swapped kernels, for a process that has neither its source nor diffusers.

    python examples/aot/export_digits.py [--out out/aot] [--backend _native_flash,native] [--package]

Writes digits.pt2 (the program), expected.pt (the images that run_digits.py compares with) and, with --package, an AOTInductor
package for C++.
"""

import argparse
import logging
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "digits"))
import digits
from sampling import sample

import attnrewrite


class Step(torch.nn.Module):
    """One call of the denoiser, with tensors in and a tensor out."""

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, images, timestep, labels):
        return self.denoiser(images, timestep=timestep, class_labels=labels, return_dict=False)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/aot"))
    parser.add_argument("--backend", default="_native_flash,native")
    parser.add_argument("--package", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # diffusers' own
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    arguments.out.mkdir(parents=True, exist_ok=True)

    model = Step(digits.load()).requires_grad_(False)
    labels = torch.arange(digits.CLASSES)
    noise = torch.randn(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(3))
    times = torch.full((len(labels),), 500)
    batch = torch.export.Dim("batch")
    program = attnrewrite.export(
        model,
        (noise, times, labels),
        backend=arguments.backend.split(","),
        dynamic_shapes=({0: batch}, {0: batch}, {0: batch}),
    )
    attnrewrite.save(program, arguments.out / "digits.pt2")
    signal = digits.scheduler().alphas_cumprod
    with torch.no_grad():
        images = sample(model, labels, noise, signal)
        velocity = model(noise, times, labels)
    torch.save({"labels": labels, "noise": noise, "signal": signal, "images": images}, arguments.out / "expected.pt")
    print(f"wrote {arguments.out / 'digits.pt2'}, {attnrewrite.report_of(program).swapped} kernels swapped")
    if arguments.package:
        print(attnrewrite.aot_compile(program, arguments.out / "package.pt2", cpp=True))
        noise.numpy().tofile(arguments.out / "images.bin")
        velocity.numpy().tofile(arguments.out / "velocity.bin")


if __name__ == "__main__":
    main()
