# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What a configuration asks for is checked when it is made, in a sentence, and not found out while drafting."""

from __future__ import annotations

import dataclasses

import pytest
from conftest import tiny_target
from transformers import PreTrainedConfig

from specblock_hf import BlockDiffusionConfig, Eagle3Config, SpecBlockConfig
from specblock_hf.checkpoints.configuration_checks import _LISTS, _NUMBERS, _TEXTS, _WHOLE
from specblock_hf.drafters.common.registry import drafter_kinds
from specblock_hf.drafters.falcon import FalconDrafterConfig
from specblock_hf.drafters.medusa import MedusaConfig
from specblock_hf.drafters.parallelspec import ParallelSpecConfig


CLASSES = (
    SpecBlockConfig,
    Eagle3Config,
    MedusaConfig,
    ParallelSpecConfig,
    FalconDrafterConfig,
    BlockDiffusionConfig,
)
NO_WHOLE_NUMBER = (-1, 10**9, 2.0, True, "8", [8])


def made(kind: type, **fields):
    sizes = {} if kind is BlockDiffusionConfig else {"draft_vocab_size": 24}
    return kind.for_target(tiny_target("llama").config, **(sizes | fields))


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("value", NO_WHOLE_NUMBER, ids=str)
def test_a_tree_budget_is_a_whole_number(kind, value):
    with pytest.raises(ValueError, match=r"^tree_budget is .*; give a whole number from 0 to 65536\.$"):
        made(kind, tree_budget=value)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (SpecBlockConfig, "num_blocks"),
        (SpecBlockConfig, "root_width"),
        (SpecBlockConfig, "max_starts"),
        (SpecBlockConfig, "rank_hidden_size"),
        (Eagle3Config, "num_blocks"),
        (Eagle3Config, "beam_width"),
        (FalconDrafterConfig, "num_blocks"),
        (FalconDrafterConfig, "num_lstm_layers"),
    ],
)
@pytest.mark.parametrize("value", [0, *NO_WHOLE_NUMBER], ids=str)
def test_a_count_is_a_whole_number(kind, name, value):
    with pytest.raises(ValueError, match=rf"^{name} is .*; give a whole number from 1 to \d+\.$"):
        made(kind, **{name: value})


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 20_000_000}, r"^block_size is 20000000; give a whole number of at most 1024\.$"),
        ({"num_hidden_layers": 3000}, r"^num_hidden_layers is 3000; give a whole number from 1 to 64\.$"),
        ({"vocab_size": 10**13}, r"^vocab_size is 10000000000000; give a whole number"),
        ({"rms_norm_eps": float("nan")}, r"^rms_norm_eps is nan; give a number from 0 to 1\.$"),
        ({"feature_layers": "2"}, r"^feature_layers is '2'; give a list of 1 to 1024 whole numbers from -1 to"),
        ({"feature_layers": []}, r"^feature_layers is \[\]; give a list"),
        ({"feature_layers": [5]}, r"^feature_layers is \[5\]; name hidden states of the target"),
        ({"feature_layers": [2, -1]}, r"^feature_layers is \[2, -1\]; name hidden states of the target"),
        ({"acceptance": [[8, 1, 4]]}, r"^acceptance has the row \[8, 1, 4\]; give nodes, forwards, starts and"),
        ({"acceptance": [[8, 0, 4, 2.0]]}, r"^acceptance has the row \[8, 0, 4, 2\.0\]; give nodes, forwards"),
        ({"acceptance": [8]}, r"^acceptance has the row 8; give nodes, forwards"),
        ({"target_name_or_path": 3}, r"^target_name_or_path is 3; give a text, or leave it out\.$"),
    ],
)  # fmt: skip
def test_every_kind_refuses(kind, fields, message):
    if fields.keys() - vars(made(kind)).keys():
        return  # it has no such field
    with pytest.raises(ValueError, match=message):
        made(kind, **fields)


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind is not MedusaConfig])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_key_value_heads": 3}, r"^There are 4 heads, 3 key heads and a head_dim of 8; give as many"),
        ({"head_dim": 7}, r"^There are 4 heads, 2 key heads and a head_dim of 7; give as many"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, r"^rope_theta is -1\.0; give a"),
    ],
)  # fmt: skip
def test_attention_that_cannot_be_is_refused(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        made(kind, **fields)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (SpecBlockConfig, {"branching": 4}, r"^branching is 4; give a list of 1 to 1024 whole numbers"),
        (SpecBlockConfig, {"branching": [2, 4, -1, 0]}, r"^branching is \[2, 4, -1, 0\]; give a list"),
        (FalconDrafterConfig, {"rank_weights": [0.5, float("nan"), 0.1]}, r"^rank_weights is \[0\.5, nan, 0\.1\]; "),
        (BlockDiffusionConfig, {"layer_types": ["linear_attention"] * 5}, r"^layer_types is .*; give each of the 5"),
        (BlockDiffusionConfig, {"mask_token_id": -1}, r"^mask_token_id is -1; give a whole number"),
        (BlockDiffusionConfig, {"mask_token_id": 32, "own_embedding": True}, r"^mask_token_id is 32 and the drafter"),
        (BlockDiffusionConfig, {"final_logit_softcapping": 0.0}, r"^final_logit_softcapping is 0\.0; give a number"),
    ],
)  # fmt: skip
def test_fields_of_one_kind(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        made(kind, **fields)


@pytest.mark.parametrize("kind", [kind.config_class for kind in drafter_kinds().values()])
def test_every_number_and_list_is_checked(kind):
    """Fields that are added later included."""
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    of_transformers = {"rope_parameters", "pad_token_id", "bos_token_id", "eos_token_id", "pretraining_tp"}
    own_rules = {"acceptance", "layer_types"}
    known = {*_WHOLE, *_NUMBERS, *_LISTS, *_TEXTS} | inherited | of_transformers | own_rules
    hints = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    assert not [name for name, hint in hints.items() if name not in known and "bool" not in hint]


@pytest.mark.parametrize("kind", CLASSES)
def test_a_description_that_makes_no_sense_is_refused_in_a_sentence(kind):
    described = made(kind).to_dict()
    for change in ({"hidden_size": "wide"}, {"rope_parameters": 3}, {"eos_token_id": {}}, {"dtype": "system"}):
        with pytest.raises(ValueError, match=r"\.$") as refused:
            kind.from_dict(described | change)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", CLASSES)
def test_what_a_caller_names_is_checked_as_well(kind):
    with pytest.raises(ValueError, match=r"^tree_budget is -5; give a whole number"):
        kind.from_dict(made(kind).to_dict(), tree_budget=-5)
    assert kind.from_dict(made(kind).to_dict(), tree_budget=5).tree_budget == 5
