# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Drafters for targets of every family, whatever names it has for its sizes."""

from __future__ import annotations

import pytest
import torch
from conftest import VOCAB, prompt_of
from drafters_for_tests import GarbageDrafter
from families_for_tests import FAMILIES, GROUPED, HALVES, OLD, SIZES, WIDE, target_of
from training_for_tests import Told, example_of
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedModel,
)

from specblock_hf import SpecBlockConfig, SpecBlockDrafter
from specblock_hf.drafters.common.configuration import fields_for_target
from specblock_hf.drafters.common.registry import trainable_drafters
from specblock_hf.drafting.pairs import TokenTable
from specblock_hf.training.batches import collate, draft_ids_of
from specblock_hf.training.target_views import view_target


READS = (0, 2, 3, 4)
READERS = ("specblock", "medusa")  # of three states and of the last one
OF_ALL_KINDS = ("Falcon, grouped", "Gemma 3n, shared keys", "GPT-NeoX", "OPT")
KINDS = {name: made for name, made in trainable_drafters().items() if name != "jetspec"}


def drafter_for(name: str, target: PreTrainedModel):
    kind, form = KINDS[name]
    fields = form | ({"draft_vocab_size": 24} if name not in ("dflash", "jetspec") else {})
    torch.manual_seed(1)
    return kind(kind.config_class.for_target(target.config, **fields)).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_read_by_meaning(family):
    config, (mlp, key_heads, head, epsilon, theta) = FAMILIES[family]
    made = SpecBlockConfig.for_target(config(), draft_vocab_size=24)
    assert (made.vocab_size, made.hidden_size, made.num_attention_heads) == (VOCAB, 32, 4)
    assert (made.target_num_layers, made.max_position_embeddings) == (4, 64)
    assert (made.intermediate_size, made.num_key_value_heads, made.head_dim) == (mlp, key_heads, head)
    assert made.rms_norm_eps == epsilon and made.rope_parameters["rope_theta"] == theta
    assert made.hidden_act == "silu" and made.rope_parameters["rope_type"] == "default"


@pytest.mark.parametrize(
    ("family", "name"),
    [(family, name) for family in FAMILIES for name in KINDS if name in READERS or family in OF_ALL_KINDS],
)
def test_a_drafter_made_for_a_target_drafts_and_learns(family, name):
    target = target_of(family)
    drafter, options = drafter_for(name, target), {"do_sample": False, "max_new_tokens": 10}
    plain = target.generate(prompt_of(7), **options)
    output = target.generate(prompt_of(7), assistant_model=drafter, **options)
    assert torch.equal(output, plain) and drafter.last_statistics.nodes_verified > drafter.last_statistics.rounds
    examples = [example_of(tokens, 3) for tokens in Told(3, 12).tokens.tolist()]
    views = view_target(target, examples, drafter.feature_layers, 8)
    batch = collate(examples, views, TokenTable.of(target), draft_ids_of(drafter, VOCAB))
    optimizer, losses = torch.optim.AdamW(drafter.parameters(), lr=1e-5), []
    for _ in range(2):
        loss = drafter.loss(batch, generator=torch.Generator().manual_seed(0))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0] < 1e3


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_learned_from_is_what_is_told_while_drafting(family):
    target, drafter = target_of(family), GarbageDrafter(VOCAB, READS)
    text = target.generate(prompt_of(7), do_sample=False, max_new_tokens=12, assistant_model=drafter)[0].tolist()
    (view,) = view_target(target, [example_of(text, 7)], READS, 1)
    (told,) = drafter.states
    for layer in range(len(READS)):
        states = told.features(layer)
        assert states.ndim == 2 and states.std() > 0
        torch.testing.assert_close(states, view.features[: len(states), layer], rtol=0, atol=5e-4)


def test_the_text_part_of_a_multimodal_target():
    text = {name: WIDE[name] for name in WIDE if name != "pad_token_id"} | {"head_dim": 8, "num_key_value_heads": 2}
    config = Gemma3Config(text_config=text | {"layer_types": HALVES, "sliding_window": 6})
    fields = fields_for_target(config)
    assert (fields["hidden_size"], fields["intermediate_size"], fields["target_num_layers"]) == (32, 48, 4)
    assert fields["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e6}


def test_heads_of_an_odd_size_take_the_targets_own():
    # gpt-oss-20b: 2880 / 64 = 45.
    config = GptOssConfig(**GROUPED | {"hidden_size": 36}, head_dim=8, num_local_experts=2)
    made = SpecBlockConfig.for_target(config, draft_vocab_size=24)
    assert (made.hidden_size, made.num_attention_heads, made.head_dim) == (36, 4, 8)
    SpecBlockDrafter(made)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            lambda: OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=16),
            r"^The target's embedding is 16 wide and its states 32, which no drafter here can read together; use a",
        ),
        (
            lambda: GPT2Config(**OLD | {"n_embd": 36}),
            r"^The target's 4 heads share a width of 36, which leaves none an even size .*; pass num_attention_heads",
        ),
    ],
)
def test_what_cannot_be_made_is_refused_in_a_sentence(config, sentence):
    for kind, _ in KINDS.values():
        with pytest.raises(ValueError, match=sentence):
            kind.config_class.for_target(config())


def test_a_drafter_of_the_same_width_is_refused_too():
    made = SpecBlockConfig.for_target(LlamaConfig(**GROUPED), draft_vocab_size=24)
    target = AutoModelForCausalLM.from_config(OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=16))
    with pytest.raises(ValueError, match="embedding is 16 wide"):
        SpecBlockDrafter(made).check_target(target)
