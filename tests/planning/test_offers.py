# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What is expected of each way to draft before anything was drafted."""

from __future__ import annotations

from itertools import accumulate

import pytest

from specblock_hf.planning.estimates import BANDS
from specblock_hf.planning.offers import FOUND, LOOKUPS, RIGHT, Offer, Way


ONE, TWO, WIDE = Way(1), Way(2, 4), Way(2, 8)
OFFER = Offer({ONE: [(3, 2.0), (7, 2.3)], TWO: [(11, 2.6), (23, 2.8)], WIDE: [(31, 2.9)]}, 60, trusted=True)


def sums(offer: Offer, way: Way, found: int = 0) -> dict[int, float]:
    return dict(zip(BANDS, accumulate(offer.prior(way, found)), strict=True))


def test_a_way_is_expected_to_accept_no_less_than_a_part_of_it():
    one, two, wide = (sums(OFFER, way) for way in (ONE, TWO, WIDE))
    assert one[3] == pytest.approx(1.0) and one[7] == pytest.approx(1.3)
    # By its own figures, drawn out to fewer nodes, two forwards would add 0.89 and 1.34 tokens.
    assert two[3] == pytest.approx(1.0) and two[7] == pytest.approx(1.339, abs=1e-3)
    assert two[11] == wide[11] == pytest.approx(1.6) and wide[31] == pytest.approx(1.9)


def test_more_nodes_are_expected_to_accept_no_less_whatever_was_measured():
    offer = Offer({ONE: [(3, 2.0), (7, 1.9), (15, 2.2)]}, 60, trusted=True)
    assert min(offer.prior(ONE, 0)) >= 0 and sums(offer, ONE)[7] == pytest.approx(1.0)


@pytest.mark.parametrize("found", range(1, len(FOUND) + 1))
def test_a_continuation_is_expected_to_be_right_token_by_token(found):
    tokens = sums(OFFER, LOOKUPS, found)
    for nodes in (1, 3, 7):
        assert tokens[nodes] == pytest.approx(sum(RIGHT[found] ** step for step in range(1, nodes + 1)))
    joined = sums(OFFER, ONE, found)
    assert all(joined[nodes] == pytest.approx(max(tokens[nodes], sums(OFFER, ONE)[nodes])) for nodes in BANDS)


def test_nothing_is_expected_of_look_ups_that_found_nothing():
    assert OFFER.prior(LOOKUPS, 0) == [0.0] * len(BANDS)


def test_figures_that_were_not_measured_count_for_half():
    guessed = Offer(OFFER.ways, 60)
    assert guessed.prior(ONE, 0) == pytest.approx([tokens / 2 for tokens in OFFER.prior(ONE, 0)])
