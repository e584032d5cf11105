# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""No forward of the package may reach cuDNN's attention; the user's own forwards and settings are left alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
from attention_for_tests import ALL, OURS, allowed, only_ours, watched_attention
from baselines_for_tests import BASELINES, baseline
from block_drafters_for_tests import block_drafter
from conftest import prompt_of, tiny_target
from torch.nn.attention import SDPBackend, sdpa_kernel
from training_for_tests import example_of, tiny_drafter
from transformers import StoppingCriteria, StoppingCriteriaList

from specblock_hf import DraftingPlan, JoinedDrafter, LookupDrafter, calibrate, compile_rounds
from specblock_hf.devices import without_cudnn_attention
from specblock_hf.drafting.pairs import TokenTable
from specblock_hf.evaluation.held_out import held_out_rates
from specblock_hf.evaluation.simulate import simulate_acceptance
from specblock_hf.regeneration.answering import Answering, Prompt
from specblock_hf.training.target_views import view_target


GREEDY = {"do_sample": False, "max_new_tokens": 12}
DRAFTERS = {
    "specblock": tiny_drafter,
    "specblock-best-first": partial(tiny_drafter, expansion="best_first"),
    **{name: partial(baseline, name) for name in BASELINES},
    "dflash": block_drafter,
    "dspark": partial(block_drafter, "dspark"),
    "joined": lambda: JoinedDrafter(tiny_drafter(), LookupDrafter(tiny_target("llama").config)),
}


@pytest.fixture
def seen():
    with watched_attention() as calls:
        yield calls


@pytest.mark.parametrize("prompt", [{}, {"prefill_chunk_size": 3}], ids=["whole", "chunks"])
@pytest.mark.parametrize("name", DRAFTERS)
def test_prompts_trees_and_drafts(name, prompt, seen):
    target, drafter = tiny_target("llama"), DRAFTERS[name]()
    drafter.drafting_plan = DraftingPlan(12, 2, 4)
    target.generate(prompt_of(7), assistant_model=drafter, **GREEDY, **prompt)
    forwards = drafter.last_statistics.target_calls * target.config.num_hidden_layers
    assert len(seen) > forwards or (len(seen) == forwards and name == "medusa")  # whose heads do not attend
    assert only_ours(seen)


def test_compiled_rounds():
    target, drafter = tiny_target("llama"), tiny_drafter()
    drafter.drafting_plan = DraftingPlan(6, 1)
    compiled_with = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        compiled_with.append(allowed())
        return graph.forward

    compile_rounds(target, drafter, max_length=32, backend=backend)
    target.generate(prompt_of(7), assistant_model=drafter, **GREEDY)
    assert drafter.last_statistics.compiled_rounds
    assert only_ours(compiled_with) and allowed() == ALL


def test_calibration_measures_what_rounds_will_take(seen):
    target, drafter = tiny_target("llama"), tiny_drafter()
    calibrate(target, drafter, context=16, repeats=1)
    # Between the rounds are steps of plain decoding, one node wide, which no setting of ours touches.
    assert {frozenset(backends) for backends in seen} == {frozenset(ALL), frozenset(OURS)}


def test_views_answers_simulation_and_held_out_rates(seen):
    target, drafter = tiny_target("llama"), tiny_drafter()
    examples = [example_of(prompt_of(18, seed)[0].tolist(), 5) for seed in range(2)]
    views, counts = view_target(target, examples, drafter.feature_layers, 4), [len(seen)]
    simulate_acceptance(drafter, TokenTable.of(target), examples, views, DraftingPlan(6, 2))
    counts.append(len(seen))
    held_out_rates(drafter, TokenTable.of(target), examples, views)
    counts.append(len(seen))
    waiting = [Prompt("", "", str(n), tuple(prompt_of(n + 2)[0].tolist()), 0.0) for n in range(3)]
    assert sum(map(len, Answering(target, 2, 4, 6, set())(waiting))) == 3
    counts.append(len(seen))
    assert counts == sorted({0, *counts})[1:], "each of them attends"
    assert only_ours(seen)


def test_the_users_forwards_before_within_and_after_a_call_are_unaffected(seen):
    target, drafter, ids = tiny_target("llama"), tiny_drafter(), prompt_of(7)
    own = []

    class Asks(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            before = len(seen)
            target(input_ids[:, :4])
            own.extend(seen[before:])
            return torch.zeros(len(input_ids), dtype=torch.bool)

    plain = target.generate(ids, **GREEDY)
    own.extend(seen)
    drafted = target.generate(ids, assistant_model=drafter, stopping_criteria=StoppingCriteriaList([Asks()]), **GREEDY)
    before = len(seen)
    assert torch.equal(target.generate(ids, **GREEDY), plain) and torch.equal(drafted, plain)
    own.extend(seen[before:])
    assert all(backends == ALL for backends in own)


def test_what_the_user_has_narrowed_stays_narrow():
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION]):
        with without_cudnn_attention:
            assert allowed() == {"math"}
        assert allowed() == {"math", "cudnn"}
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), without_cudnn_attention:
        assert allowed() == {"flash"}
    # Nothing else would be left to attend with.
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        with without_cudnn_attention:
            assert allowed() == {"cudnn"}
        assert allowed() == {"cudnn"}
    assert allowed() == ALL


def test_an_exception_restores_the_setting():
    @without_cudnn_attention
    def fails():
        assert allowed() == OURS
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert allowed() == ALL


def test_of_threads_that_overlap_the_last_one_restores_the_setting():
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))
    found = {}

    def first():
        with without_cudnn_attention:
            first_is_in.set()
            assert second_is_in.wait(60)
        first_is_out.set()

    def second():
        assert first_is_in.wait(60)
        with without_cudnn_attention, without_cudnn_attention:
            second_is_in.set()
            assert first_is_out.wait(60)
            found["within"] = allowed()

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found["within"] == OURS and allowed() == ALL
