# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What is kept from text to text, and over a long time, by made-up rounds."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from specblock_hf.planning.controller import PlanController, Setting
from specblock_hf.planning.estimates import FEW, LEVEL_WEIGHT
from specblock_hf.planning.offers import LOOKUPS, Choice, Offer, Round, Way
from specblock_hf.planning.record import PATIENCE, Record


SETTING = Setting("a target", "a machine", "float32")
OFFER = Offer(
    {Way(1): [(4, 2.15), (8, 2.36), (12, 2.46), (24, 2.59)], Way(2, 4): [(12, 2.63), (24, 2.82)]}, 60, trusted=True
)
SEVEN = Choice(7, Way(1))


def played(choice: Choice, kept: int = 0, found: float = 0.0) -> Round:
    """A round that keeps the `kept` likeliest nodes; a plain step takes 22 ms, a node 0.3, a draft 5."""
    rows = [[(-1.0 - node / 100, node < kept) for node in range(choice.nodes)]] if choice.nodes else []
    drafted, seconds = choice.way.forwards > 0, 0.022 + 0.0003 * choice.nodes
    return Round(choice, rows, 1 + choice.nodes, 1.0 + kept, drafted, found, 0.005 * bool(choice.nodes), seconds)


def test_plain_steps_that_are_measured_again_are_lessons_one_by_one():
    controller, plain_steps = PlanController(), []
    for number in range(1000):
        choice = controller.next(SETTING, OFFER)
        plain_steps += [number] * (not choice.nodes)
        controller.observe(SETTING, OFFER, played(choice, min(choice.nodes, 2)))
    late = [number for number in plain_steps if number > 100]
    # At most as many as a time needs to be known, twice, each of them a lesson that is paid for.
    assert 2 < len(late) <= 2 * FEW and min(there - here for here, there in pairwise(late)) >= PATIENCE


def test_a_text_is_not_expected_to_repeat_itself_as_the_last_one_did_at_its_end():
    record, offer = Record(), replace(OFFER, finds=True)
    for _ in range(5):
        record.observe(offer, played(Choice(0)))
    for text in range(6):
        record.forget_text()
        for number in range(60):
            found = 3.0 if text % 2 and number >= 25 else 0.0
            record.observe(offer, played(SEVEN, 3 if found else 1, found))
    assert record.share[3] > 0.6
    assert record.of_any_text().share == record.usual_share
    record.forget_text()
    assert record.share == record.usual_share and 0.15 < record.share[3] < 0.4  # 105 of 360 rounds
    best, _ = record.decide(offer)
    assert best.nodes and best.way != LOOKUPS


def test_the_first_round_of_a_text_stands_for_itself_alone():
    record = Record()
    for _ in range(20):
        record.observe(OFFER, played(Choice(0)))
    record.forget_text()
    record.observe(OFFER, played(SEVEN))
    expected = OFFER.drafts(Way(1), 7)
    assert record.levels[1].at(record.times[1]) == pytest.approx(LEVEL_WEIGHT / (LEVEL_WEIGHT + expected), rel=1e-3)


def test_what_was_measured_on_a_slower_machine_compares_with_what_is_measured_now():
    """
    Trees of seven nodes were drafted while the machine warmed up, smaller ones ever since. In such a trace seven nodes
    seemed 7 % dearer than they were for the next 800 rounds, in which five were drafted though seven paid.
    """
    record = Record()
    seen = (
        [(Choice(0), 1.14)] * FEW
        + [(SEVEN, 1.12)] * 20
        + [(Choice(3, Way(1)), 1 + 0.12 * 0.98**n) for n in range(200)]
    )
    for choice, pace in seen:
        round_ = played(choice, min(choice.nodes, 2))
        record.observe(OFFER, replace(round_, draft=pace * round_.draft, rest=pace * round_.rest))
    three, seven = record.verify.at([4, 8])
    assert seven / three == pytest.approx(played(SEVEN).rest / played(Choice(3, Way(1))).rest, rel=0.03)
    assert record.pace * three == pytest.approx(played(Choice(3, Way(1))).rest, rel=0.03)
    assert record.pace < 0.92


def test_what_was_saved_before_texts_began_with_the_long_run():
    record = Record()
    for _ in range(9):
        record.observe(OFFER, played(Choice(0)))
    saved = record.to_dict() | {"share": [0.5, 0.25, 0.25, 0.0]}
    del saved["usual_share"]
    assert Record.from_dict(saved).usual_share == [0.5, 0.25, 0.25, 0.0]
