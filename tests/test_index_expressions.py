"""Index arithmetic, and what is proven of it, also of symbolic sizes."""

import itertools

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from attnrewrite.masks.expressions import Expressions, rounded
from attnrewrite.masks.indices import Index, at_least_zero, axis, constant, divided, exchanged, index_of, within

BATCH, HEAD, QUERY, KEY = (axis(dim, constant(size)) for dim, size in zip((-4, -3, -2, -1), (3, 2, 7, 11), strict=True))


@pytest.fixture
def sizes():
    """Two symbols and the environment that would note a guard."""
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes)
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 2)
    yield mode.from_tensor(torch.empty(5, 13), symbolic_context=context).shape
    assert shapes.guards == []


def test_sums_and_products_are_one_form():
    assert (QUERY + KEY) * 2 - QUERY == QUERY + KEY * 2
    assert hash(QUERY - QUERY) == hash(constant(0))
    assert (QUERY * KEY) == (KEY * QUERY)
    assert axis(-1, constant(1)) == constant(0)


def test_positions_of_views_are_taken_apart():
    flat = (BATCH * 2 + HEAD) * 77 + KEY
    assert divided(flat, constant(77)) == (BATCH * 2 + HEAD, KEY)
    assert divided(BATCH * 2 + HEAD, constant(2)) == (BATCH, HEAD)
    assert divided(KEY, constant(11)) == (constant(0), KEY)


def test_what_is_not_known_is_not_taken_apart():
    quotient, rest = divided(KEY, constant(4))
    assert quotient != constant(0)
    assert quotient * 4 + rest == KEY
    assert not within(rest, constant(4))  # true, and not proven
    assert divided(BATCH * 10 + KEY, constant(10))[0] != BATCH  # the key may be 10


def test_bounds():
    assert at_least_zero(constant(10) - KEY)
    assert not at_least_zero(constant(9) - KEY)
    assert at_least_zero(QUERY + KEY)
    assert not at_least_zero(QUERY - KEY)
    assert not at_least_zero(KEY - 1)
    assert within(KEY + 3, constant(14))
    assert not within(KEY + 3, constant(13))


def test_symbolic_sizes(sizes):
    batch, length = map(index_of, sizes)
    row, column = axis(-4, batch), axis(-1, length + 9)
    assert index_of(sizes[1] * 2 + 9) == length * 2 + 9
    assert divided(row * (length + 9) + column, length + 9) == (row, column)
    assert at_least_zero(length + 8 - column)
    assert not at_least_zero(length + 7 - column)
    assert not at_least_zero(length - 3)
    assert index_of(sizes[0] * sizes[1] // 3) != length


def test_exchanged():
    square = axis(-2, constant(11))
    assert exchanged(square - KEY, -2, -1) == KEY - square
    assert exchanged(divided(KEY, constant(4))[0], -1, -2) == divided(square, constant(4))[0]


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.uint8]
)
def test_numbers_are_rounded_as_tensors_are(dtype):
    for number in (
        0.0,
        1.0,
        -10000.0,
        -1e9,
        -3.4028234663852886e38,
        1 / 3,
        65519.9,
        65520.0,
        200.0,
        7.9,
        float("-inf"),
    ):
        try:
            found = rounded(number, dtype)
        except OverflowError:
            assert not dtype.is_floating_point
        else:
            assert found == torch.tensor(number, dtype=torch.float64).to(dtype).item(), number


def test_equal_booleans_are_one_object():
    make = Expressions()
    a, b, c = (make.at_least_zero(KEY - number) for number in (3, 5, 7))
    for left, right in (
        (make.and_(a, make.and_(b, c)), make.and_(c, b, a, a)),
        (make.not_(make.not_(a)), a),
        (make.or_(a, make.not_(a)), make.true),
        (make.and_(a, make.not_(a)), make.false),
        (make.and_(a, make.or_(make.not_(a), b)), make.and_(a, b)),
        (make.and_(a, make.or_(a, b)), a),
        (make.not_(make.at_least_zero(QUERY - KEY)), make.at_least_zero(KEY - QUERY - 1)),
        (make.select(a, make.false, make.true), make.not_(a)),
        (make.zero(QUERY - KEY), make.zero(KEY - QUERY)),
        (make.at_least_zero(KEY), make.true),
        (make.zero(KEY - 11), make.false),
    ):
        assert left is right


def test_comparisons_of_positions():
    make = Expressions()
    key = make.index(KEY)
    for name, number in itertools.product(("lt", "le", "gt", "ge", "eq", "ne"), (-1, 0, 3, 3.5, 10, 10.5, 11)):
        value = make.compare(name, key, make.constant(number))
        swapped = make.compare(
            {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le"}.get(name, name), make.constant(number), key
        )
        for place in range(11):
            expected = {"lt": place < number, "le": place <= number, "gt": place > number, "ge": place >= number,
                        "eq": place == number, "ne": place != number}[name]  # fmt: skip
            assert holds_at(value, place) == holds_at(swapped, place) == expected, (name, number, place)


def holds_at(value, place):
    if value.kind == "constant":
        return value.number
    if value.kind == "not":
        return not holds_at(value.parts[0], place)
    if value.kind == "compare":  # position == 3.5
        return value.parts[1].number == place
    number = sum(factor * place ** len(product) for product, factor in value.parts[0].terms.items())
    return number >= 0 if value.kind == "at_least_zero" else number == 0


def test_an_index_is_hashed_by_what_it_is():
    assert len({Index({(): 2}), constant(2), constant(1) + 1}) == 1
