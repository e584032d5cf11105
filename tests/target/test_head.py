# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Logits of states that are there already: those of the target's own forward, whatever it does behind its head."""

from __future__ import annotations

import pytest
import torch
from conftest import SIZES, prompt_of
from targets_for_tests import EAGER_FAMILIES, FAMILIES, MULTIMODAL, TargetKind, make_target
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig

from specblock_hf.data.examples import Example
from specblock_hf.target.head import logits_of_states
from specblock_hf.training.target_views import view_target


IDS = prompt_of(9)


def check(target) -> torch.Tensor:
    before = {name: dict(vars(part)) for name, part in target.named_modules()}
    with torch.no_grad():
        states = target.get_decoder()(IDS, use_cache=False)[0][0]
        expected = target(IDS, use_cache=False).logits[0]
        assert torch.equal(logits_of_states(target)(states), expected)
    after = {name: dict(vars(part)) for name, part in target.named_modules()}
    assert before.keys() == after.keys()
    assert all(vars_before.keys() == after[name].keys() for name, vars_before in before.items())
    return target.get_output_embeddings()(states) - expected


# Text models of Llama 4 are refused: their get_decoder() is the whole model.
@pytest.mark.parametrize("family", [*sorted(FAMILIES.keys() - {"llama4"}), *MULTIMODAL])
def test_every_family(family):
    check(make_target(TargetKind(family, attention="eager" if family in EAGER_FAMILIES else "sdpa")))


@pytest.mark.parametrize(
    "config", [GraniteConfig(**SIZES, logits_scaling=4.0), CohereConfig(**SIZES, logit_scale=0.25)]
)
def test_logits_that_are_scaled_behind_the_head(config):
    target = AutoModelForCausalLM.from_config(config).eval()
    assert check(target).abs().max() > 0.1  # the bare head says something else
    example = Example(IDS[0].tolist(), 4, True, "00000000")
    (view,) = view_target(target, [example], (0, 1), 5)
    with torch.no_grad():
        best = target(IDS).logits[0, 3:-1].float().softmax(-1).topk(5)
    assert torch.equal(view.top_ids.long(), best.indices)
    torch.testing.assert_close(view.top_probs.float(), best.values)
