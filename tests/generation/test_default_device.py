# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Calls under a default device that is not the host: what has to be there is, and the user's code finds its own."""

from __future__ import annotations

import pytest
import torch
from batches_for_tests import padded_batch
from conftest import prompt_of, tiny_target
from targets_for_tests import TargetKind, make_target
from test_drawn_trees import RULES
from test_fixed_rounds import DRAFTERS
from test_loop import KeepingStreamer
from transformers import DynamicCache

from specblock_hf import DraftingPlan, LookupDrafter
from specblock_hf.compat import CACHE


CALL = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": 5, "pad_token_id": 0}


def same_elsewhere(target, drafter, batch, **options):
    plain = target.generate(**batch, **CALL | options)
    torch.manual_seed(0)
    host = target.generate(**batch, **CALL | options, assistant_model=drafter)
    with torch.device("meta"):
        torch.manual_seed(0)
        there = target.generate(**batch, **CALL | options, assistant_model=drafter)
    assert torch.equal(there, host)
    if not options.get("do_sample"):
        assert torch.equal(host, plain)


@pytest.mark.parametrize("lengths", [(9,), (4, 12, 7)])
@pytest.mark.parametrize("name", DRAFTERS)
def test_drafters(name, lengths):
    same_elsewhere(tiny_target("llama"), DRAFTERS[name](), padded_batch(lengths))


@pytest.mark.parametrize("lengths", [(9,), (4, 12, 7)])
@pytest.mark.parametrize("family", ["qwen3_next", "gpt2"])
def test_targets(family, lengths):
    target = make_target(TargetKind(family))
    same_elsewhere(target, LookupDrafter(target.config), padded_batch(lengths))


@pytest.mark.parametrize("rule", RULES)
def test_drawn_trees(rule):
    target, drafter, batch = tiny_target("llama"), DRAFTERS["rank-guided"](), padded_batch((4, 9))
    drafter.drafting_plan = DraftingPlan(8, 2, draft_sampling="sampled", verification=rule)
    with torch.device("meta"):
        text = target.generate(**batch, **CALL | {"do_sample": True}, assistant_model=drafter)
    assert text.device.type == "cpu" and text.shape[0] == 2


def test_a_cache_that_is_continued():
    target, prompt, caches = tiny_target("llama"), prompt_of(9), [DynamicCache(), DynamicCache()]
    for cache in caches:
        target.generate(prompt[:, :5], max_new_tokens=1, do_sample=False, **{CACHE: cache})
    plain = target.generate(prompt, **CALL, **{CACHE: caches[0]})
    with torch.device("meta"):
        text = target.generate(prompt, **CALL, **{CACHE: caches[1]}, assistant_model=LookupDrafter(target.config))
    assert torch.equal(text, plain)


@pytest.mark.parametrize("drafted", [False, True])
def test_the_users_code_finds_its_own(drafted):
    target, seen = tiny_target("llama"), {"processor": set(), "criterion": set(), "streamer": set()}

    def here(name, result):
        seen[name].add(torch.tensor(0).device.type)
        return result

    class Streamer(KeepingStreamer):
        def put(self, value):
            here("streamer", super().put(value))

    options = {
        "logits_processor": [lambda ids, scores: here("processor", scores)],
        "stopping_criteria": [
            lambda ids, scores: here("criterion", torch.zeros(len(ids), dtype=torch.bool, device="cpu"))
        ],
        "streamer": Streamer(),
    }
    batch, drafter = padded_batch((7,)), LookupDrafter(target.config) if drafted else None
    with torch.device("meta"):
        target.generate(**batch, **CALL, **options, assistant_model=drafter)
    assert seen == {"processor": {"meta"}, "criterion": {"meta"}, "streamer": {"meta"}}
