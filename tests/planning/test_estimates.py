# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Estimates from few and noisy samples."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_import_contract import imports_of

from specblock_hf import planning
from specblock_hf.planning.estimates import (
    BANDS,
    FEW,
    GUESSED,
    LEVEL_WEIGHT,
    OLD,
    RECENT,
    RENEWED,
    STEP,
    WAY_WEIGHT,
    WINDOW,
    Claims,
    Gains,
    Level,
    Times,
    VerifyTimes,
)


def test_a_busy_machine_only_adds_time():
    times = Times()
    for number, seconds in enumerate([2.0, 40.0, 2.2, 40.0, 2.4, 40.0, 2.6]):
        times.add(seconds, number)
    assert times.middle == 2.6 and times.spread == pytest.approx(2.6 / 2.2 - 1)


def test_only_the_latest_samples_count():
    times = Times()
    for number in range(WINDOW):
        times.add(1.0 + number, number)
    assert times.samples == [1.0 + number for number in range(WINDOW)]
    last = 2 * RENEWED * WINDOW
    for number in range(WINDOW, last):
        times.add(1.0 + number, number)
    # A full window is renewed slowly, and its age is that of the last time all the same.
    assert times.samples == [1.0 + number for number in range(last)[::RENEWED][-WINDOW:]]
    assert times.age(last) == 1
    times.add(5.0, last + OLD)
    assert times.samples == [5.0]


def test_the_machines_pace_is_followed_by_what_is_known_well():
    times = Times()
    for number in range(FEW - 1):
        times.add(2.0, number)
    assert times.paced(1.0, 9.0) == 1
    times.add(2.0, FEW)
    # However long a time is.
    assert times.paced(1.0, 2.1) == times.paced(1.0, 90.0) == 1 + STEP
    assert times.paced(1.0, 1.9) == pytest.approx(1 / (1 + STEP))
    pace = 1.0
    for _ in range(60):
        pace = times.paced(pace, 2.4)
    assert pace == pytest.approx(1.2, rel=STEP)


def test_few_samples_make_a_time_old_whenever_they_were_taken():
    times = Times()
    assert times.age(3) == OLD
    for number in range(5):
        times.add(1.0, number)
    assert times.age(10) == 6


def test_a_curve_between_and_beyond_its_points():
    verify = VerifyTimes(0.1)
    verify.add(1, 10.0, 0)
    assert verify.at([1, 2, 11]) == pytest.approx([10, 11, 20])
    verify.add(4, 11.5, 1)
    assert verify.at([4]) == pytest.approx([13])  # one sample is none
    verify.add(4, 12.0, 1)
    # Between, and on as steeply as from the first to the last.
    assert verify.at([1, 2, 4, 8]) == pytest.approx([10, 10.5, 11.5, 13.5])
    for seconds in (30.0, 11.25):
        verify.add(8, seconds, 2)
    # What less work was measured to cost is no more than what more work does; and never flat beyond.
    assert verify.at([4, 8, 12]) == pytest.approx([11.25, 11.25, 12.25])


def test_a_plain_step_takes_no_longer_than_any_round():
    verify = VerifyTimes(0.1)
    verify.add(1, 10.0, 0)
    for seconds in (4.0, 5.0):
        verify.add(8, seconds, 1)
    assert verify.plain == 4.0


def test_a_cut_tree_tells_what_smaller_ones_accept():
    gains, prior = Gains(), [0.375] * len(BANDS)
    for _ in range(400):
        # Ranks 0 and 6 of seven nodes: the first band and the fourth (6 and 7).
        gains.add([0, 6], 7, 7, prior)
    sums = gains.expected(prior, GUESSED)
    place = BANDS.index(7)
    assert sums[0] == pytest.approx(1, abs=0.2) and sums[place] == pytest.approx(2, abs=0.6)
    # Beyond seven nodes the prior, scaled by what came true of it below: 2 of 1.5.
    rounds = gains.trials[0]
    own = (2 * rounds + GUESSED * WAY_WEIGHT) / (1.5 * rounds + GUESSED * WAY_WEIGHT)
    assert sums[place + 1] - sums[place] == pytest.approx(0.375 * own) and 1.25 < own < 1.33
    # Less of that where the prior was measured.
    assert 0.375 < gains.expected(prior)[place + 1] - gains.expected(prior)[place] < 0.375 * own


def test_nodes_that_there_were_not_add_nothing():
    gains, prior = Gains(), [0.5] * len(BANDS)
    gains.add([0], 7, 2, prior)
    assert gains.trials[:5] == [1] * 4 + [0] and gains.hits[:2] == [1, 0] and gains.fill == 2 / 7


def test_the_rows_of_a_batch_are_one_round():
    one, four, prior = Gains(), Gains(), [0.5] * len(BANDS)
    for gains, rows in ((one, 1), (four, 4)):
        for _ in range(64 * rows):
            gains.add([0], 3, 3, prior, rows=rows)
    assert four.hits[0] == pytest.approx(4 * one.hits[0], rel=0.01)


def test_few_rounds_say_little_of_a_way():
    gains, prior = Gains(), [0.5] * len(BANDS)
    before = gains.expected(prior)
    assert before == pytest.approx([0.5 * count for count in range(1, len(BANDS) + 1)])
    for _ in range(3):
        gains.add([], 15, 15, prior)
    place = BANDS.index(15)
    # Three rounds that accepted nothing of three tokens each leave most of what was expected.
    assert 0.85 * before[place] < gains.expected(prior)[place] < before[place]


def test_a_text_is_compared_with_the_long_run_for_as_long_as_it_is_recent():
    level = Level()
    assert level.at(0) == 1
    for now in range(40):
        level.add(2.0, 1.0, now)
    recent = sum(0.5 ** (age / RECENT) for age in range(40))
    assert level.at(39) == pytest.approx((2 * recent + LEVEL_WEIGHT) / (recent + LEVEL_WEIGHT))
    assert level.at(39) > 1.4
    assert 1 < level.at(39 + 8 * RECENT) < 1.02
    # One round that stands for more, because nobody looked for long.
    level.add(0.0, 1.0, 39 + 8 * RECENT, weight=8.0)
    assert level.at(39 + 8 * RECENT) < 0.81


@pytest.mark.parametrize(
    ("tenths", "least"), [([9, 5, 3, 1, 1], 0.125), ([1, 1, 1, 1, 1], 1.0), ([9, 9, 9, 9, 9], 0.5**5)]
)
def test_claims_are_taken_for_what_they_are_worth(tenths, least):
    claims = Claims()
    for now in range(300):
        claims.add([(-place - 0.5, now % 10 < right) for place, right in enumerate(tenths)], now)
    assert claims.least(0.2) == least


def test_the_room_knows_no_torch_and_no_clock():
    paths = list(Path(planning.__file__).parent.glob("*.py"))
    assert len(paths) > 3
    imported = {name.split(".")[0] for path in paths for name in imports_of(path)}
    assert not imported & {"torch", "transformers", "time", "random"}
