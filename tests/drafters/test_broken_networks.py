# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""A drafter whose network says NaN, infinity or huge numbers costs accepted tokens and nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from baselines_for_tests import BASELINES, baseline
from batches_for_tests import padded_batch
from block_drafters_for_tests import VARIANTS, block_drafter
from conftest import tiny_target
from training_for_tests import tiny_drafter

from specblock_hf import DraftingPlan, JoinedDrafter, LookupDrafter
from specblock_hf.trees.sampling import LARGEST_LOGIT, distributions_of


HUGE = 3e38
NUMBERS = {"NaN": math.nan, "minus infinity": -math.inf, "huge and NaN": None}
DRAFTERS = {
    "rank-guided": tiny_drafter,
    "best-first": lambda: tiny_drafter(expansion="best_first"),
    "Markov": lambda: tiny_drafter(markov_rank=4),
    "joined": lambda: JoinedDrafter(tiny_drafter(), LookupDrafter(tiny_target("llama").config)),
    **{name: lambda name=name: baseline(name) for name in BASELINES},
    **{name: lambda name=name: block_drafter(name) for name in VARIANTS},
}
PARTS = ("head", "layers", "one output")
DRAWING = ("rank-guided", "joined", "dflash")


def broken(name: str, number: float | None, part: str):
    """A drafter with this number all over the weights of its head, or of what comes before, or of one output."""
    drafter = DRAFTERS[name]()
    weights = dict(drafter.network.named_parameters())
    heads = {key: weight for key, weight in weights.items() if key.startswith(("lm_head", "rank_head"))}
    chosen = heads if part == "head" else {key: weight for key, weight in weights.items() if key not in heads}
    with torch.no_grad():
        for weight in chosen.values() if part != "one output" else [weights.get("lm_head.weight", weight_of(weights))]:
            rows = weight[:1] if part == "one output" else weight
            rows.fill_(HUGE if number is None else number)
            if number is None:
                rows.view(-1)[0] = math.nan
    return drafter


def weight_of(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return next(weight for weight in weights.values() if weight.ndim == 2)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", DRAFTERS)
def test_a_greedy_text_is_the_targets(name, number, part):
    target, drafter = tiny_target("llama"), broken(name, NUMBERS[number], part)
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    plans = (DraftingPlan(12, 2, 4), DraftingPlan(12, 3, min_probability=0.01, min_start_probability=0.01))
    for lengths, plan in zip([(9,), (4, 9, 6)], plans, strict=True):
        prompts, drafter.drafting_plan = padded_batch(lengths), plan
        output = target.generate(**prompts, assistant_model=drafter, **options)
        assert torch.equal(output, target.generate(**prompts, **options))


# One token has all the probability; warpers that would refuse NaN, or make it.
WARPERS = ({"top_k": 1}, {"temperature": 1e-3, "eta_cutoff": 1e-2, "typical_p": 0.5}, {"top_p": 0.6, "top_h": 0.4})


@pytest.mark.parametrize("rule", ["walk", "token", "block"])
@pytest.mark.parametrize("number", ["NaN", "huge and NaN"])
@pytest.mark.parametrize("name", DRAWING)
def test_drawn_trees_leave_the_call_alive(name, number, rule):
    target = tiny_target("llama")
    for part, lengths, warpers in zip(PARTS, [(9,), (4, 9), (9,)], WARPERS, strict=True):
        drafter, prompts = broken(name, NUMBERS[number], part), padded_batch(lengths)
        drafter.drafting_plan = DraftingPlan(9, 2, draft_sampling="sampled", verification=rule)
        options = {"do_sample": True, "top_k": 0, "max_new_tokens": 6, "pad_token_id": 0} | warpers
        output = target.generate(**prompts, assistant_model=drafter, **options)
        assert output.shape[1] == prompts["input_ids"].shape[1] + 6
        if "top_k" in warpers:
            assert torch.equal(output, target.generate(**prompts, **options | {"do_sample": False, "top_k": None}))


@pytest.mark.parametrize("size", [5, 1])
def test_a_distribution_is_a_distribution_whatever_the_network_says(size):
    rows = [math.nan, math.inf, -math.inf, HUGE, -HUGE, 0.0, 3.0]
    logits = torch.tensor([[row] * size for row in rows] + [(rows * size)[:size]])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        distributions = distributions_of(logits.to(dtype), lambda scores: scores / 0.01).exp()
        torch.testing.assert_close(distributions.sum(-1), torch.ones(len(logits)))
    sane = torch.randn(4, 9) * 50
    assert sane.abs().max() < LARGEST_LOGIT
    assert torch.equal(distributions_of(sane, lambda scores: scores), sane.log_softmax(-1))
