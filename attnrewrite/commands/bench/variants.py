"""The ways to run a model that `attnrewrite bench --models` compares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from ...entrances.compilers import AttentionCompiler, with_backend
from ...entrances.tuning import tune
from ...planning.plans import Plan
from .denoiser import Denoiser

AGAIN = "torch.compile, again"  # compiled a second time: |ratio - 1| is the noise
EAGER, PLAIN, AUTO = "eager", "torch.compile", "auto"
TUNED, QUANTISED, SPARSE = "tuned", "tuned, quantised", "tuned, sparse"
ALLOW = {"reordered": TUNED, "quantised": QUANTISED, "sparse": SPARSE}  # by the numerics that a variant allows
SPARSE_ERROR = 2e-2  # the largest error at a site where numerics is "sparse" and no other is given
PEER = "diffusers, "  # prefix of the variants of diffusers' dispatcher


@dataclass(frozen=True)
class Variant:
    """One way to run a model."""

    name: str  # in tables
    backend: Callable[[Denoiser], Any]  # returns the backend for torch.compile; None: the model is not compiled
    peer: str = "native"  # the kernel of diffusers' dispatcher: `model.set_attention_backend(peer)` before each step


def usual(
    peers: Iterable[str],
    inner: str = "inductor",
    candidates: Sequence[str] | None = None,
    progress: bool = True,
    numerics: str = "quantised",
    max_error: float | None = None,
) -> tuple[Variant, ...]:
    """The variants of `attnrewrite bench`.

    peers: kernels of diffusers' dispatcher, one variant each; the fastest represents diffusers.
    candidates: kernels for `attnrewrite.tune`. It measures a model once for all tuned variants: a variant refuses the choices
        of the plan that its numerics do not allow, and the plan's next choice takes the site.
    progress: that of `attnrewrite.tune`.
    numerics: the tuned variants are those that allow "reordered", "quantised" and "sparse", up to this one.
    max_error: that of `attnrewrite.tune`. None: `SPARSE_ERROR` where numerics is "sparse", otherwise its own limits.
    """
    plans: WeakKeyDictionary[Denoiser, Plan] = WeakKeyDictionary()

    def tuned(denoiser: Denoiser, allowed: str) -> AttentionCompiler:
        if denoiser not in plans:
            plans[denoiser] = tune(
                denoiser.model,
                **denoiser.inputs,
                return_dict=False,
                numerics=numerics,
                max_error=SPARSE_ERROR if max_error is None and numerics == "sparse" else max_error,
                candidates=candidates,
                inner=inner,
                progress=progress,
            )
        return with_backend(plans[denoiser], inner=inner, numerics=allowed)

    allowed = list(ALLOW)[: list(ALLOW).index(numerics) + 1]
    return (
        Variant(EAGER, lambda _: None),
        Variant(PLAIN, lambda _: inner),
        *(Variant(f"{PEER}{name}", lambda _: inner, peer=name) for name in peers),
        Variant(AUTO, lambda _: with_backend("auto", inner=inner)),
        *(Variant(ALLOW[each], partial(tuned, allowed=each)) for each in allowed),
        Variant(AGAIN, lambda _: inner),
    )
