# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What a drafter starts from: the target's rows, and another drafter's weights."""

from __future__ import annotations

import pytest
import torch
from conftest import VOCAB
from training_for_tests import DRAFT_VOCAB, tiny_drafter
from transfers_for_tests import TwoDevices

from specblock_hf.training.initial_weights import MARKOV_SCALE, reshape, start_from_target


def test_a_new_head_has_the_targets_rows_and_a_new_term_the_directions_of_its_embedding(llama):
    drafter = tiny_drafter(markov_rank=5)
    start_from_target(drafter, llama)
    assert torch.equal(drafter.lm_head.weight, llama.get_output_embeddings().weight[drafter.draft_to_target])
    rows = llama.get_input_embeddings().weight.detach()
    main = torch.pca_lowrank(rows, q=VOCAB, niter=9)[2][:, :5]
    read = drafter.markov_head.markov_w1.weight.detach()
    torch.testing.assert_close(read.std(0), torch.full((5,), MARKOV_SCALE))
    torch.testing.assert_close(read.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    # The same space, whatever the order and signs of its directions.
    found = torch.linalg.lstsq(rows - rows.mean(0), read).solution
    torch.testing.assert_close(main @ (main.T @ found), found, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_a_new_vocabulary_keeps_the_rows_that_are_known_and_maps_the_targets_to_others(llama):
    old = tiny_drafter(markov_rank=3)
    change = torch.randn(32, 32)
    head = llama.get_output_embeddings().weight
    old.lm_head.weight.copy_(head[old.draft_to_target] @ change)
    ids = torch.arange(4, VOCAB)
    new = reshape(old, {"draft_vocab_size": len(ids)}, llama, ids)
    known = torch.isin(ids, old.draft_to_target)
    assert new.draft_to_target.tolist() == ids.tolist() and 0 < known.sum() < len(ids) and len(ids) > DRAFT_VOCAB
    rows = {int(token): row for row, token in enumerate(old.draft_to_target)}
    for row, token in enumerate(ids.tolist()):
        if token in rows:
            assert torch.equal(new.lm_head.weight[row], old.lm_head.weight[rows[token]])
            assert torch.equal(new.markov_head.markov_w2.weight[row], old.markov_head.markov_w2.weight[rows[token]])
        else:
            assert not new.markov_head.markov_w2.weight[row].any()
    # With fewer rows than directions the map is the smallest that fits; it says what those rows can say.
    fitted = torch.linalg.pinv(head[old.draft_to_target]) @ old.lm_head.weight
    torch.testing.assert_close(new.lm_head.weight[~known], head[ids[~known]] @ fitted, atol=1e-3, rtol=1e-3)
    others = new.state_dict().keys() - {"lm_head.weight", "markov_head.markov_w2.weight", "d2t", "t2d"}
    assert all(torch.equal(new.state_dict()[name], old.state_dict()[name]) for name in others)


@torch.no_grad()
def test_a_term_and_a_layer_are_added(llama):
    old = tiny_drafter()
    new = reshape(old, {"markov_rank": 3, "num_hidden_layers": 3}, llama)
    assert len(new.layers) == 3 and not new.markov_head.markov_w2.weight.any()
    assert torch.equal(new.draft_to_target, old.draft_to_target)
    assert all(torch.equal(new.state_dict()[name], weight) for name, weight in old.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("ids", [None, torch.arange(4, VOCAB)])
def test_a_drafter_on_another_device_gets_another_shape(llama, ids):
    old = tiny_drafter(markov_rank=3)
    changes = {} if ids is None else {"draft_vocab_size": len(ids)}
    torch.manual_seed(0)
    here = reshape(old, changes, llama, ids)
    torch.manual_seed(0)
    with TwoDevices():
        there = reshape(old, changes, llama, None if ids is None else ids.cpu())
    torch.testing.assert_close(there.state_dict(), here.state_dict())
