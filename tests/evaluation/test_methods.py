# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What a method's name means."""

from __future__ import annotations

import pytest
import torch
from conftest import SIZES, prompt_of, tiny_target
from models_for_tests import save_models, tiny_drafter, tiny_tokenizer
from transformers import MuseGlimmerAssistantConfig, MuseGlimmerAssistantModel

from specblock_hf import JoinedDrafter, LookupDrafter, SpecBlockDrafter
from specblock_hf.evaluation.methods import MethodLoader, grow_as


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    folders = save_models(tmp_path_factory.mktemp("models"))
    loader = MethodLoader(
        tiny_target("llama"), tiny_tokenizer(), {name: folders[name] for name in ("specblock", "eagle3")}
    )
    loader.folders = folders
    return loader


def test_plain_is_always_there_and_the_order_is_kept(loader):
    assert [m.name for m in loader.load(["lookup", "eagle3"])] == ["vanilla", "lookup", "eagle3"]
    assert [m.name for m in loader.load(["lookup", "vanilla"])] == ["lookup", "vanilla"]


def test_names_mean_what_they_say(loader):
    names = [
        "vanilla",
        "prompt_lookup",
        f"assistant:{loader.folders['target']}",
        "lookup",
        "specblock",
        "eagle3+lookup",
    ]
    plain, own, assistant, lookup, specblock, joined = loader.load(names)
    assert plain.options == {} and plain.kind == "plain"
    assert own.options == {"prompt_lookup_num_tokens": 10} and own.kind == "transformers" and own.drafter is None
    assert assistant.kind == "transformers" and type(assistant.options["assistant_model"]) is type(loader.target)
    assert assistant.options.keys() == {"assistant_model"} and not assistant.options["assistant_model"].training
    assert type(lookup.drafter) is LookupDrafter and lookup.kind == "lookup"
    assert type(specblock.drafter) is SpecBlockDrafter and specblock.kind == "specblock"
    assert specblock.options == {"assistant_model": specblock.drafter}
    assert type(joined.drafter) is JoinedDrafter and joined.kind == "eagle3"
    assert joined.drafter.label == "Eagle3Drafter + LookupDrafter"


def test_transformers_own_dflash_writes_the_plain_text(loader, tmp_path):
    target = loader.target
    sizes = {name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
    config = MuseGlimmerAssistantConfig(
        **sizes,
        num_hidden_layers=2,
        num_key_value_heads=2,
        head_dim=8,
        block_size=4,
        mask_token_id=3,
        target_layer_ids=[0, 2],
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    MuseGlimmerAssistantModel(config).save_pretrained(tmp_path)
    _, native = loader.load([f"dflash_native:{tmp_path}"])
    assert native.kind == "transformers" and native.drafter is None
    drafts = []
    native.options["assistant_model"].register_forward_hook(lambda *args: drafts.append(args))
    settings = {"do_sample": False, "max_new_tokens": 12}
    drafted = target.generate(prompt_of(7), **settings, **native.options)
    assert drafts and torch.equal(drafted, target.generate(prompt_of(7), **settings))


def test_what_transformers_has_no_dflash_class_for_is_refused(loader):
    with pytest.raises(ValueError, match=r"configuration \(llama\) has no target_layer_ids; run it as one of ours"):
        loader.load([f"dflash_native:{loader.folders['target']}"])


def test_a_drafter_is_loaded_once_for_each_tree(loader):
    names = ["specblock", "specblock+lookup", "specblock:best_first", "specblock:best_first+lookup", "specblock:fixed"]
    _, alone, joined, best, best_joined, fixed = loader.load(names)
    assert joined.drafter.network is alone.drafter and best_joined.drafter.network is best.drafter
    assert len({id(m.drafter.network) for m in (alone, best, fixed)}) == 3
    assert [m.drafter.config.expansion for m in (alone, best, fixed)] == ["rank_guided", "best_first", "rank_guided"]
    assert alone.drafter.config.branching == [2, 4, 10, 0] and fixed.drafter.config.branching == [4, 4, 4, 4]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "medusa",
            "there is no method 'medusa': .* the drafters are specblock, eagle3; name its drafter with --drafter",
        ),
        ("specblock:wide", "there is no tree 'wide'; name rank_guided, best_first or fixed."),
        ("eagle3:fixed", "Eagle3Drafter grows its trees in one way only, so that :fixed cannot be asked of it"),
        ("specblock+eagle3", "adds 'eagle3' to 'specblock'; only look-ups join a drafter"),
        ("lookup+lookup", "adds 'lookup' to 'lookup'; only look-ups join a drafter"),
    ],
)
def test_other_names_are_refused(loader, name, sentence):
    with pytest.raises(ValueError, match=sentence):
        loader.load(["vanilla", name])


def test_a_name_stands_there_once(loader):
    with pytest.raises(ValueError, match="the method 'lookup' is named twice"):
        loader.load(["lookup", "vanilla", "lookup"])


def test_a_fixed_tree_is_as_wide_at_every_slot(loader):
    drafter = tiny_drafter()
    drafter.config.branching = [1, 1, 1, 0]
    grow_as(drafter, "fixed")
    assert drafter.config.branching == [1, 1, 1, 1]
