# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Configurations of block-diffusion drafters, the targets that they are for, and the plans that follow."""

from __future__ import annotations

import pytest
import torch
from batches_for_tests import padded_batch
from block_drafters_for_tests import block_config, block_drafter
from conftest import VOCAB, prompt_of, tiny_target
from hybrids_for_tests import hybrid_target
from test_block_diffusion import GREEDY
from transformers import MambaConfig, MambaForCausalLM

from specblock_hf import AutoDrafter, BlockDiffusionConfig, BlockDiffusionDrafter, DraftingPlan
from specblock_hf.drafters.dflash.configuration import spread_feature_layers


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        ({"vocab_size": 40}, "vocabulary is 40"),
        ({"hidden_size": 64}, "hidden size is 64"),
        ({"target_num_layers": 6}, "number of layers is 6"),
        ({"feature_layers": [2, 3, 5]}, "hidden state 5"),
        ({"mask_token_id": 32}, r"mask is token 32 and the embedding of this LlamaForCausalLM has 32 rows; "),
    ],
)
def test_a_drafter_for_another_target_is_refused(overrides, what):
    target = tiny_target("llama")
    with pytest.raises(ValueError, match=what):
        target.generate(prompt_of(5), max_new_tokens=4, assistant_model=block_drafter(**overrides))


def test_a_recurrent_target_is_drafted_for(tmp_path):
    target, batch = hybrid_target("qwen3_5"), padded_batch((5,))
    block_drafter().save_pretrained(tmp_path)
    drafter = AutoDrafter.from_pretrained(tmp_path, target=target)
    options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 12}
    plain = target.generate(**batch, **options)
    assert torch.equal(target.generate(**batch, **options, assistant_model=drafter), plain)


def test_a_recurrent_target_whose_state_cannot_be_gone_on_from_is_refused():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=4, state_size=4)
    with pytest.raises(ValueError, match=r"^MambaForCausalLM keeps a recurrent state .*; drop assistant_model\.$"):
        MambaForCausalLM(config).generate(prompt_of(5), max_new_tokens=4, assistant_model=block_drafter())


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"block_size": 1}, r"^block_size is 1, so a block predicts no token; give 2 or more\.$"),
        (
            {"target_hidden_size": 64},
            r"^The target's embedding is 64 wide and the drafter's states 32; .*own_embedding",
        ),
        (
            {"conv_kernel_size": 2, "conv_group_size": 5},
            r"^conv_group_size is 5 and must divide the hidden size 32\.$",
        ),
        ({"selector_rank": 2}, r"^selector_top_k is 0; give from 1 to 32 candidates\.$"),
        ({"selector_rank": 2, "selector_top_k": 3, "markov_rank": 2}, r"^A drafter has a candidate selector or a "),
        ({"confidence_head_with_markov": True}, r"^confidence_head_with_markov needs a confidence head and a Markov"),
        ({"tree_width": 0}, r"^tree_width is 0; a node gets at least 1 child, so give 1 or more\.$"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(overrides, sentence):
    with pytest.raises(ValueError, match=sentence):
        block_config(**overrides)


def test_layers_spread_over_the_target():
    """The published drafters for Qwen3-8B and one of six layers."""
    assert spread_feature_layers(5, 36) == [index + 1 for index in (1, 9, 17, 25, 33)]
    assert spread_feature_layers(1, 36) == [19]
    assert block_config(feature_layers=None, target_num_layers=8).feature_layers == [2, 6]
    drafter = block_drafter(feature_layers=None, num_hidden_layers=3)
    assert drafter.feature_layers == (-1, -1, -1)
    assert drafter.feature_layers_for(tiny_target("llama")) == (2, 2, 2)
    assert block_drafter().feature_layers_for(tiny_target("llama")) == (1, 2, 3)


def test_plans():
    drafter = block_drafter(tree_budget=30)
    plans = [drafter.default_plan(torch.device(kind)) for kind in ("cpu", "cuda")]
    assert plans == [DraftingPlan(11, 1), DraftingPlan(30, 1)]
    typical = drafter.acceptance()
    assert [tau for _, tau in typical] == sorted(tau for _, tau in typical)
    assert all(joined > tau for (_, tau), (_, joined) in zip(typical, drafter.acceptance(True), strict=True))
    drafter.config.acceptance = [[4, 1, 0, 1.5, 1.75], [8, 2, 4, 9.0, 9.0], [12, 1, 0, 2.5, 3.0]]
    assert drafter.acceptance() == [(DraftingPlan(4, 1), 1.5), (DraftingPlan(12, 1), 2.5)]
    assert drafter.acceptance(True)[1] == (DraftingPlan(12, 1), 3.0)


def test_for_target():
    target = tiny_target("llama")
    config = BlockDiffusionConfig.for_target(target.config, num_hidden_layers=2, causal=True)
    assert (config.vocab_size, config.mask_token_id, config.block_size) == (VOCAB, VOCAB - 1, 8)
    assert config.feature_layers == [2, 2] and config.target_num_layers == 4
    assert config.layer_rules == [(True, None)] * 2
    drafter = BlockDiffusionDrafter(config).eval()
    prompt = prompt_of(5)
    output = target.generate(prompt, max_new_tokens=10, assistant_model=drafter, **GREEDY)
    assert torch.equal(output, target.generate(prompt, max_new_tokens=10, **GREEDY))


def test_parameters_of_a_scope():
    drafter = block_drafter("dflash2")
    assert [tuple(p.shape) for p in drafter.parameters_of("head")] == [(32, 96), (32,), (32,)]
    assert len(drafter.parameters_of("full")) == len(list(drafter.parameters()))
    assert drafter.draft_to_target.tolist() == list(range(VOCAB)) and drafter.config.draft_vocab_size == VOCAB
