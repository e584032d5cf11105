# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""DFlash, DFlash 2 and DSpark as `speculators` saves them: read strictly, drafting exactly, within their windows."""

from __future__ import annotations

import json

import pytest
import torch
from block_drafters_for_tests import block_drafter
from conftest import prompt_of, tiny_target
from layouts_for_tests import DSPARK, SAID, WINDOWS, speculators_folder
from safetensors.torch import load_file
from test_loading import assert_same

from specblock_hf import AutoDrafter
from specblock_hf.drafters.layouts import write_checkpoint
from specblock_hf.drafting.pairs import TokenTable


@pytest.mark.parametrize("kind", ["dflash", "dflash2", "dspark"])
def test_every_tensor_but_the_targets_own_is_taken_as_it_is(tmp_path, kind):
    drafter = speculators_folder(tmp_path / "there", kind)
    again = AutoDrafter.from_pretrained(tmp_path / "there")
    assert_same(again, drafter)
    names = ("predicts_from_anchor", "markov_rank", "confidence_head", "block_size", "feature_layers", "causal")
    for name in (*names, "conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k"):
        assert getattr(again.config, name) == getattr(drafter.config, name), name
    assert again.config.target_name_or_path == "Qwen/Qwen3-8B" and not again.config.own_embedding
    assert AutoDrafter.from_pretrained(tmp_path / "there", target=tiny_target("llama").config).config.vocab_size == 32
    again.save_pretrained(tmp_path / "ours")
    assert_same(AutoDrafter.from_pretrained(tmp_path / "ours"), again)


@pytest.mark.parametrize(
    ("kind", "said"),
    [("dflash", None), ("dflash", SAID), ("dflash2", None), ("dspark", None), ("dspark", SAID)],
    ids=["dflash", "dflash-restricted", "dflash2", "dspark", "dspark-restricted"],
)
@pytest.mark.parametrize("fields", [{}, WINDOWS], ids=["full", "windows"])
def test_the_text_is_the_targets_own(tmp_path, kind, said, fields):
    speculators_folder(tmp_path / "there", kind, said, fields=fields)
    target, prompt = tiny_target("llama"), prompt_of(9)
    drafter = AutoDrafter.from_pretrained(tmp_path / "there", target=target).eval()
    expected = target.generate(prompt, max_new_tokens=24, do_sample=False)
    assert torch.equal(target.generate(prompt, max_new_tokens=24, do_sample=False, assistant_model=drafter), expected)
    assert drafter.last_statistics.nodes_verified > drafter.last_statistics.rounds
    torch.manual_seed(5)
    expected = target.generate(prompt, max_new_tokens=12, do_sample=True, top_k=0)
    torch.manual_seed(5)
    sampled = target.generate(prompt, max_new_tokens=12, do_sample=True, top_k=0, assistant_model=drafter)
    assert torch.equal(sampled, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dflash", "dspark"])
def test_a_restricted_drafter_says_what_its_own_head_would(tmp_path, kind):
    """The target's whole head, cut to the draft vocabulary, is the head that was saved; and so are Markov's rows."""
    speculators_folder(tmp_path / "there", kind, SAID)
    saved = load_file(tmp_path / "there" / "model.safetensors")
    drafter, target = AutoDrafter.from_pretrained(tmp_path / "there").eval(), tiny_target("llama")
    hidden = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(2))
    table = TokenTable(target.get_input_embeddings(), target.get_output_embeddings(), 32)
    logits = drafter.head_logits(hidden, table)
    assert torch.allclose(logits[..., SAID], hidden @ saved["lm_head.weight"].T, atol=1e-6)
    assert torch.isinf(logits).sum() == 4 * (32 - len(SAID)) and not torch.isnan(logits).any()
    if kind == "dspark":
        before = torch.tensor([[5, 7]])
        gained = saved["markov_head.markov_w1.weight"][before] @ saved["markov_head.markov_w2.weight"].T
        assert torch.allclose(drafter.markov_head(before)[..., SAID], gained, atol=1e-6)


def test_windows_are_the_files(tmp_path):
    speculators_folder(tmp_path / "causal", fields=WINDOWS)
    assert AutoDrafter.from_pretrained(tmp_path / "causal").config.layer_rules == [(True, 4), (False, None)]
    speculators_folder(tmp_path / "both", fields=WINDOWS, sliding_window_non_causal=True)
    assert AutoDrafter.from_pretrained(tmp_path / "both").config.layer_rules == [(False, 4), (False, None)]
    # Where DFlash 2 does not say so, they are not causal.
    speculators_folder(tmp_path / "dflash2", "dflash2", fields=WINDOWS, sliding_window_non_causal=None)
    assert AutoDrafter.from_pretrained(tmp_path / "dflash2").config.layer_rules == [(False, 4), (False, None)]


