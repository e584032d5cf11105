# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Pairs that waited for a drafter, as one."""

from __future__ import annotations

import pytest
import torch

from specblock_hf.drafting.drafter import DraftState
from specblock_hf.drafting.pairs import Pairs, TokenTable
from specblock_hf.drafting.statistics import Clock


TABLE = TokenTable(torch.nn.Embedding(20, 3), torch.nn.Linear(3, 20), 20)


def pairs_of(rows, first=0, read=True, embedded=False):
    """Pairs whose features and positions follow from their places."""
    width = max(map(len, rows))
    tokens = torch.tensor([row + [-1] * (width - len(row)) for row in rows])
    positions = torch.arange(first, first + width).expand(len(rows), -1)
    features = (tokens.unsqueeze(-1).float(), -tokens.unsqueeze(-1).float())
    embeds = torch.full((*tokens.shape, 3), 7.0) if embedded else None
    lengths = torch.tensor([len(row) for row in rows])
    return Pairs(tokens, features, positions, lengths, TABLE, embeds, rows if read else None)


@pytest.mark.parametrize("read", [True, False])
def test_padding_between_pairs_goes(read):
    parts = [pairs_of([[1, 2, 3], [4]], 0, read), pairs_of([[5], [6, 7]], 3), pairs_of([[], [8]], 5)]
    whole = Pairs.joined(parts)
    assert whole.lengths.tolist() == [4, 4] and whole.tokens.tolist() == [[1, 2, 3, 5], [4, 6, 7, 8]]
    assert whole.features[0][..., 0].tolist() == whole.tokens.tolist()
    assert whole.features[1][..., 0].tolist() == (-whole.tokens).tolist()
    assert whole.positions.tolist() == [[0, 1, 2, 3], [0, 3, 4, 5]]
    assert whole.read == ([[1, 2, 3, 5], [4, 6, 7, 8]] if read else None)
    assert whole.host_tokens() == [[1, 2, 3, 5], [4, 6, 7, 8]]


@pytest.mark.parametrize("read", [True, False])
def test_columns_and_the_last_pairs_of_each_row(read):
    whole = pairs_of([[1, 2, 3, 4, 5], [6, 7], []], 0, read, True)
    part = whole.part(1, 3)
    assert part.host_tokens() == [[2, 3, 4], [7], []] and part.lengths.tolist() == [3, 1, 0]
    assert part.positions[0].tolist() == [1, 2, 3] and part.given_embeds.shape == (3, 3, 3)
    assert whole.part(4, 3).host_tokens() == [[5], [], []]

    before, last = whole.split(3)
    assert before.host_tokens() == [[1, 2], [], []] and before.tokens.shape == (3, 2)
    assert last.host_tokens() == [[3, 4, 5], [6, 7], []] and last.tokens.shape == (3, 3)
    assert last.positions.tolist() == [[2, 3, 4], [0, 1, 2], [0, 1, 2]]
    assert all(feature[..., 0].abs().equal(last.tokens.abs().float()) for feature in last.features)
    assert whole.split(5) == (None, whole)


def test_one_part_is_itself_and_rows_without_padding_stay_as_they_are():
    part = pairs_of([[1, 2]])
    assert Pairs.joined([part]) is part
    assert Pairs.joined([part, pairs_of([[3]], 2)]).tokens.tolist() == [[1, 2, 3]]


def test_a_prompt_of_embeddings_waits_with_tokens_after_it():
    whole = Pairs.joined([pairs_of([[1, 2], [3]], 0, False, True), pairs_of([[4], [5]], 2)])
    assert whole.embeds()[0, :2].eq(7).all() and whole.embeds()[1, 0].eq(7).all()
    torch.testing.assert_close(whole.embeds()[:, -1][0], TABLE.embed(torch.tensor(4)))
    torch.testing.assert_close(whole.embeds()[1, 1], TABLE.embed(torch.tensor(5)))


def test_what_waits_is_that_of_the_rows_that_draft():
    state = DraftState(TABLE, 3, 50)
    state.waiting = [pairs_of([[1, 2], [3], [4, 5]])]
    state.keep_rows([0, 2])
    state.keep_rows([1])
    assert state.caught_up(pairs_of([[6]], 2)).tokens.tolist() == [[4, 5, 6]] and state.waiting == []


def test_a_clock_tells_the_seconds_of_its_laps():
    clock = Clock(torch.device("cpu"))
    assert clock.seconds(0, 1) is None
    for phase in ("draft", "verify", "host"):
        clock.lap(phase)
    assert len(clock) == 3 and clock.seconds(1, 4) is None
    times = [clock.laps[0][1], *(now for _, _, now in clock.laps)]
    assert clock.seconds(0, 3) == [times[1] - times[0], times[2] - times[1], times[3] - times[2]]
    assert clock.seconds(1, 2) == [times[2] - times[1]]
