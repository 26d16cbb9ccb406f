"""Reads the products of an attention, q k^T and weights @ v, from matmul, bmm, baddbmm or einsum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..graphs.axes import Atom, Axes, Axis, Dims
from ..graphs.nodes import value_of
from ..graphs.sizes import always, is_one
from ..graphs.spellings import TURNS, argument, first, spelled
from .found import Missed

PRODUCTS = frozenset({"matmul", "baddbmm", "einsum"})


@dataclass(frozen=True)
class Product:
    """alpha * (left @ right) + beta * added."""

    node: Node
    left: Node
    right: Node
    letters: tuple[str, str, str]  # einsum letters of left, right and the output: ("bik", "bkj", "bij")
    alpha: Any = 1
    added: Node | None = None  # the tensor that baddbmm adds
    beta: Any = 1

    @property
    def summed(self) -> str:
        """The letters that are summed over."""
        left, right, output = self.letters
        return "".join(letter for letter in left if letter in right and letter not in output)

    @property
    def batched(self) -> bool:
        """Whether each operand has all dimensions of the output but one."""
        left, right, output = self.letters
        return all(len(set(output) - set(each)) == 1 for each in (left, right))


def read_product(node: Node) -> Product | None:
    """The product of two matrices that a node computes; None if it computes anything else."""
    found = _read(node)
    values = [] if found is None else [value_of(each) for each in (node, found.left, found.right)]
    return found if all(isinstance(value, torch.Tensor) for value in values) else None


def _read(node: Node) -> Product | None:
    name = spelled(node)
    if name not in PRODUCTS or "out" in node.kwargs:
        return None
    if name == "einsum":
        return _einsum(node)
    if name == "baddbmm":
        left, right = argument(node, 1, "batch1"), argument(node, 2, "batch2")
        added, beta = first(node), argument(node, 3, "beta", default=1)
        unused = not isinstance(beta, Node) and beta == 0
        alpha = argument(node, 4, "alpha", default=1)
        if isinstance(left, Node) and isinstance(right, Node) and isinstance(added, Node):
            return Product(node, left, right, ("bik", "bkj", "bij"), alpha, None if unused else added, beta)
        return None
    left, right = first(node), argument(node, 1, "other", "mat2", "tensor2")
    if not isinstance(left, Node) or not isinstance(right, Node):
        return None
    ranks = (_rank(left), _rank(right))
    if min(ranks) < 2 or max(ranks) > 12:
        return None
    lead = "abcdefgh"[: max(ranks) - 2]
    letters = tuple(lead[len(lead) - rank + 2 :] for rank in ranks)
    return Product(node, left, right, (letters[0] + "ik", letters[1] + "kj", lead + "ij"))


def _einsum(node: Node) -> Product | None:
    equation = node.args[0] if node.args else None
    operands: Any = node.args[1:]
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = operands[0]
    if not isinstance(equation, str) or len(operands) != 2 or not all(isinstance(each, Node) for each in operands):
        return None
    equation = equation.replace(" ", "")
    if equation.count("->") != 1 or equation.count(",") != 1:
        return None
    inputs, output = equation.split("->")
    left, right = inputs.split(",")
    if "..." in equation:
        spread = [_spread(text, _rank(each)) for text, each in zip((left, right), operands, strict=True)]
        if None in spread or "..." not in output:
            return None
        left, right = (str(text) for text in spread)
        dots = max((text for text in (left, right)), key=lambda text: sum(letter.isdigit() for letter in text))
        output = output.replace("...", "".join(letter for letter in dots if letter.isdigit()))
    for text in (left, right, output):
        if len(set(text)) != len(text):
            return None
    if not set(output) <= set(left) | set(right):
        return None
    if any(letter not in output for letter in set(left) ^ set(right)):  # a sum within one operand
        return None
    return Product(node, operands[0], operands[1], (left, right, output))


def _spread(text: str, rank: int) -> str | None:
    """`text` with "..." replaced by a digit for each dimension, counted from the right, so that the dimensions broadcast."""
    if "..." not in text:
        return text
    missing = rank - (len(text) - 3)
    return None if missing < 0 else text.replace("...", "".join(str(each) for each in reversed(range(missing))))


def operand_dims(product: Product, dims: Dims, axes: Axes) -> tuple[Dims, Dims, Axis] | Missed:
    """The dims of left and right and the axis that is summed over, for a product whose output has `dims`.

    Several letters that are summed over make one axis: einsum("rinhd,rjnhd->hnij") has heads of r * d."""
    left, right, output = product.letters
    if not product.summed:
        return Missed("the product of its queries and keys sums over no dimension", product.node)
    summed = {letter: Atom(_size(product, letter)) for letter in product.summed}  # several make one wider head
    letters: dict[str, Axis] = {**dict(zip(output, dims, strict=True)), **{each: (summed[each],) for each in summed}}
    sizes = dict(zip(output, value_of(product.node).shape, strict=True))
    sizes |= {each: atom.size for each, atom in summed.items()}
    found = [
        _operand(text, value_of(node), letters, sizes) for text, node in ((left, product.left), (right, product.right))
    ]
    if found[0] is None or found[1] is None:
        return Missed("the sizes of its queries and keys are not known to match", product.node)
    return found[0], found[1], tuple(summed.values())


def output_dims(product: Product, weights: Node, dims: Dims, axes: Axes) -> tuple[Dims, Dims, Axis, Axis] | Missed:
    """For a product with the operand `weights`, which has `dims`: the dims of the other operand and of the output, the axis
    that is summed over, and the axis that only the other operand has."""
    left, right, output = product.letters
    mine, theirs = (left, right) if weights is product.left else (right, left)
    other = product.right if weights is product.left else product.left
    if not product.summed:
        return Missed("the product of its weights and values sums over no dimension", product.node)
    free = {letter: Atom(_size(product, letter)) for letter in theirs if letter not in mine}
    if not free:
        return Missed("its values have no dimension that its weights lack", product.node)
    letters: dict[str, Axis] = {**dict(zip(mine, dims, strict=True)), **{each: (free[each],) for each in free}}
    sizes = dict(zip(mine, value_of(weights).shape, strict=True)) | {each: atom.size for each, atom in free.items()}
    others = _operand(theirs, value_of(other), letters, sizes)
    if others is None:
        return Missed("the sizes of its weights and values are not known to match", product.node)
    summed = tuple(atom for letter in product.summed for atom in letters[letter])
    return others, tuple(letters[letter] for letter in output), summed, tuple(free.values())


def _operand(text: str, value: torch.Tensor, letters: dict[str, Axis], sizes: dict[str, Any]) -> Dims | None:
    axes: list[Axis] = []
    for letter, size in zip(text, value.shape, strict=True):
        if always(size == sizes[letter]):
            axes.append(letters[letter])
        elif is_one(size):
            axes.append(())
        else:
            return None
    return tuple(axes)


def _size(product: Product, letter: str) -> Any:
    for text, node in zip(product.letters[:2], (product.left, product.right), strict=True):
        if letter in text:
            return value_of(node).shape[text.index(letter)]
    raise ValueError(letter)


def _rank(node: Node) -> int:
    value = value_of(node)
    return value.dim() if isinstance(value, torch.Tensor) else 0


def mixes(product: Product, dims: Dims, kept: set[Atom], axes: Axes) -> bool:
    """Whether a product with `dims`, whose operands do not share `kept`, only mixes another axis of scores or weights, as
    "talking heads" do: einsum("bhij,hg->bgij", scores, mix)."""
    left, right, output = product.letters
    for mix, other in ((left, right), (right, left)):
        own = [letter for letter in mix if letter not in product.summed]
        holders = {letter for letter, axis in zip(output, dims, strict=True) if kept & set(axes.atoms(axis))}
        if len(mix) == 2 and len(own) == 1 and len(other) > 2 and holders and holders <= set(other) - set(mix):
            return True
    return False


NEAR, MANY = 12, 200  # most operations between a softmax and a product that belongs to it; most nodes to look at


def leads_to_product(node: Node, forward: bool = False) -> bool:
    """Whether a product of two computed matrices is within `NEAR` operations before a node, or after it (`forward`). A hint, if
    the operations in between were not understood."""
    seen, front = {node}, [node]
    for _ in range(NEAR):
        if any(_is_of_two_activations(each) for each in front):
            return True
        steps = [each for one in front for each in (one.users if forward else one.all_input_nodes) if each not in seen]
        front = list(dict.fromkeys(steps))[: MANY - len(seen)]
        seen.update(front)
    return False


def _is_of_two_activations(node: Node) -> bool:
    product = read_product(node)
    return product is not None and not any(is_weight(each) for each in (product.left, product.right))


def is_weight(node: Node) -> bool:
    """Whether a node is a parameter, or a view of one: a product with it is a linear layer."""
    while spelled(node) in ("view", "to", *TURNS) and isinstance(first(node), Node):
        node = first(node)
    return isinstance(value_of(node), torch.nn.Parameter) or node.op == "get_attr"
