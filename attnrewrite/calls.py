"""The words for one scaled dot-product attention: what is asked of a kernel, without a node and without a tensor."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any

from .sizes import Size, described


class MaskKind(str, Enum):
    """What a mask is known to be. Causal is a word here, not a tensor."""

    NONE = "none"
    CAUSAL_UPPER_LEFT = "causal"  # row i sees keys 0..i: what SDPA's is_causal means
    CAUSAL_LOWER_RIGHT = "causal lower-right"  # row i sees keys 0..i + kv_len - q_len: FlashAttention >= 2.1
    KEY_PADDING = "key padding"  # a boolean tensor that is the same for every head and query: its shape says so
    BOOLEAN = "boolean"  # a tensor; True: this key takes part
    ADDITIVE = "additive"  # a tensor that is added to the scaled scores


@dataclass(frozen=True)
class Mask:
    """kind; for a tensor its dtype name ("bool", "float32"), its shape as the model passes it, and whether it is learned."""

    kind: MaskKind = MaskKind.NONE
    dtype: str | None = None
    shape: tuple[Size, ...] = ()
    needs_grad: bool = False

    @property
    def is_tensor(self) -> bool:
        return self.is_boolean or self.kind is MaskKind.ADDITIVE

    @property
    def is_boolean(self) -> bool:
        return self.kind in (MaskKind.BOOLEAN, MaskKind.KEY_PADDING)

    @property
    def is_causal(self) -> bool:
        """Of either alignment."""
        return self.kind in (MaskKind.CAUSAL_UPPER_LEFT, MaskKind.CAUSAL_LOWER_RIGHT)

    def __str__(self) -> str:
        if not self.is_tensor:
            return self.kind.value
        shape = ", ".join(str(described(size)) for size in self.shape)
        return f"{self.kind.value} ({shape})"


@dataclass(frozen=True)
class AttentionCall:
    """One call of scaled dot-product attention, as `find` reads it out of a graph.

    Sizes are `int`, or `torch.SymInt` while its graph is being rewritten, or text in a report.
    `dtype` is the one that the products are computed in (under autocast not that of the arguments). The batch of a
    rank-5 call is the product of its leading sizes; a rank-3 call has one head.
    """

    site: str  # the module path, as "transformer_blocks.0.attn1"
    batch: Size
    heads: Size
    kv_heads: Size
    q_len: Size
    kv_len: Size
    head_dim: Size
    value_dim: Size
    dtype: str  # "bfloat16"
    device: str = "cpu"  # the device's type
    mask: Mask = Mask()
    scale: float | None = None  # None: 1 / sqrt(head_dim)
    dropout: float = 0.0
    needs_grad: bool = False
    layout: str = "bhsd"  # how the query lies in memory: "bhsd", "bshd" or "strided"
    role: str = "self"  # "cross" where keys come from another tensor than queries
    deterministic: bool = False  # torch.use_deterministic_algorithms(True) is on
    obstacle: str | None = None  # why nothing but the call as it stands can be right here
    form: str = "sdpa"  # "operations": spelled out in the graph; "kernel": a kernel that PyTorch has chosen

    def described(self) -> AttentionCall:
        """The same call with its symbolic sizes as text, for reports: it keeps no tracing state alive."""
        sizes: dict[str, Any] = {name: described(getattr(self, name)) for name in SIZES}
        shape: Any = tuple(described(size) for size in self.mask.shape)
        return replace(self, mask=replace(self.mask, shape=shape), **sizes)

    def to_json(self) -> dict[str, Any]:
        return asdict(self.described())

    @staticmethod
    def from_json(data: dict[str, Any]) -> AttentionCall:
        mask = data["mask"]
        mask = Mask(MaskKind(mask["kind"]), mask["dtype"], tuple(mask["shape"]), mask["needs_grad"])
        return AttentionCall(**{**data, "mask": mask})


SIZES = ("batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim", "value_dim")
