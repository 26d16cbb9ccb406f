"""One call of scaled dot-product attention as plain data, without nodes and tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import Any

from ..graphs.sizes import Size, described


class MaskKind(str, Enum):
    """The kind of a mask that the graph proves. Causal is a kind without a tensor."""

    NONE = "none"
    CAUSAL_UPPER_LEFT = "causal"  # row i sees keys 0..i: SDPA's is_causal
    CAUSAL_LOWER_RIGHT = "causal lower-right"  # row i sees keys 0..i + kv_len - q_len: FlashAttention >= 2.1
    KEY_PADDING = "key padding"  # the same for every head and query, as the mask's shape or the graph shows
    QUERY_KEY_PADDING = "padding of queries and keys"  # a key takes part for a query if neither of them is padding
    CAUSAL_PADDING = "causal and key padding"  # causal with either alignment, and some keys are padding
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
    """The mask of a call. `dtype`, `shape` and `needs_grad` describe the model's tensor, also where `understand_masks` has
    proven that this tensor is causal or hides nothing.

    window: how many keys before and after its own position a query sees in a sliding window; None: all of them.
    no_key: the output of a row that sees no key. "zeros": SDPA's output for a boolean mask and for -inf. An additive mask with
        a finite number shifts all scores of the row alike: "all keys", the output without a mask, or "mean", the mean of all
        values, where the number is so large that the scores vanish beside it.
    if_boolean: the kind that the graph would prove of an additive mask if the inputs of the graph that it is computed from were
        boolean. None: no other.
    low_rows: an additive mask may hide a row as a whole by a number that the log-sum-exp of its scores is lost in.
    whole: of key padding, the parts of a joined sequence (`AttentionCall.joined`), by their places, of which the graph proves
        that no key is hidden.
    """

    kind: MaskKind = MaskKind.NONE  # as proven by the graph
    dtype: str | None = None  # "bool", "float32"; None: the model passes no tensor
    shape: tuple[Size, ...] = ()  # as the model passes the tensor
    needs_grad: bool = False  # the mask is learned
    window: tuple[Size | None, Size | None] | None = None
    no_key: str = "zeros"
    if_boolean: MaskKind | None = field(default=None, compare=False)
    low_rows: bool = False
    whole: tuple[int, ...] = ()

    @property
    def is_tensor(self) -> bool:
        return self.is_boolean or self.kind is MaskKind.ADDITIVE

    @property
    def is_boolean(self) -> bool:
        return self.kind in _BOOLEAN

    @property
    def given(self) -> Mask | None:
        """The model's tensor as a boolean or additive mask, without the proven kind; None where the model passes no tensor."""
        if self.dtype is None:
            return None
        kind = MaskKind.BOOLEAN if self.dtype == "bool" else MaskKind.ADDITIVE
        return Mask(kind, self.dtype, self.shape, self.needs_grad, low_rows=self.low_rows)

    @property
    def bare(self) -> Mask:
        """The mask for a kernel that takes the proven kind: a boolean tensor, or no tensor where it is causal or no mask."""
        return replace(self, dtype="bool") if self.is_boolean else replace(self, dtype=None, shape=())

    @property
    def is_causal(self) -> bool:
        """Whether the mask is causal and nothing else, with either alignment."""
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
    """One call of scaled dot-product attention, as `find_calls` reads it from a graph.

    Sizes are `int`, or `torch.SymInt` while the graph is being rewritten, or text in a report.
    """

    site: str  # the module path, as "transformer_blocks.0.attn1"
    batch: Size  # the product of the leading sizes where the rank is above 4
    heads: Size  # heads of the query; 1 where the rank is 3
    kv_heads: Size  # heads of key and value
    q_len: Size  # queries of one head
    kv_len: Size  # keys of one head
    head_dim: Size  # of query and key
    value_dim: Size  # the head dim of the value
    dtype: str  # of the matrix products, as "bfloat16"; under autocast not the dtype of the arguments
    device: str = "cpu"  # the device type
    mask: Mask = Mask()
    scale: float | None = None  # None: 1 / sqrt(head_dim)
    dropout: float = 0.0  # the probability
    needs_grad: bool = False  # the output requires a gradient
    layout: str = "bhsd"  # the query's order in memory: "bhsd", "bshd" or "strided"
    role: str = "self"  # "cross" where keys come from another tensor than queries
    deterministic: bool = False  # torch.use_deterministic_algorithms(True) is on
    in_cuda_graph: bool = False  # the inner compiler records the call in a CUDA graph
    obstacle: str | None = None  # why the call must stay unchanged
    # "operations": matmul and softmax in the graph; "kernel": a kernel chosen by PyTorch; "flex": a call of flex_attention;
    # "function": a call of a library's operator
    written_as: str = "sdpa"
    exported: bool = False  # part of an exported program, which holds operators only and checks as nodes
    logsumexp: bool = False  # the log-sum-exp of each row's scores is read too: a step of a ring (parallel/rings.py)
    # Self attention: the lengths of the parts, as of video and text, of which the graph joins the sequence. (): not known.
    joined: tuple[Size, ...] = ()

    @property
    def is_sdpa(self) -> bool:
        """Whether the model's call is SDPA, or the kernel that PyTorch has chosen for it: `native` leaves such a call."""
        return self.written_as in ("sdpa", "kernel")

    def described(self) -> AttentionCall:
        """The same call with symbolic sizes as text, for reports: the copy keeps no tracing state alive."""
        sizes: dict[str, Any] = {name: described(getattr(self, name)) for name in SIZES}
        shape: Any = tuple(described(size) for size in self.mask.shape)
        window: Any = self.mask.window and tuple(None if size is None else described(size) for size in self.mask.window)
        sizes["joined"] = tuple(described(size) for size in self.joined)
        return replace(self, mask=replace(self.mask, shape=shape, window=window), **sizes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self.described())

    @staticmethod
    def from_dict(data: dict[str, Any]) -> AttentionCall:
        mask = data["mask"]
        window = tuple(mask["window"]) if mask.get("window") else None
        mask = Mask(
            MaskKind(mask["kind"]), mask["dtype"], tuple(mask["shape"]), mask["needs_grad"], window,
            mask.get("no_key", "zeros"), MaskKind(mask["if_boolean"]) if mask.get("if_boolean") else None,
            mask.get("low_rows", False), tuple(mask.get("whole", ())),
        )  # fmt: skip
        named = {OLD_NAMES.get(name, name): value for name, value in data.items()}
        return AttentionCall(**{**named, "mask": mask, "joined": tuple(data.get("joined", ()))})


# The names of fields in files from before December 2026, and their names now.
OLD_NAMES = {"form": "written_as", "captured": "in_cuda_graph"}
SIZES = ("batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim", "value_dim")
