# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Rows of a batch that draft no more: no drafter computes them, and the others are drafted as if they were alone."""

from __future__ import annotations

import pytest
import torch
from baselines_for_tests import BASELINES, baseline, pairs_for
from batches_for_tests import padded_batch
from block_drafters_for_tests import block_drafter
from conftest import tiny_target
from test_baselines import assert_same_paths, paths_of
from training_for_tests import Told, tiny_drafter

from specblock_hf import DraftingCallback, DraftingPlan
from specblock_hf.drafters.joined import JoinedDrafter
from specblock_hf.drafters.lookup import LookupDrafter
from specblock_hf.drafting.plan import Limits


ALL = ("specblock", *BASELINES, "dflash", "lookup", "joined")
OPTIONS = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": 5, "pad_token_id": 0}
LENGTHS = (7, 3, 12, 1)


def drafter_called(name: str):
    lookup = LookupDrafter(tiny_target("llama").config)
    made = {"specblock": tiny_drafter, "dflash": block_drafter, "lookup": lambda: lookup}
    made["joined"] = lambda: JoinedDrafter(tiny_drafter(), lookup)
    return made[name]() if name in made else baseline(name)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_the_rows_that_are_left_are_drafted_as_if_alone(name):
    drafter, told = drafter_called(name), Told(3, 24)
    told.tokens %= 3  # so that a look-up finds something
    # Up to which pair each row is told in each round. One that is not drafted for any more has learned the most.
    rounds = [([0, 1, 2], (9, 1, 14)), ([0, 1, 2], (12, 6, 15)), ([0, 1], (13, 7, 20)), ([0, 1], (15, 9, 20))]
    rounds += [([1], (20, 11, 20)), ([1], (20, 14, 20))]
    together = drafter.begin(told.table, 3, 24)
    alone = [drafter.begin(told.table, 1, 24) for _ in range(3)]
    first, sizes = (0, 0, 0), set()
    for rows, last in rounds:
        if len(rows) < together.batch_size:
            together.keep_rows([together.drafting.index(row) for row in rows])
        limits = Limits((12,) * 3, (9,) * 3, num_forwards=3)
        tree = drafter.propose(together, pairs_for(drafter, told, first, last).of_rows(rows), limits.of_rows(rows))
        assert tree.tokens.shape[0] == len(rows)
        for place, row in enumerate(rows):
            own = pairs_for(drafter, told, first[row : row + 1], last[row : row + 1], rows=[row])
            expected = drafter.propose(alone[row], own, limits.of_rows([row]))
            assert_same_paths(paths_of(tree, place), paths_of(expected))
            sizes.add(int(expected.num_nodes[0]))
        first = last
    assert together.drafting == [1] and max(sizes) > 4


class Watch(DraftingCallback):
    """Keeps how many rows may draft in each round, by what was emitted before it."""

    def on_generate_begin(self, call):
        self.left = [OPTIONS["max_new_tokens"]] * call.batch_size
        self.may_draft: list[int] = []

    def on_commit(self, call, tree, scored, walk, pairs):
        emitted = zip(self.left, walk.lengths.tolist(), walk.stopped.tolist(), strict=True)
        self.left = [0 if stopped else left - length for left, length, stopped in emitted]
        self.may_draft.append(sum(left > 1 for left in self.left))


@pytest.mark.parametrize("keeps_cache", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_rows_that_draft_no_more_cost_nothing(name, keeps_cache, monkeypatch):
    target, drafter, batch = tiny_target("llama"), drafter_called(name), padded_batch(LENGTHS)
    expected = target.generate(**batch, **OPTIONS)
    watch, rounds = Watch(), []
    drafter.add_callback(watch)
    real = type(drafter).propose

    def counting(self, state, pairs, limits):
        rounds.append({len(pairs.tokens), len(pairs.lengths), len(limits.nodes), len(limits.depth), state.batch_size})
        return real(self, state, pairs, limits)

    monkeypatch.setattr(type(drafter), "propose", counting)
    if isinstance(drafter.network, torch.nn.Module):
        drafter.network.register_forward_pre_hook(lambda module, args: rounds[-1].add(len(args[0])))
    output = target.generate(**batch, **OPTIONS, assistant_model=drafter, return_dict_in_generate=keeps_cache)
    assert torch.equal(output.sequences if keeps_cache else output, expected)
    may_draft = [rows for rows in watch.may_draft if rows]
    assert rounds == [{rows} for rows in may_draft]
    assert len(set(may_draft)) > 2
    if name == "medusa":
        assert drafter.last_statistics.drafter_rows == sum(may_draft)


@pytest.mark.parametrize("name", ["specblock", "dflash", "joined"])
def test_drawn_trees_of_the_rows_that_are_left(name):
    target, drafter, batch = tiny_target("llama"), drafter_called(name), padded_batch(LENGTHS)
    expected = target.generate(**batch, **OPTIONS)
    drafter.drafting_plan = DraftingPlan(9, 2, draft_sampling="sampled")
    # There is one token that can be drawn, so that distributions are compared and yet the text is known.
    options = OPTIONS | {"do_sample": True, "top_k": 1}
    assert torch.equal(target.generate(**batch, **options, assistant_model=drafter), expected)
    assert drafter.last_statistics.first_round[0].distributions is not None
