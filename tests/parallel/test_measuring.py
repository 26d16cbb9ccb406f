"""What ranks measured at one site, put together. The ranks as processes: test_ranks.py."""

import math
from dataclasses import replace

import pytest

from attnrewrite.measuring.of_all_ranks import choice, combined, described, measurements
from attnrewrite.planning.measurements import Measurement


def measured(**milliseconds):
    return tuple(Measurement(name, each, 0.01, 1e-3, 7, host=0.1) for name, each in milliseconds.items())


def test_the_slowest_rank_and_the_worst_error_count():
    first = measured(native=5.0, quick=1.0, other=4.0)
    second = measured(other=4.5, native=6.0, quick=9.0)
    second = (*second[:2], replace(second[2], error=2e-2, errors=(2e-2, None, 1e-3), spread=0.05, rounds=3, host=10.0))
    first = (first[0], replace(first[1], errors=(1e-2, None, 5e-3)), first[2])
    found = combined([first, second])
    assert [each.name for each in found] == ["native", "quick", "other"]
    quick = found[1]
    assert (quick.milliseconds, quick.error, quick.errors) == (9.0, 2e-2, (2e-2, None, 5e-3))
    assert (quick.spread, quick.rounds, quick.host, quick.dropped) == (0.05, 3, 10.0, None)
    assert choice(first, 0.02) == "quick"
    assert choice(found, 0.02) == "other"
    assert choice(found, 0.5) == "native"  # too little is gained


@pytest.mark.parametrize("reason", ["its error is above 2.0e-02, max_error", None])
def test_what_one_rank_cannot_use_no_rank_uses(reason):
    first, second = measured(native=5.0, quick=1.0), measured(native=5.0, quick=1.0)
    second = (second[0], replace(second[1], dropped=reason)) if reason else second[:1]
    for ranks in ([first, second], [first, first, second]):
        found = combined(ranks)
        assert found[1].dropped == (reason or "another rank has not measured it")
        assert choice(found, 0.02) == "native"


def test_nothing_compared_is_worse_than_any_error():
    first, second = measured(native=5.0), measured(native=5.0)
    (found,) = combined([first, (replace(second[0], error=math.nan),)])
    assert math.isnan(found.error)


def test_where_nothing_is_left_the_models_own_call_is():
    dropped = [replace(each, dropped="it raised") for each in measured(native=5.0, quick=1.0)]
    assert choice(combined([dropped, dropped]), 0.02) == "native"
    assert choice(combined([dropped[1:], dropped[1:]]), 0.02) is None


def test_what_ranks_send_comes_back_as_it_was():
    sent = (replace(measured(native=5.0)[0], error=math.nan, errors=(None, math.nan, 1e-3), limit=2e-2),)
    (back,) = measurements(described(sent))
    assert back == sent[0]
    assert math.isnan(back.error)
    assert back.errors[0] is None
    assert math.isnan(back.errors[1])
