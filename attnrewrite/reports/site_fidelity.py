"""The results of `check` for one attention and for the whole output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..measuring.accuracy import Accuracy, relative_error
from ..planning.sites import Site
from .reproducing import Layout


@dataclass(frozen=True)
class SiteFidelity:
    """The result of `attnrewrite.check` for one run of one attention.

    site: the call, its kernel, and the decisions.
    accuracy: the error against float64.
    limit: the largest relative error that the kernel's numerics explain.
    limit_reason: the explanation, as "rounding to bfloat16".
    bad_inputs: for "query", "key" and "value" the number of values that are not finite; only where there are any.
    run: 1 for the first run of the site, 2 for the second.
    layouts: shape, strides and storage offset of query, key and value; () if one of them is not of rank 4.
    """

    site: Site
    accuracy: Accuracy
    limit: float
    limit_reason: str
    bad_inputs: dict[str, int] = field(default_factory=dict)
    run: int = 1
    layouts: tuple[Layout, ...] = ()

    @property
    def call(self) -> Any:
        return self.site.call

    @property
    def name(self) -> str:
        return self.site.name if self.run == 1 else f"{self.site.name} (run {self.run})"

    @property
    def kernel(self) -> str:
        """The kernel's name; behind it its class, if it does more than round: "sage (quantised)"."""
        of = f" ({self.site.inexact.numerics})" if self.site.inexact else ""
        return f"{self.site.chosen or '(unchanged)'}{of}"

    @property
    def wrong(self) -> str:
        """The reason why the site goes wrong; "" if it does not."""
        of = self.accuracy
        if self.bad_inputs:
            what = ", ".join(f"{number} in its {name}" for name, number in self.bad_inputs.items())
            return f"values that are not finite come in: {what}. The cause lies before this attention"
        if not of.finite:
            return f"its output is not finite, its inputs are: {of.nan} NaN, {of.inf} infinite"
        if self.call.dropout or not of.rows:
            return ""
        if not of.relative_error <= self.limit:
            return f"relative error {of.relative_error:.1e}, where {self.limit_reason} explains {self.limit:.1e}"
        return ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "site": self.site.to_dict(),
            "run": self.run,
            "accuracy": self.accuracy.to_dict(),
            "limit": self.limit,
            "limit_reason": self.limit_reason,
            "bad_inputs": self.bad_inputs,
            "wrong": self.wrong,
            "layouts": [[list(shape), list(strides), offset] for shape, strides, offset in self.layouts],
        }


@dataclass(frozen=True)
class Outputs:
    """The output of the swapped, compiled model, compared with that of the unchanged model.

    relative_error: |output - unchanged| / |unchanged| (2-norms), over all floating tensors together; NaN without any.
    psnr_db: 20 log10(range / root mean square error), range: largest - smallest value of the unchanged model. Taken of the
        first tensor that may be an image or a video (rank 4 or 5, latents too); None if there is none.
    bad: number of values that are not finite.
    bad_before: the same for the unchanged model.
    limit: the largest relative error that rounding and the kernels' own errors explain.
    pictures: the first image of the unchanged model and that of the swapped model; () without images.
    """

    relative_error: float
    psnr_db: float | None
    bad: int
    bad_before: int
    limit: float = math.inf
    pictures: tuple[Tensor, ...] = field(default=(), compare=False, repr=False)

    @property
    def wrong(self) -> str:
        """The reason why the output is wrong; "" if it is not."""
        if self.bad > self.bad_before:
            return f"{self.bad} values are not finite ({self.bad_before} of the unchanged model)"
        if self.relative_error > self.limit:
            return f"relative error {self.relative_error:.1e}, where rounding and the kernels explain {self.limit:.1e}"
        return ""

    @staticmethod
    def of(expected: Sequence[Tensor], output: Sequence[Tensor]) -> Outputs:
        """Compares the outputs of the two models. Raises `ValueError` if their tensors differ in shape."""
        shapes, theirs = [tuple(each.shape) for each in output], [tuple(each.shape) for each in expected]
        if shapes != theirs:
            raise ValueError(
                f"the compiled model returns tensors {shapes}, the unchanged one {theirs}: nothing to compare"
            )
        if not output:
            return Outputs(math.nan, None, 0, 0)
        pairs = list(zip(output, expected, strict=True))
        wide = [torch.cat([each.double().flatten().cpu() for each in side]) for side in (output, expected)]
        image = next((pair for pair in pairs if pair[0].dim() in (4, 5) and pair[0].numel()), None)
        bad, bad_before = (int((~each.isfinite()).sum()) for each in wide)
        psnr = None if image is None else _psnr(*image)
        pictures = () if image is None else (_picture(image[1]), _picture(image[0]))
        return Outputs(relative_error(*wide), psnr, bad, bad_before, pictures=pictures)

    def __str__(self) -> str:
        parts = [f"relative error {self.relative_error:.2e} to the unchanged model"]
        parts += [f"PSNR {self.psnr_db:.1f} dB"] if self.psnr_db is not None else []
        if self.bad or self.bad_before:
            parts.append(f"{self.bad} values are not finite ({self.bad_before} of the unchanged model)")
        return ", ".join(parts)


def _psnr(output: Tensor, expected: Tensor) -> float:
    span = (expected.double().max() - expected.double().min()).item()
    apart = (output.double() - expected.double()).square().mean().sqrt().item()
    if not (math.isfinite(span) and math.isfinite(apart)):
        return math.nan
    return math.inf if apart == 0 else 20 * math.log10(span / apart) if span else -math.inf


def _picture(tensor: Tensor) -> Tensor:
    """The first image, or the first frame of a video: (rows, columns, channels) in float32, at most 512 x 512 x 3."""
    image = tensor[0] if tensor.dim() == 4 else tensor[0, :, 0]
    steps = [max(1, math.ceil(size / 512)) for size in image.shape[1:]]
    channels = 3 if image.shape[0] >= 3 else 1
    return image[:channels, :: steps[0], :: steps[1]].float().permute(1, 2, 0).cpu().clone()
