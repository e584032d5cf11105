# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The simulated accepted length against `generate()` itself, and against drafters whose accepted length is known."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import VOCAB, prompt_of, tiny_target
from drafters_for_tests import GarbageDrafter, OracleDrafter
from training_for_tests import example_of, tiny_drafter

from specblock_hf import DraftingPlan
from specblock_hf.drafting.pairs import TokenTable
from specblock_hf.evaluation import simulate
from specblock_hf.evaluation.simulate import SimulatedAcceptance, simulate_acceptance
from specblock_hf.training.target_views import view_target


PROMPT = 7


def greedy_examples(target, count: int, new_tokens: int):
    """Greedy texts of the target."""
    texts = [
        target.generate(prompt_of(PROMPT, seed), do_sample=False, max_new_tokens=new_tokens)[0].tolist()
        for seed in range(count)
    ]
    return [example_of(text, PROMPT) for text in texts]


def uncut(statistics) -> list[int]:
    return [kept for kept, cut in zip(statistics.accepted, statistics.cut, strict=True) if not cut]


@pytest.mark.parametrize("plan", [DraftingPlan(3, 1), DraftingPlan(20, 2, 4), DraftingPlan(60, 3)])
def test_rounds_equal_those_of_generate(plan):
    target, drafter = tiny_target("llama"), tiny_drafter()
    # A head that knows the target's favourite tokens makes some drafts right.
    with torch.no_grad():
        drafter.lm_head.weight.copy_(target.get_output_embeddings().weight[drafter.draft_to_target])
    examples = greedy_examples(target, 3, 40)
    views = view_target(target, examples, drafter.feature_layers, 4)
    table = TokenTable.of(target)
    expected = []
    drafter.drafting_plan = plan
    for seed, example in enumerate(examples):
        ids = target.generate(prompt_of(PROMPT, seed), assistant_model=drafter, do_sample=False, max_new_tokens=40)
        assert ids[0].tolist() == example.input_ids
        rounds = uncut(drafter.last_statistics)
        assert simulate_acceptance(drafter, table, [example], views[seed : seed + 1], plan, 40).accepted == rounds
        expected += rounds
    result = simulate_acceptance(drafter, table, examples, views, plan, 40)
    assert result.accepted == expected and sum(expected) > 5
    assert result.tau == 1 + sum(expected) / len(expected)


@pytest.mark.parametrize("right", [0, 1, 3, 8])
def test_an_oracle_is_accepted_as_deep_as_it_drafts(llama, right):
    (example,) = greedy_examples(llama, 1, 50)
    views = view_target(llama, [example], (2,), 4)
    oracle = OracleDrafter(VOCAB, example.input_ids, plan=lambda number: right, feature_layers=(2,))
    result = simulate_acceptance(oracle, TokenTable.of(llama), [example], views, DraftingPlan(60, 1), 50)
    # After the prompt's token 49 remain; the round that reaches the last one does not count.
    assert result.accepted == [right] * ((50 - 2) // (right + 1))
    assert result.tau == right + 1
    assert [result.at_depth(depth) for depth in (right, right + 1)] == [1, 0]


def test_the_drafter_is_told_what_generate_would_tell_it(llama):
    (example,) = greedy_examples(llama, 1, 30)
    views = view_target(llama, [example], (0, 3), 4)
    told = []
    for simulated in (True, False):
        oracle = OracleDrafter(VOCAB, example.input_ids, feature_layers=(0, 3))
        if simulated:
            simulate_acceptance(oracle, TokenTable.of(llama), [example], views, DraftingPlan(60, 1), 30)
        else:
            llama.generate(prompt_of(PROMPT), assistant_model=oracle, do_sample=False, max_new_tokens=30)
        told.append(oracle.states[0])
    simulated, real = told
    assert len(simulated.pairs) > 3 and simulated.tokens() == real.tokens()
    assert simulated.positions() == real.positions()
    assert [limits.depth for limits in simulated.limits] == [limits.depth for limits in real.limits]
    for layer in range(2):
        torch.testing.assert_close(simulated.features(layer), real.features(layer), rtol=1e-4, atol=1e-4)


def test_long_answers_are_walked_in_part(llama):
    (example,) = greedy_examples(llama, 1, 50)
    views = view_target(llama, [example], (2,), 4)
    oracle = OracleDrafter(VOCAB, example.input_ids, plan=lambda number: 0, feature_layers=(2,))
    assert (
        len(simulate_acceptance(oracle, TokenTable.of(llama), [example], views, DraftingPlan(4, 1), 20).accepted) == 18
    )


def test_garbage_stays_near_one(llama):
    examples = greedy_examples(llama, 2, 40)
    views = view_target(llama, examples, (2,), 4)
    garbage = GarbageDrafter(VOCAB, feature_layers=(2,))
    result = simulate_acceptance(garbage, TokenTable.of(llama), examples, views, DraftingPlan(12, 1), 40)
    assert 1 <= result.tau < 1.5 and len(result.accepted) > 40


def test_nothing_to_walk_has_no_tau():
    assert math.isnan(SimulatedAcceptance().tau) and SimulatedAcceptance().at_depth(1) == 0


def test_what_a_simulation_will_take_is_told_by_its_first_rounds(monkeypatch):
    clock, rounds = [0.0], [1, 0, 1, 2]
    monkeypatch.setattr(simulate.time, "perf_counter", lambda: clock[0])

    def first_rounds(drafter, table, examples, views, plan, max_new_tokens):
        assert len(examples) == len(views) == 1 and max_new_tokens == 16
        clock[0] += 2.0
        return SimulatedAcceptance(rounds)

    monkeypatch.setattr(simulate, "simulate_acceptance", first_rounds)
    examples = [example_of([1] * 8, 2)] * 4 + [example_of([1] * 200, 2)]
    seconds, tau = simulate.expected_seconds(None, None, examples, [None] * 5, DraftingPlan(8, 1))
    assert seconds == 0.5 * (4 * 6 + 96) and tau == 2
    rounds.clear()
    assert simulate.expected_seconds(None, None, examples, [None] * 5, DraftingPlan(8, 1))[1] == 1
