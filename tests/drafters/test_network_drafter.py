# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Which plans a drafter's acceptance is measured for."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from baselines_for_tests import pairs_for
from batches_for_tests import padded_batch
from conftest import prompt_of, tiny_target
from training_for_tests import Told

from specblock_hf import DraftingPlan, JoinedDrafter, LookupDrafter, compile_rounds
from specblock_hf.drafters.common.registry import trainable_drafters
from specblock_hf.generation import loop


def drafter_of(name: str, **fields):
    kind, form = trainable_drafters()[name]
    return kind(kind.config_class.for_target(tiny_target("llama").config, **(form | fields)))


@pytest.mark.parametrize("name", ["medusa", "parallelspec", "dflash", "jetspec"])
def test_drafters_of_one_forward_are_measured_with_one(name):
    plans = drafter_of(name).plans_to_measure()
    assert plans == [DraftingPlan(nodes, 1) for nodes in (3, 5, 7, 11, 15, 31, 60)]


@pytest.mark.parametrize(("name", "most"), [("specblock", 3), ("falcon", 4), ("eagle3", 8)])
def test_others_with_as_many_as_they_were_made_for(name, most):
    fields = {"draft_vocab_size": 24}
    counts = {
        blocks: [plan.num_forwards for plan in drafter_of(name, num_blocks=blocks, **fields).plans_to_measure()]
        for blocks in (most - 1, most)
    }
    assert max(counts[most - 1]) < most == max(counts[most])
    assert len(counts[most]) <= 13
    plans = drafter_of(name, num_blocks=most, **fields).plans_to_measure()
    assert len(set(plans)) == len(plans)
    # Beside what a GPU takes, something for a machine on which a forward or a node costs as much as a token brings.
    assert min(plan.tree_budget for plan in plans) == 3 and max(plan.tree_budget for plan in plans) >= 59
    assert all(plan.max_starts != 0 for plan in plans)


def test_fewer_forwards_leave_nothing_but_the_first():
    drafter = drafter_of("specblock", draft_vocab_size=24, num_blocks=1)
    assert {plan.num_forwards for plan in drafter.plans_to_measure()} == {1}


@pytest.mark.parametrize("name", ["specblock", "eagle3", "medusa", "dflash"])
def test_a_drafter_shows_the_plan_that_a_call_will_use(name, monkeypatch):
    target, drafter, used = tiny_target("llama"), drafter_of(name, tree_budget=20), []
    joined = JoinedDrafter(drafter, LookupDrafter(target.config))
    real = loop.decode
    monkeypatch.setattr(loop, "decode", lambda *args: used.append(args[3].plan) or real(*args))

    def plan_of_a_call(assistant):
        target.generate(prompt_of(5), assistant_model=assistant, do_sample=False, max_new_tokens=4)
        return used[-1]

    assert drafter.drafting_plan == plan_of_a_call(drafter) == drafter.default_plan(target.device)
    assert joined.drafting_plan == plan_of_a_call(joined) == drafter.drafting_plan
    drafter.drafting_plan = DraftingPlan(5, 1)
    assert joined.drafting_plan == plan_of_a_call(joined) == plan_of_a_call(drafter) == DraftingPlan(5, 1)
    assert deepcopy(drafter).drafting_plan == DraftingPlan(5, 1)
    drafter.drafting_plan = None
    assert drafter.drafting_plan == drafter.default_plan(drafter.device)


@pytest.mark.parametrize("name", ["specblock", "falcon", "eagle3", "dflash", "medusa"])
def test_small_trees_are_sizes_that_matrices_are_multiplied_by(name):
    drafter = drafter_of(name, **({} if name == "dflash" else {"draft_vocab_size": 24}))
    plans = [*drafter.plans_to_measure(), *(DraftingPlan(int(nodes), 1) for nodes, *_ in drafter.typical_acceptance)]
    plans += [drafter.default_plan(torch.device("cpu"))]
    assert all((plan.tree_budget + 1) % 4 == 0 or plan.tree_budget == 5 for plan in plans if plan.tree_budget < 59)


@pytest.mark.parametrize(
    ("name", "fields"),
    [("specblock", {}), ("specblock", {"num_hidden_layers": 1}), ("eagle3", {"qk_norm": True})]
    + [("eagle3", {"norm_before_residual": True}), ("parallelspec", {})],
)
@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_a_prompt_leaves_the_keys_that_a_forward_leaves_and_nothing_else_is_computed(name, fields, rows):
    drafter, told = drafter_of(name, draft_vocab_size=24, **fields).eval(), Told(3, 20)
    for weight in drafter.parameters():
        weight.data.normal_(std=0.3)
    computed = []
    drafter.layers[-1].mlp.register_forward_hook(lambda *_: computed.append(True))
    state, forwarded = (drafter.begin(told.table, rows, 20) for _ in range(2))
    for first, last in (((0, 0, 0), (5, 2, 9)), ((5, 2, 9), (7, 9, 9))):
        pairs = pairs_for(drafter, told, first[:rows], last[:rows], range(rows))
        drafter.extend(state, pairs)
        assert not computed
        drafter._commit(forwarded, pairs, drafter)
        assert computed.pop() and not computed
    assert forwarded.cache.keys[-1].any()
    for ours, theirs in zip(
        state.cache.keys + state.cache.values, forwarded.cache.keys + forwarded.cache.values, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert (state.calls, state.forward_rows) == (forwarded.calls, forwarded.forward_rows)


@pytest.mark.parametrize("name", ["specblock", "eagle3", "dflash"])
@pytest.mark.parametrize("compiles", [False, True])
def test_under_autocast_keys_come_in_another_dtype(name, compiles):
    target, drafter = tiny_target("llama"), drafter_of(name).eval()
    call = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    call |= {"inputs": prompt_of(7)} if compiles else padded_batch((4, 12, 7))
    with torch.autocast("cpu", torch.bfloat16):
        plain = target.generate(**call)
        if compiles:
            compile_rounds(target, drafter, max_length=24)
        assert torch.equal(target.generate(**call, assistant_model=drafter), plain)
    assert bool(drafter.last_statistics.compiled_rounds) == compiles
