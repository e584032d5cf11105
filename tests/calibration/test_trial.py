# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Trials of plans: real answers, counted to their ends, and the shortest time of each."""

from __future__ import annotations

import pytest
import torch
from conftest import VOCAB, prompt_of, tiny_target
from drafters_for_tests import OracleDrafter
from models_for_tests import tiny_drafter

from specblock_hf import DraftingPlan
from specblock_hf.calibration import trial
from specblock_hf.calibration.trial import answers, batches_of, padded, try_plans


PLANS = [DraftingPlan(3, 1), DraftingPlan(5, 2)]


def test_batches_are_padded_on_the_left_and_full():
    batch = padded([torch.tensor([[5, 6, 7]]), torch.tensor([[8]])], 9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [9, 9, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    prompts = [prompt_of(length) for length in (5, 2, 3, 4, 6)]
    assert [batch["input_ids"].shape for batch in batches_of(prompts, 2, 0)] == [(2, 5), (2, 4)]
    assert len(batches_of(prompts, 1, 0)) == 5
    with pytest.raises(ValueError, match=r"5 prompt\(s\) fill no batch of 6; give at least 6\."):
        batches_of(prompts, 6, 0)


@pytest.mark.parametrize(
    ("eos", "rows"),
    [(2, [[1, 2], [2], [1, 1, 1]]), ([2, 1], [[1], [2], [1]]), (None, [[1, 2, 3], [2, 0, 0], [1, 1, 1]])],
)
def test_an_answer_ends_where_the_target_ended_it(eos, rows):
    assert answers(torch.tensor([[1, 2, 3], [2, 0, 0], [1, 1, 1]]), eos) == rows


def test_all_answer_a_batch_in_turns_and_the_shortest_time_counts(monkeypatch):
    seen = []
    times = {(5, None): [9.0, 4.0], (5, PLANS[0]): [2.0, 5.0], (5, PLANS[1]): [9.0, 8.0]}
    times |= {(7, None): [2.0, 9.0], (7, PLANS[0]): [1.0, 1.0], (7, PLANS[1]): [4.0, 5.0]}

    def fake(target, drafter, plan, batch, settings):
        seen.append((batch["input_ids"].shape[1], plan))
        return times[seen[-1]].pop(0), 12

    monkeypatch.setattr(trial, "_answer", fake)
    # 24 tokens in 6, 3 and 12 seconds.
    assert try_plans(tiny_target("llama"), tiny_drafter(), PLANS, [prompt_of(5), prompt_of(7)]) == [2.0, 0.5]
    turns = [None, *PLANS, *PLANS[::-1], None]
    assert seen == [(width, plan) for width in (5, 7) for plan in turns]


def test_trials_are_real_answers_and_leave_the_drafters_plan_alone(monkeypatch, llama):
    monkeypatch.setattr(trial, "TRIAL_TOKENS", 6)
    prompt = prompt_of(5)
    text = llama.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=6)
    oracle = OracleDrafter(VOCAB, text[0].tolist(), siblings=False)
    before = vars(llama.generation_config).copy()
    (speed,) = try_plans(llama, oracle, [DraftingPlan(4, 1)], [prompt])
    assert speed > 0 and len(oracle.states) == 2 and oracle.states[0].limits[0].nodes == (4,)
    assert oracle.drafting_plan is None and vars(llama.generation_config) == before


def test_rows_of_a_batch_are_tried_together(monkeypatch, llama):
    monkeypatch.setattr(trial, "TRIAL_TOKENS", 5)
    made, real = [], trial._answer
    monkeypatch.setattr(trial, "_answer", lambda *args: made.append(real(*args)) or made[-1])
    (speed,) = try_plans(llama, tiny_drafter(), PLANS[:1], [prompt_of(5), prompt_of(3), prompt_of(4)], 2)
    assert speed > 0 and [tokens for _, tokens in made] == [10] * 4
