# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Keys and values written in place: they are what a stock layer holds, and a stock layer is left behind."""

from __future__ import annotations

import pytest
import torch
from batches_for_tests import garbage, oracles, padded_batch
from conftest import VOCAB, prompt_of, tiny_target
from drafters_for_tests import GarbageDrafter
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from specblock_hf.compat import CACHE
from specblock_hf.target import cache_layer as target_layer
from specblock_hf.target.cache_layer import STEP, RoomyLayer


STEPS = st.one_of(
    st.tuples(st.just("update"), st.integers(1, 9)),
    st.tuples(st.just("crop"), st.integers(0, 4)),
    st.tuples(st.just("select"), st.sampled_from([[0], [1, 2], [0, 2]])),
)


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(STEPS, max_size=12), room=st.integers(0, 7))
def test_it_holds_what_a_layer_that_concatenates_holds(steps, room):
    generator = torch.Generator().manual_seed(0)
    held = torch.randn(3, 2, 6, 4, generator=generator)
    stock, other = DynamicLayer(), DynamicLayer()
    for layer in (stock, other):
        layer.update(held, -held)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target_layer, "STEP", room)  # which is far too little, so that it grows often
        roomy = RoomyLayer(other)
        for step, value in steps:
            if step == "update":
                new = torch.randn(len(stock.keys), 2, value, 4, generator=generator)
                returned = roomy.update(new, -new)
                for ours, theirs in zip(returned, stock.update(new, -new), strict=True):
                    assert torch.equal(ours, theirs)
            elif step == "crop":
                removed = min(value, stock.get_seq_length() - 1)
                for layer in (stock, roomy):
                    layer.crop(-removed)
            elif max(value) < len(stock.keys):
                for layer in (stock, roomy):
                    layer.batch_select_indices(value)
            assert roomy.get_seq_length() == stock.get_seq_length()
        layer = roomy.original(kept=True)
    assert layer is other and torch.equal(layer.keys, stock.keys) and torch.equal(layer.values, stock.values)
    assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes


def test_a_round_copies_its_own_columns_only(llama, monkeypatch):
    # One growth after the prompt, and then none: every round finds the keys where the last one left them.
    grown = []
    roomier = target_layer._roomier
    monkeypatch.setattr(
        target_layer, "_roomier", lambda held, total: (grown.append(held.shape[2]), roomier(held, total))[1]
    )
    prompt = prompt_of(20)
    options = {"max_new_tokens": 150, "do_sample": False, "eos_token_id": None}
    plain = llama.generate(prompt, **options)
    drafter = oracles(plain, torch.ones_like(prompt))
    assert torch.equal(llama.generate(prompt, **options, assistant_model=drafter), plain)
    assert drafter.last_statistics.rounds > 20 and len(plain[0]) < STEP
    assert grown == [20] * 2 * llama.config.num_hidden_layers


@pytest.mark.parametrize("passed_in", [True, False])
def test_a_cache_that_is_handed_back_has_stock_layers_without_spare_room(llama, passed_in):
    for batch in (padded_batch((5,)), padded_batch((5, 9))):
        cache = DynamicCache(config=llama.config) if passed_in else None
        output = llama.generate(
            **batch,
            max_new_tokens=12,
            do_sample=False,
            **{CACHE: cache},
            return_dict_in_generate=True,
            assistant_model=garbage(len(batch["input_ids"])),
        )
        assert not passed_in or output[CACHE] is cache
        for layer in output[CACHE].layers:
            assert type(layer) is DynamicLayer and layer.keys.is_contiguous()
            assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes


def test_a_cache_has_its_layers_back_after_a_call_that_failed():
    target, cache = tiny_target("llama"), DynamicCache(config=tiny_target("llama").config)
    drafter = GarbageDrafter(VOCAB)
    drafter.draft = lambda state, limits: (_ for _ in ()).throw(NotImplementedError)
    with pytest.raises(NotImplementedError):
        target.generate(prompt_of(6), max_new_tokens=8, **{CACHE: cache}, assistant_model=drafter)
    assert all(type(layer) is DynamicLayer for layer in cache.layers) and cache.get_seq_length() == 6
