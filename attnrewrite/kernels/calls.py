"""The words for one scaled dot-product attention: what is asked of a kernel, without a node and without a tensor."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any

from ..graphs.sizes import Size, described


class MaskKind(str, Enum):
    """What a mask is known to be. Causal is a word here, not a tensor."""

    NONE = "none"
    CAUSAL_UPPER_LEFT = "causal"  # row i sees keys 0..i: what SDPA's is_causal means
    CAUSAL_LOWER_RIGHT = "causal lower-right"  # row i sees keys 0..i + kv_len - q_len: FlashAttention >= 2.1
    KEY_PADDING = "key padding"  # the same for every head and query: by its shape, or by how the graph makes it
    QUERY_KEY_PADDING = "padding of queries and keys"  # a key takes part for a query if neither is padding
    CAUSAL_PADDING = "causal and key padding"  # causal of either alignment, and some keys are padding
    SLIDING_WINDOW = "sliding window"  # row i sees keys i - left .. i + right; q_len == kv_len
    BLOCKS = "blocks"  # a query sees the keys of its own document
    BOOLEAN = "boolean"  # a tensor; True: this key takes part
    ADDITIVE = "additive"  # a tensor that is added to the scaled scores


_BOOLEAN = frozenset(
    {MaskKind.BOOLEAN, MaskKind.KEY_PADDING, MaskKind.QUERY_KEY_PADDING, MaskKind.CAUSAL_PADDING, MaskKind.SLIDING_WINDOW,
     MaskKind.BLOCKS}
)  # fmt: skip


@dataclass(frozen=True)
class Mask:
    """kind: what is known of it. For a tensor its dtype name ("bool", "float32"), its shape as the model passes it, and whether
    it is learned; they stay where `understand_masks` has proven that the tensor is causal or hides nothing.

    window: how many keys before and behind the query's own a sliding window shows; None: all of them.
    no_key: what a row gives that sees no key. "zeros": SDPA's answer for a boolean mask and for -inf. An additive mask of a
        finite number shifts all its scores alike: "all keys" as without a mask, or the "mean" of all values where the number
        is so large that the scores vanish beside it.
    """

    kind: MaskKind = MaskKind.NONE
    dtype: str | None = None
    shape: tuple[Size, ...] = ()
    needs_grad: bool = False
    window: tuple[Size | None, Size | None] | None = None
    no_key: str = "zeros"

    @property
    def is_tensor(self) -> bool:
        return self.is_boolean or self.kind is MaskKind.ADDITIVE

    @property
    def is_boolean(self) -> bool:
        return self.kind in _BOOLEAN

    @property
    def given(self) -> Mask | None:
        """The tensor that the model passes, whatever is known of it; None where it passes none."""
        if self.dtype is None:
            return None
        kind = MaskKind.BOOLEAN if self.dtype == "bool" else MaskKind.ADDITIVE
        return Mask(kind, self.dtype, self.shape, self.needs_grad)

    @property
    def bare(self) -> Mask:
        """As a kernel gets it that takes what is proven: a tensor is boolean then, and causal or no mask have none."""
        return replace(self, dtype="bool") if self.is_boolean else replace(self, dtype=None, shape=())

    @property
    def is_causal(self) -> bool:
        """Of either alignment."""
        return self.kind in (MaskKind.CAUSAL_UPPER_LEFT, MaskKind.CAUSAL_LOWER_RIGHT)

    def __str__(self) -> str:
        if not self.is_tensor:
            return self.kind.value
        sizes: tuple[Any, ...] = self.shape
        if self.kind in (MaskKind.KEY_PADDING, MaskKind.CAUSAL_PADDING):
            sizes = (*self.shape[:1], self.shape[-1]) if len(self.shape) > 2 else self.shape[-1:]
        elif self.kind is MaskKind.SLIDING_WINDOW:
            sizes = tuple("all" if size is None else size for size in self.window or ())
        elif self.kind in (MaskKind.BLOCKS, MaskKind.QUERY_KEY_PADDING):
            return str(self.kind.value)
        return f"{self.kind.value} ({', '.join(str(described(size)) for size in sizes)})"


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
    in_cuda_graph: bool = False  # the compiler behind the swap records a CUDA graph of it
    obstacle: str | None = None  # why nothing but the call as it stands can be right here
    written_as: str = "sdpa"  # "operations": spelled out in the graph; "kernel": a kernel that PyTorch has chosen
    exported: bool = False  # stands in an exported program: operators only, checks as nodes

    def described(self) -> AttentionCall:
        """The same call with its symbolic sizes as text, for reports: it keeps no tracing state alive."""
        sizes: dict[str, Any] = {name: described(getattr(self, name)) for name in SIZES}
        shape: Any = tuple(described(size) for size in self.mask.shape)
        window: Any = self.mask.window and tuple(None if size is None else described(size) for size in self.mask.window)
        return replace(self, mask=replace(self.mask, shape=shape, window=window), **sizes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self.described())

    @staticmethod
    def from_dict(data: dict[str, Any]) -> AttentionCall:
        mask = data["mask"]
        window = tuple(mask["window"]) if mask.get("window") else None
        mask = Mask(
            MaskKind(mask["kind"]), mask["dtype"], tuple(mask["shape"]), mask["needs_grad"], window,
            mask.get("no_key", "zeros"),
        )  # fmt: skip
        named = {OLD_NAMES.get(name, name): value for name, value in data.items()}
        return AttentionCall(**{**named, "mask": mask})


# How fields are called in files from before December 2026.
OLD_NAMES = {"form": "written_as", "captured": "in_cuda_graph"}
SIZES = ("batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim", "value_dim")
