# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The configuration: the paper's defaults, what a target decides, what is refused, what survives saving."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import KINDS, VOCAB, tiny_target
from transformers import AutoConfig, AutoModel, LlamaConfig

from specblock_hf import SpecBlockConfig, SpecBlockDrafter


def small(**overrides) -> SpecBlockConfig:
    fields = {"vocab_size": 32, "draft_vocab_size": 24, "hidden_size": 32, "num_attention_heads": 4}
    return SpecBlockConfig(**(fields | overrides))


def test_defaults_are_the_papers():
    config = SpecBlockConfig()
    assert config.model_type == "specblock"
    assert (config.block_size, config.num_hidden_layers, config.num_blocks) == (4, 2, 2)
    assert (config.draft_vocab_size, config.tree_budget, config.root_width) == (32000, 60, 10)
    assert config.branching == [2, 4, 10, 0] and config.num_rank_classes == 4
    assert (config.rank_hidden_size, config.rank_top_k, config.max_starts) == (256, 20, None)
    assert config.target_hidden_size == config.hidden_size
    assert not config.probability_cuts and config.acceptance is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_decides_geometry_and_special_tokens(kind):
    target = tiny_target(kind)
    config = SpecBlockConfig.for_target(target.config, draft_vocab_size=20, eos_token_id=[3, 4])
    assert (config.vocab_size, config.hidden_size, config.target_hidden_size) == (VOCAB, 32, 32)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 8)
    assert (config.target_num_layers, config.num_hidden_layers) == (4, 2)
    assert config.feature_layers == [2, 2, 1]
    assert config.eos_token_id == [3, 4] and config.draft_vocab_size == 20
    SpecBlockDrafter(config).check_target(target)


def test_rope_of_the_target_without_its_scaling():
    scaled = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    scaled |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = SpecBlockConfig.for_target(LlamaConfig(num_hidden_layers=32, rope_parameters=scaled))
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 500000.0}
    assert config.feature_layers == [2, 16, 29]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 0}, "block_size is 0; a forward predicts at least one token, so give 1 or more."),
        ({"rank_top_k": 9}, "rank_top_k is 9 but the rank head reads 10 log-probabilities; give 10 or more"),
        ({"draft_vocab_size": 33}, "draft_vocab_size (33) is larger than the target's vocab_size (32); pass"),
        ({"draft_vocab_size": 19}, "rank_top_k asks for 20 tokens of a slot but draft_vocab_size is 19; enlarge"),
        ({"draft_vocab_size": 9}, "rank_top_k asks for 20 tokens of a slot but draft_vocab_size is 9; enlarge"),
        ({"root_width": 25}, "root_width asks for 25 tokens of a slot but draft_vocab_size is 24; enlarge"),
        ({"branching": [2, 4, 25, 0]}, "branching asks for 25 tokens of a slot but draft_vocab_size is 24; enlarge"),
        ({"branching": [2, 4, 10]}, "branching has 3 entries but the rank head has 4 buckets; give one number"),
    ],
)
def test_what_cannot_be_drafted_is_refused_in_a_sentence(fields, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        small(**fields)


def test_the_smallest_that_can_be_drafted():
    config = small(draft_vocab_size=10, rank_top_k=10, root_width=10, branching=[1, 1, 10, 0], block_size=1)
    assert SpecBlockDrafter(config).lm_head.weight.shape == (10, 32)


def test_save_and_load(tmp_path):
    fields = {"branching": [2, 4, 6, 4], "feature_layers": [0, 3, 4], "target_num_layers": 4, "max_starts": 7}
    fields |= {"acceptance": [[8, 2, 4, 2.25]], "target_name_or_path": "a/target", "eos_token_id": [2, 5]}
    fields |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    config = small(**fields)
    config.save_pretrained(tmp_path)
    for loaded in (SpecBlockConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is SpecBlockConfig
        assert {name: getattr(loaded, name) for name in fields} == fields
        assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()


def test_auto_model_loads_the_drafter(tmp_path):
    torch.manual_seed(0)
    drafter = SpecBlockDrafter(small())
    drafter.set_draft_vocabulary(torch.randperm(32)[:24])
    drafter.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is SpecBlockDrafter
    ours, theirs = drafter.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not any("embed" in name for name in ours)
    assert type(AutoModel.from_config(small())) is SpecBlockDrafter


def test_a_draft_vocabulary_maps_both_ways():
    drafter = SpecBlockDrafter(small(draft_vocab_size=20))
    ids = torch.randperm(32, generator=torch.Generator().manual_seed(0))[:20]
    drafter.set_draft_vocabulary(ids)
    assert drafter.draft_to_target.tolist() == sorted(ids.tolist())
    assert drafter.t2d.nonzero().flatten().tolist() == sorted(ids.tolist())
