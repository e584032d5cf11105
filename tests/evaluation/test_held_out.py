# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Rates on held-out answers against the loss's own counts."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_target
from training_for_tests import Told, example_of, tiny_drafter

from specblock_hf.drafters.specblock.loss import SpecBlockObjective
from specblock_hf.drafting.pairs import TokenTable
from specblock_hf.evaluation.held_out import held_out_rates
from specblock_hf.evaluation.simulate import SimulatedAcceptance
from specblock_hf.training.batches import collate, draft_ids_of
from specblock_hf.training.target_views import view_target


def test_rates_are_those_of_all_answers_together():
    target, drafter = tiny_target("llama"), tiny_drafter()
    table = TokenTable.of(target)
    examples = [example_of(tokens[: 12 + row], 3) for row, tokens in enumerate(Told(6, 18).tokens.tolist())]
    views = view_target(target, examples, drafter.feature_layers, 5)
    objective = SpecBlockObjective(num_blocks=1)
    batch = collate(examples, views, table, draft_ids_of(drafter, table.vocab_size))
    out = drafter.loss(batch, objective)
    for batch_tokens in (20, 1000):  # one answer a batch, and all of them
        rates = held_out_rates(drafter, table, examples, views, objective, batch_tokens)
        assert rates.keys() == {"held_out_agreement", "held_out_chain", "held_out_rank"}
        expected = (out["agreed"] / out["counted"].clamp_min(1)).tolist()
        assert rates["held_out_agreement"] == [pytest.approx(line, abs=1e-4) for line in expected]
        frequencies = [bucket["frequency"] for bucket in rates["held_out_rank"].values()]
        true = out["rank_confusion"].sum(1)
        assert frequencies == pytest.approx((true / true.sum()).tolist(), abs=1e-4) and true.sum() > 20


def test_cuts_are_the_same_at_every_evaluation():
    target, drafter = tiny_target("llama"), tiny_drafter()
    table = TokenTable.of(target)
    examples = [example_of(tokens, 3) for tokens in Told(6, 18).tokens.tolist()]
    views = view_target(target, examples, drafter.feature_layers, 5)
    torch.manual_seed(1)
    first = held_out_rates(drafter, table, examples, views)
    torch.manual_seed(2)
    assert first == held_out_rates(drafter, table, examples, views) and len(first["held_out_agreement"]) == 3


def test_rates_by_depth():
    """Of 4 rounds 3 accept a token, 2 of these a second, 1 of these two more."""
    assert SimulatedAcceptance([0, 1, 2, 4]).rates() == pytest.approx([3 / 4, 2 / 3, 1 / 2, 1.0])
    assert SimulatedAcceptance([0, 0]).rates() == [] == SimulatedAcceptance([]).rates()
