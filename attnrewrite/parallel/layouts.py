"""How a tensor is spread over the ranks.

The elements along one dimension are spread in segments: a joint sequence of 12 text tokens and 40 image tokens has the lengths
(12, 40), and each rank holds its part of the text, then its part of the image. A rank's part of a segment of length L is one
chunk of ceil(L / ranks) elements; behind the end of the segment it holds copies of the last element, so that all ranks hold
tensors of equal shapes. Nothing may mix the elements along a dimension that is spread, so copies never reach a result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..graphs.sizes import Size, always, described, holds


@dataclass(frozen=True)
class Ranks:
    """The devices that share a computation, as one of them sees it."""

    size: int
    rank: int = 0
    group: str = ""  # name of the process group; "" for ranks that are only described
    numbers: tuple[int, ...] = ()  # of a part of the group: theirs in the group
    of: int = 0  # the size of the group; 0: these are all

    def together(self, number: int) -> Ranks:
        """Those `number` neighbours, this rank among them, that share the heads."""
        first = self.rank - self.rank % number
        return Ranks(number, self.rank % number, self.group, tuple(range(first, first + number)), self.size)

    def across(self, number: int) -> Ranks:
        """This rank, and those that have its place among their neighbours."""
        numbers = range(self.rank % number, self.size, number)
        return Ranks(self.size // number, self.rank // number, self.group, tuple(numbers), self.size)

    def rows(self, of_each: Mapping[int, Size]) -> list[Size]:
        """The rows that an exchange of the whole group gives to each of its ranks. of_each: to some of these ranks."""
        found: list[Size] = [0] * (self.of or self.size)
        for rank, rows in of_each.items():
            found[self.numbers[rank] if self.of else rank] = rows
        return found


@dataclass(frozen=True, eq=False)
class Shard:
    """A tensor of which each rank holds a part along `dim`. lengths: of the segments, of all ranks together."""

    dim: int
    lengths: tuple[Size, ...]

    @property
    def total(self) -> Size:
        return total(self.lengths)

    def local(self, ranks: int) -> Size:
        """The size of a rank's part along `dim`."""
        return total([chunk(length, ranks) for length in self.lengths])

    def along(self, dim: int) -> Shard:
        return Shard(dim, self.lengths)

    def is_padded(self, ranks: int) -> bool:
        """Whether some rank holds copies of a last element."""
        return not all(divides(ranks, length) for length in self.lengths)

    def __str__(self) -> str:
        return f"dim {self.dim} ({' + '.join(str(described(length)) for length in self.lengths)})"


# None: every rank holds the whole tensor.
Placement = Shard | None


def same(one: Placement, other: Placement) -> bool:
    if one is None or other is None:
        return one is other
    return one.dim == other.dim and same_lengths(one.lengths, other.lengths)


def same_lengths(one: Sequence[Size], other: Sequence[Size]) -> bool:
    return len(one) == len(other) and all(always(a == b) for a, b in zip(one, other, strict=True))


def chunk(length: Size, ranks: int) -> Size:
    """The number of elements that each rank holds of a segment."""
    return (length + ranks - 1) // ranks if not divides(ranks, length) else length // ranks


def total(lengths: Sequence[Size]) -> Size:
    """The sum of the lengths."""
    result: Size = 0
    for length in lengths:
        result = result + length
    return result


def divides(ranks: int, length: Size) -> bool:
    """Whether the ranks divide a length. For a symbolic length the answer becomes a guard."""
    return holds(length % ranks == 0)
