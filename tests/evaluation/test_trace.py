# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Tracing one round: the tree that was verified, and another drafter's at the same place."""

from __future__ import annotations

import pytest
import torch
from conftest import VOCAB, prompt_of
from drafters_for_tests import GarbageDrafter, OracleDrafter
from models_for_tests import tiny_drafter

from specblock_hf.evaluation.trace import trace_round, trace_there


GREEDY = {"do_sample": False, "max_new_tokens": 24}


def greedy_text(target, prompt) -> list[int]:
    return target.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY)[0].tolist()


@pytest.mark.parametrize("number", [1, 2, 5])
def test_the_traced_round_is_that_round(llama, number):
    prompt = prompt_of(7)
    text = greedy_text(llama, prompt)
    # Right in round r: r % 3 tokens. Emitted before round n: the prompt's one and r % 3 + 1 for each round before.
    oracle = OracleDrafter(VOCAB, text, plan=lambda number: number % 3)
    traced = trace_round(llama, oracle, prompt, number, **GREEDY)
    before = 7 + sum(1 + r % 3 for r in range(number - 1))
    assert traced.prefix[0].tolist() == text[:before]
    assert traced.tree.tokens[0, 0] == text[before]
    assert len(traced.accepted) == 1 + (number - 1) % 3 and traced.accepted[0] == 0
    assert traced.tree.tokens[0, traced.accepted].tolist() == text[before : before + len(traced.accepted)]
    assert oracle.callbacks == ()


def test_another_drafter_is_traced_at_the_same_place(llama):
    prompt = prompt_of(7)
    first = trace_round(llama, tiny_drafter(), prompt, 4, **GREEDY)
    assert first.prefix.shape[1] >= 7 + 3
    other = trace_there(llama, tiny_drafter("eagle3"), first, **GREEDY)
    assert torch.equal(other.prefix, first.prefix)
    assert other.tree.tokens[0, 0] == first.tree.tokens[0, 0]
    shared = min(int(first.walk.lengths[0]), int(other.walk.lengths[0]))
    assert first.walk.tokens[0, :shared].tolist() == other.walk.tokens[0, :shared].tolist()


def test_a_drafter_drafts_there_what_it_drafted_in_that_round(llama):
    first = trace_round(llama, tiny_drafter(), prompt_of(7), 4, **GREEDY)
    again = trace_there(llama, tiny_drafter(), first, **GREEDY)
    assert torch.equal(again.tree.tokens, first.tree.tokens) and torch.equal(again.tree.parents, first.tree.parents)


def test_a_round_that_is_not_there_is_refused(llama):
    drafter = GarbageDrafter(VOCAB)
    with pytest.raises(ValueError, match=r"ended after 3 round\(s\), so that there is no round 9; ask for an earlier"):
        trace_round(
            llama, OracleDrafter(VOCAB, greedy_text(llama, prompt_of(7)), plan=lambda n: 8), prompt_of(7), 9, **GREEDY
        )
    with pytest.raises(ValueError, match="there is no round 0; rounds are counted from 1"):
        trace_round(llama, drafter, prompt_of(7), 0, **GREEDY)
    with pytest.raises(ValueError):
        trace_round(llama, drafter, prompt_of(7), 99, **GREEDY)
    assert drafter.callbacks == ()
