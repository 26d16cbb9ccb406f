"""Draws the same videos with dense attention and with every plan, sparse and quantised: likeness, legibility, seconds, frames.

    python examples/moving_digits/compare.py [--out DIR] [--videos 20] [--steps 30]      # a GPU

All variants are compiled with Inductor, in bfloat16, and start from the same noise. For each it prints, and writes to
DIR/compare.json:

psnr     dB to the videos of dense attention (PyTorch's, compiled), over all pixels and videos; pixels are 0..1
ssim     the mean over frames of scikit-image's structural similarity to the same frame of dense attention
read     the share of frames whose digit an SVM reads as the one asked for. It is fitted to crops of drawn training videos; of
         videos drawn from the held-out digits it reads `real` (the first row)
seconds  for a batch of videos, the median of the rounds in which all variants take turns, and the median of the rounds' ratios
         to dense attention

"tuned" plans come from `tune_pipeline` at the first, middle and last step, with the measured error of each site; the others
name a kernel for self attention whatever its error. DIR/compare.png shows frames of each variant, one row each.

Needs scikit-image, and weights.safetensors, which train.py makes.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import moving_digits
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from sklearn.svm import SVC
from torch import Tensor

import attnrewrite
from attnrewrite.commands.bench.rounds import by_rounds, in_turn
from attnrewrite.planning.this_machine import machine_of
from attnrewrite.planning.usable import usable

MAX_ERROR = 2e-2
# Kernels for self attention; cross attention, of four tokens, stays with PyTorch.
NAMED = (
    *("_flash_3_fp8", "_flash_3_fp8[center=1,rotate=1]", "ck_int8"),
    *("sol", "sol[tau=2.0]", "sol[tau=2.5]", "sol_topk[ratio=0.1]"),
)
CANDIDATES = (
    *("_native_cudnn", "_flash_3", *NAMED),
    *("sol[tau=1.5]", "sol[tau=2.25]", "sol[tau=3.0]", "sol_topk", "sol_topk[ratio=0.05]"),
)  # of the tuned plans
SHOWN = range(0, moving_digits.SIZE[0], 4)  # frames of the picture


# -- a reader of digits


def crops(videos: Tensor) -> Tensor:
    """The digit of each frame, (frames of all videos, 64): a square around the middle of what is bright, in 8 x 8 pixels."""
    frames = ((videos[:, 0].flatten(0, 1) + 1) / 2).cpu()
    ink = frames * (frames > 0.3)
    total = ink.sum((1, 2)).clamp_min(1e-6)
    side = moving_digits.DIGIT
    middles = []
    for dim, length in ((2, frames.shape[1]), (1, frames.shape[2])):
        middles.append((ink.sum(dim) * (torch.arange(length) + 0.5)).sum(1) / total)
    y, x = middles
    steps = torch.arange(side) + 0.5 - side / 2
    grid_x = ((x[:, None] + steps) * (2 / frames.shape[2]) - 1)[:, None, :].expand(-1, side, -1)
    grid_y = ((y[:, None] + steps) * (2 / frames.shape[1]) - 1)[:, :, None].expand(-1, -1, side)
    grid = torch.stack([grid_x, grid_y], -1)
    cut = F.grid_sample(frames[:, None], grid, align_corners=False)
    return F.adaptive_avg_pool2d(cut, 8).flatten(1)


def reader(size: tuple[int, int, int]) -> tuple[SVC, float]:
    """A classifier of crops, fitted to videos of the training digits, and the share of the held-out digits that it reads."""
    images, labels = moving_digits.digits()
    generator = torch.Generator().manual_seed(0)
    short = (4, *size[1:])
    drawn = crops(moving_digits.videos(images, short, generator)).numpy()
    wanted = labels.repeat_interleave(short[0]).numpy()
    kept = (len(images) - moving_digits.HELD_OUT) * short[0]
    classifier = SVC().fit(drawn[:kept], wanted[:kept])
    return classifier, float((classifier.predict(drawn[kept:]) == wanted[kept:]).mean())


# -- the variants


def variants(
    model: torch.nn.Module, calls: tuple[Tensor, Tensor], given: argparse.Namespace, say: Any
) -> Iterator[tuple[str, moving_digits.Pipeline, dict[str, Any]]]:
    """The name, the pipeline and facts of each variant that this machine has. calls: labels and noise to tune on."""

    def fresh() -> moving_digits.Pipeline:
        return moving_digits.Pipeline(copy.deepcopy(model), given.steps)

    def wanted(name: str) -> bool:
        return given.variants is None or name in given.variants

    dense = fresh()
    dense.transformer.compile_repeated_blocks(dynamic=False)
    yield "dense", dense, {"kernels": "torch.compile"}
    if wanted("auto"):
        pipe = fresh()
        yield "auto", pipe, {"backend": attnrewrite.set_attention_backend(pipe, "auto", dynamic=False)}
    machine = machine_of(calls[1].device)
    for name in filter(wanted, NAMED):
        refused, _ = usable(name, machine)
        if refused is not None:
            say(f"{name}: {refused}")
            continue
        pipe = fresh()
        settings = {"rules": {"self": [name]}, "numerics": "sparse", "dynamic": False}
        yield name, pipe, {"backend": attnrewrite.set_attention_backend(pipe, "native", **settings)}
    able = [name for name in CANDIDATES if usable(name, machine)[0] is None]
    for numerics in ("quantised", "sparse"):
        if not wanted(f"tuned, {numerics}"):
            continue
        started = time.perf_counter()
        plan = attnrewrite.tune_pipeline(fresh(), *calls, candidates=able, numerics=numerics, max_error=MAX_ERROR)
        facts = {
            "tuning_seconds": time.perf_counter() - started,
            "chosen": {site.call.site: site.chosen for site in plan.sites},
            "errors": {site.call.site: errors(site) for site in plan.sites},
        }
        say(f"tuned, {numerics}: {facts['chosen']}")
        for name, choice in ((f"tuned, {numerics}", plan), (f"scheduled, {numerics}", attnrewrite.schedule_of(plan))):
            if wanted(name):
                pipe = fresh()
                backend = attnrewrite.set_attention_backend(pipe, choice, numerics=numerics, dynamic=False)
                yield name, pipe, {**facts, "backend": backend}


def errors(site: attnrewrite.Site) -> dict[str, float | None]:
    """Kernel -> the measured error at a site, the worst of the steps."""
    return {found.name: found.error for found in site.measured}


# -- the comparison


def likeness(videos: Tensor, dense: Tensor) -> tuple[float, float]:
    """PSNR in dB over all pixels, and the mean structural similarity of frames. videos: (count, 1, frames, height, width)."""
    one, two = (((each[:, 0] + 1) / 2).cpu().numpy().astype(np.float64) for each in (videos, dense))
    frames = zip(one.reshape(-1, *one.shape[-2:]), two.reshape(-1, *two.shape[-2:]), strict=True)
    ssim = statistics.fmean(structural_similarity(left, right, data_range=1.0) for left, right in frames)
    with np.errstate(divide="ignore"):  # equal videos: infinity
        return float(peak_signal_noise_ratio(two, one, data_range=1.0)), ssim


def picture(rows: dict[str, Tensor]) -> Image.Image:
    """Frames of the first video of each variant, one row each, with its name."""
    text, zoom = 150, 2
    height, width = (zoom * each for each in next(iter(rows.values())).shape[-2:])
    sheet = Image.new("L", (text + len(SHOWN) * width, len(rows) * (height + 2)), 40)
    draw = ImageDraw.Draw(sheet)
    for row, (name, video) in enumerate(rows.items()):
        draw.text((4, row * (height + 2) + height // 2 - 6), name, fill=255)
        for column, frame in enumerate(min(each, video.shape[1] - 1) for each in SHOWN):
            pixels = ((video[0, frame] + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
            tile = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
            sheet.paste(tile, (text + column * width, row * (height + 2)))
    return sheet


def seconds(pipe: moving_digits.Pipeline, labels: Tensor, noise: Tensor) -> float:
    started = time.perf_counter()
    pipe(labels, noise).sum().item()  # waits for the GPU
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/moving_digits"))
    parser.add_argument("--videos", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", help="only these beside dense, by the names in the table")
    parser.add_argument("--weights", type=Path, default=moving_digits.WEIGHTS)
    parser.add_argument("--size", type=int, nargs=3, default=moving_digits.SIZE, metavar=("FRAMES", "HEIGHT", "WIDTH"))
    given = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # diffusers' own
    torch._dynamo.config.recompile_limit = 64  # every variant compiles the same block
    given.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = tuple(given.size)
    say = partial(print, flush=True)

    classifier, real = reader(size)
    say(f"real digits that were held out, read as what they are: {real:.1%}")
    model = moving_digits.load(given.weights, dtype).to(device)
    labels = torch.arange(given.videos) % moving_digits.CLASSES
    noise = torch.randn(given.videos, 1, *size, generator=torch.Generator().manual_seed(3))
    batches = [(labels[at].to(device), noise[at].to(device)) for at in torch.arange(given.videos).split(given.batch)]

    result: dict[str, Any] = {
        "machine": machine_of(device).to_dict(), "size": list(size), "steps": given.steps, "batch": given.batch,
        "videos": given.videos, "real": real, "max_error": MAX_ERROR, "variants": {},
    }  # fmt: skip
    drawn: dict[str, Tensor] = {}
    pipes: dict[str, moving_digits.Pipeline] = {}
    for name, pipe, facts in variants(model, batches[0], given, say):
        pipes[name] = pipe
        drawn[name] = torch.cat([pipe(*batch).cpu() for batch in batches])
        psnr, ssim = likeness(drawn[name], drawn["dense"])
        right = classifier.predict(crops(drawn[name]).numpy()) == labels.repeat_interleave(size[0]).numpy()
        if (backend := facts.pop("backend", None)) is not None:
            facts["kernels"] = ", ".join(sorted({str(site.chosen) for site in backend.report.sites}))
        result["variants"][name] = {"psnr": psnr, "ssim": ssim, "read": float(right.mean()), **facts}
        say(f"{name:32} psnr {psnr:6.2f} dB  ssim {ssim:.4f}  read {right.mean():6.1%}  {facts['kernels']}")
        write(given.out / "compare.json", result)
    picture({name: videos[0] for name, videos in drawn.items()}).save(given.out / "compare.png")

    times = in_turn({name: partial(seconds, pipe, *batches[0]) for name, pipe in pipes.items()}, given.rounds)
    say(f"\nseconds for {given.batch} videos of {given.steps} steps, {given.rounds} rounds, and the ratio to dense")
    for name, taken in times.items():
        facts = result["variants"][name]
        facts |= {"seconds": statistics.median(taken), "ratio": by_rounds(times["dense"], taken)}
        say(f"{name:32} {facts['seconds']:8.3f} s  {facts['ratio']:5.2f}x")
    write(given.out / "compare.json", result)


def write(path: Path, result: dict[str, Any]) -> None:
    finite = json.loads(json.dumps(result), parse_constant=str)  # JSON has no infinity
    path.write_text(json.dumps(finite, indent=1) + "\n")


if __name__ == "__main__":
    main()
