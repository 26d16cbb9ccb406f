"""The table of kernels that `with_backend("auto")` prefers, with the evidence for each row.

A row says for which calls its kernels were faster than `native`. A call that fits no row goes to `native`, and so does a call
that no kernel of its row may take: nothing is guessed from another machine, mask or length. `attnrewrite bench --kernels`
measures every row again and says which rows are wrong.

The table has no hub kernels: "auto" should not download anything that nobody asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..graphs.sizes import Size, always, holds
from ..kernels.calls import AttentionCall, MaskKind
from ..kernels.machines import Machine
from ..kernels.records import Numerics

PADDING = frozenset({MaskKind.KEY_PADDING, MaskKind.QUERY_KEY_PADDING})
UNMASKED = frozenset({MaskKind.NONE})
WINDOW = frozenset({MaskKind.SLIDING_WINDOW})
DOCUMENTS = frozenset({MaskKind.BLOCKS})


@dataclass(frozen=True)
class Row:
    """The kernels to prefer for inference calls in bfloat16 or float16 that meet every condition of the row."""

    capability: tuple[int, int]  # compute capability of the GPU
    masks: frozenset[MaskKind]
    head_dim: tuple[int, int]  # first and last, both included
    kv_len: tuple[int, int | None]  # first and last, both included; None: no limit
    rows: int  # least batch * heads * q_len; below it a kernel with larger tiles leaves part of the GPU without work
    names: tuple[str, ...]  # in order of preference
    evidence: str  # the measured gain and the file of the results
    numerics: Numerics = Numerics.REORDERED  # the row needs a policy with this limit or a higher one
    q_len: tuple[int, int | None] = (
        128,
        None,
    )  # first and last; FlashAttention 3 and 4 are half as fast as SDPA for one query

    def fits(self, call: AttentionCall, machine: Machine, limit: Numerics) -> bool:
        """Whether the call meets the conditions. Static facts first: each question about a symbolic size becomes a guard."""
        if machine.capability != self.capability or call.mask.kind not in self.masks or limit < self.numerics:
            return False
        if call.needs_grad or call.dtype not in ("bfloat16", "float16"):
            return False
        longest = self.q_len[1]
        return (
            holds(call.head_dim >= self.head_dim[0])
            and holds(call.head_dim <= self.head_dim[1])
            # Of a batch that is a number this asks nothing, and it spares the questions about lengths.
            and (longest is None or holds(call.batch * call.heads * longest >= self.rows))
            and _within(call.kv_len, self.kv_len)
            and _within(call.q_len, self.q_len)
            and holds(call.batch * call.heads * call.q_len >= self.rows)
        )


def _within(size: Size, limits: tuple[int, int | None]) -> bool:
    return holds(size >= limits[0]) and (limits[1] is None or holds(size <= limits[1]))


def wide_on_cpu(call: AttentionCall, machine: Machine) -> bool:
    """Whether an attention that is written in operations is faster as it is: on a CPU, with heads wider than there are queries
    and keys, as the attention of channels in XCiT. Its scores are smaller than its queries, so a kernel that never stores them
    saves nothing: `native` reached 0.88 and 0.96 of the speed in two runs (`xcit_channels` in
    bench/results/handwritten_cpu.json is the first). Up to 32 queries or keys the two were equal. Asks nothing of symbolic
    sizes."""
    if machine.device != "cpu" or call.written_as != "operations" or call.needs_grad or call.dtype != "float32":
        return False
    return all(always(size > 32) and always(size < call.head_dim) for size in (call.q_len, call.kv_len))


HOPPER = (9, 0)
SHAPES = "bench/results/kernels_by_shape_h100.json"
MODELS = "bench/results/masked_models_h200.json"
SHORT = "bench/results/short_sequences_h200.json"
WINDOWS = "bench/results/kernels_by_shape_flash_4_h200.json"
NAMED = "bench/results/kernels_by_shape_h200.json"  # every named shape in one run, to which all rows are held

ROWS: tuple[Row, ...] = (
    # -- quantised: only if the policy allows it
    Row(HOPPER, UNMASKED, (65, 128), (16384, None), 200_000, ("_flash_3_fp8", "sage"),
        f"fp8 1.5x, sage 1.3x at 32,760 tokens of 12 and 40 heads: {SHAPES}", Numerics.QUANTISED),
    Row(HOPPER, UNMASKED, (64, 64), (16384, None), 300_000, ("_flash_3_fp8",),
        f"fp8 1.5x, FA4 1.4x at 2 x 17,776 tokens of 48 heads: {SHAPES}", Numerics.QUANTISED),
    Row(HOPPER, PADDING, (65, 128), (6144, None), 200_000, ("_flash_3_fp8",),
        f"fp8 2.4x at 32,896 tokens of 24 heads, 3.4x at 2 x 7,145, where FA3 is 1.8x and 2.9x: {SHAPES}", Numerics.QUANTISED),
    # -- no mask
    Row(HOPPER, UNMASKED, (65, 256), (4096, None), 49_000, ("_flash_3", "flash_4"),
        f"FA3 1.06x at 4,096 of 12 heads, 1.07x at 4,608, 1.2x at 32,760 tokens, 0.98x at 1,024: {SHAPES}"),
    Row(HOPPER, UNMASKED, (64, 64), (16384, None), 300_000, ("flash_4", "_flash_3"),
        f"FA4 1.40x, FA3 1.34x at 2 x 17,776 tokens of 48 heads: {SHAPES}"),
    Row(HOPPER, UNMASKED, (64, 64), (8192, 16383), 190_000, ("_flash_3", "flash_4"),
        f"FA3 1.15x at 8,192 tokens of 24 heads: {SHAPES}"),
    Row(HOPPER, UNMASKED, (64, 64), (4096, 8191), 300_000, ("_flash_3", "flash_4"),
        f"FA3 1.29x at 2 x 4,429 tokens of 38 heads, 0.93x at 2 x 4,096 of 10: {SHAPES}"),
    # -- short sequences in large batches: temporal attention of video UNets
    Row(HOPPER, UNMASKED, (40, 64), (8, 32), 64_000, ("_native_folded", "_native_efficient"),
        f"4.2x at 18,432 x 5 heads of 14, 2.0x of 32, 4.1x at 70,000 x 8 of 16, 8.2x at 300,000 x 8 of 8: {SHORT}",
        q_len=(8, 32)),
    Row(HOPPER, UNMASKED, (65, 128), (8, 16), 64_000, ("_native_folded",),
        f"2.4x at 2,048 x 8 heads of 16, 80 wide and at 4,096 x 8, 128 wide: {SHORT}", q_len=(8, 16)),
    Row(HOPPER, UNMASKED, (160, 160), (8, 16), 64_000, ("_native_folded", "_native_efficient"),
        f"2.5x at 512 x 8 heads of 16: {SHORT}", q_len=(8, 16)),
    Row(HOPPER, UNMASKED, (160, 160), (17, 32), 64_000, ("_native_efficient",),
        f"1.82x at 2,304 x 8 heads of 32, where _native_folded is 1.46x; 0.90x of 48: {SHORT}", q_len=(17, 32)),
    Row(HOPPER, UNMASKED, (40, 64), (33, 64), 64_000, ("_native_efficient",),
        f"1.35x at 4,608 x 10 heads of 64, 0.43x of 65: {SHORT}", q_len=(33, 64)),
    # -- sliding windows: these kernels skip what is hidden, where SDPA computes all of it and reads a mask
    Row(HOPPER, WINDOW, (64, 128), (4096, None), 80_000, ("flash_4", "flex", "_native_varlen"),
        f"1,024 of 32,760 tokens of 40 heads: FA4 57x, flex 30x, PyTorch's own 25x; 256 of 4,096: 8.5x, 6.5x, 4.7x: {WINDOWS}"),
    Row(HOPPER, DOCUMENTS, (128, 128), (32760, None), 1_000_000, ("flash_4", "flex"),
        f"four documents, 32,760 tokens of 40 heads: FA4 6.6x, flex 4.3x, the lists of blocks made for each call: {WINDOWS}"),
    # -- key padding: these kernels get the keys in use in front of the others; a mask keeps SDPA from its fastest kernel
    Row(HOPPER, PADDING, (64, 256), (16384, None), 100_000, ("_flash_3", "flash_4"),
        f"FA3 and FA4 1.8x at 32,896 tokens of 24 heads, PyTorch's own 0.91x: {SHAPES}"),
    Row(HOPPER, PADDING, (64, 256), (6144, 16383), 100_000, ("_flash_3", "flash_4", "flash_varlen", "_native_varlen"),
        f"2 x 7,145 tokens: FA3 1.44x a step of Qwen-Image, FA2 1.21x, PyTorch's own 1.19x: {MODELS}"),
    Row(HOPPER, PADDING, (64, 256), (4096, 6143), 100_000, ("_flash_3", "flash_4"),
        f"FA3 1.51x at 2 x 4,096 of 24 heads of 128, 1.81x at 4,352 of 96, PyTorch's own 0.83x and 1.05x: {SHAPES}"),
)  # fmt: skip