@torch.no_grad()
@pytest.mark.parametrize("both_ways", [False, True])
def test_a_window_is_the_blocks(tmp_path, both_ways):
    """All rows see as many columns before the anchor as it has, and their own block, as in speculators' training."""
    layers = WINDOWS | {"layer_types": ["sliding_attention"] * 2}
    speculators_folder(tmp_path / "there", fields=layers, sliding_window_non_causal=both_ways)
    drafter = AutoDrafter.from_pretrained(tmp_path / "there").eval()
    assert drafter.config.window_from_anchor
    places, keys = torch.arange(9, 14)[None], torch.arange(14)[None]
    (mask,) = drafter.masks(places, keys, places[:, :1]).values()
    seen = [row.nonzero().flatten().tolist() for row in mask[0, 0]]
    before = [5, 6, 7, 8]
    block = [9, 10, 11, 12, 13]
    assert seen == [before + (block if both_ways else block[: row + 1]) for row in range(5)]
    drafter.save_pretrained(tmp_path / "ours")
    assert AutoDrafter.from_pretrained(tmp_path / "ours").config.window_from_anchor
    with pytest.raises(ValueError, match=r"cannot be written in the layout dflash; "):
        write_checkpoint(drafter, tmp_path / "theirs", "dflash")


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        ("dspark", {"markov_head_type": "rnn"}, r"has a Markov head of the type 'rnn'"),
        ("dflash", {"aux_hidden_state_layer_ids": None}, r"lacks aux_hidden_state_layer_ids"),
        ("dflash", {"mask_token_id": None}, r"lacks mask_token_id"),
        ("dflash", {"draft_vocab_size": 16}, r"has a draft vocabulary and lacks d2t;"),
        ("dflash", {"speculators_model_type": "other"}, r"is not a drafter in a known layout"),
        ("dspark", {"enable_confidence_head": False}, r"unexpected confidence_head\.proj"),
        ("dflash", {"speculators_model_type": "dspark", "markov_rank": 8}, r"missing .*markov_head\.markov_w1"),
    ],
)
def test_what_is_not_of_one_drafter_is_refused(tmp_path, kind, changes, sentence):
    speculators_folder(tmp_path / "there", kind, **changes)
    with pytest.raises(ValueError, match=sentence):
        AutoDrafter.from_pretrained(tmp_path / "there")


def test_a_restricted_drafter_is_not_trained():
    drafter = block_drafter(restricted_vocabulary=True)
    with pytest.raises(ValueError, match=r"^Block-diffusion drafters with a restricted vocabulary are loaded and run"):
        drafter.loss(None)


@pytest.mark.parametrize("fields", [{}, {"confidence_head": False, "confidence_head_with_markov": False}, WINDOWS])
def test_specforges_dspark_there_and_back(tmp_path, fields):
    drafter, target, prompt = block_drafter(**DSPARK | fields), tiny_target("llama"), prompt_of(8)
    write_checkpoint(drafter, tmp_path / "there", "specforge-dspark")
    written = json.loads((tmp_path / "there" / "config.json").read_text())
    assert written["architectures"] == ["DSparkDraftModel"] and written["dflash_config"]["projector_type"] == "dspark"
    again = AutoDrafter.from_pretrained(tmp_path / "there", target=target).eval()
    assert_same(again, drafter)
    names = ("predicts_from_anchor", "own_embedding", "markov_rank", "confidence_head", "causal", "layer_rules")
    assert all(getattr(again.config, name) == getattr(drafter.config, name) for name in names)
    expected = target.generate(prompt, max_new_tokens=16, do_sample=False)
    assert torch.equal(target.generate(prompt, max_new_tokens=16, do_sample=False, assistant_model=again), expected)


@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        ("dflash", DSPARK),
        ("dflash", {"predicts_from_anchor": True}),
        ("dflash", {"restricted_vocabulary": True}),
        ("dspark", DSPARK),
        ("specforge-dspark", {}),
        ("specforge-dspark", {"predicts_from_anchor": True, "conv_kernel_size": 2, "conv_group_size": 8}),
    ],
)
def test_what_a_layout_has_no_words_for_is_not_written(tmp_path, layout, fields):
    with pytest.raises(ValueError, match=rf"^A block_diffusion drafter cannot be written in the layout {layout}; "):
        write_checkpoint(block_drafter(**fields), tmp_path / "there", layout)
    assert list(tmp_path.iterdir()) == []


def test_it_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be written in the layout speculators-dflash"):
        write_checkpoint(block_drafter(), tmp_path / "there", "speculators-dflash")
    assert not (tmp_path / "there").exists()
