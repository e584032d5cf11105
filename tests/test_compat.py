# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Which releases of transformers are taken, and that nothing of ours uses what they have deprecated."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import SIZES, VOCAB, prompt_of, tiny_target
from drafters_for_tests import GarbageDrafter
from options_for_tests import tiny_tokenizer
from transformers import AutoModelForCausalLM, DynamicCache, Gemma3nTextConfig, LlamaConfig, StaticCache

import specblock_hf
from specblock_hf.compat import CACHE, check_transformers, crop, layer_types, take_special_tokens


def test_transformers_out_of_range_is_refused_or_warned_about():
    with pytest.raises(ImportError, match=r"needs transformers 5\.17 or newer .* 5\.16\.2 is installed"):
        check_transformers("5.16.2")
    with pytest.warns(UserWarning, match=r"5\.25\.0\.dev0 is installed"):
        check_transformers("5.25.0.dev0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for version in ("5.17.0", "5.20.1", "5.24.4"):
            check_transformers(version)


def test_an_old_release_is_refused_before_anything_is_imported_from_it(tmp_path):
    """A transformers with a version and nothing else, as an old one lacks what the package imports."""
    old = tmp_path / "transformers"
    old.mkdir()
    (old / "__init__.py").write_text('__version__ = "4.57.1"\n')
    ours = Path(specblock_hf.__file__).parent.parent
    found = subprocess.run(
        [sys.executable, "-c", "import specblock_hf"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ours)))},
        capture_output=True,
        text=True,
    )
    assert found.stderr.splitlines()[-1] == (
        "ImportError: specblock_hf needs transformers 5.17 or newer because it relies on that release's caches, and "
        "4.57.1 is installed; run pip install -U transformers."
    )


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_crop(kind):
    target, prompt = tiny_target("llama"), prompt_of(9)
    options = {"max_cache_len": 12} if kind is StaticCache else {}
    whole, cut = (kind(config=target.config, **options) for _ in range(2))
    with torch.no_grad():
        target(prompt[:, :6], **{CACHE: whole})
        target(torch.cat((prompt[:, :6], prompt_of(5, seed=7)), dim=1), **{CACHE: cut})
        crop(cut, 5)
        crop(cut, 0)
        logits, expected = (target(prompt[:, 6:], **{CACHE: cache}).logits for cache in (cut, whole))
    torch.testing.assert_close(logits, expected)
    assert int(cut.get_seq_length()) == 9


def test_layers_that_borrow_keys_have_no_part_of_the_cache():
    config = Gemma3nTextConfig(
        **SIZES | {"intermediate_size": [48] * 4},
        head_dim=8,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=SIZES["vocab_size"],
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
    )
    target = AutoModelForCausalLM.from_config(config)
    assert layer_types(target) == ["sliding_attention", "full_attention", "dummy", "dummy"]


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
@pytest.mark.parametrize("name", sorted({CACHE, "past_key_values"}))
def test_a_cache_comes_by_either_name(name):
    target, drafter = tiny_target("llama"), GarbageDrafter(VOCAB)
    cache, plain = (DynamicCache(config=target.config) for _ in range(2))
    options = {"max_new_tokens": 9, "do_sample": False}
    text = target.generate(prompt_of(6), **options, **{name: cache}, assistant_model=drafter)
    assert torch.equal(text, target.generate(prompt_of(6), **options, **{CACHE: plain}))
    assert cache.get_seq_length() == plain.get_seq_length() == 14


def test_a_tokenizer_takes_its_models_special_tokens():
    tokenizer, sizes = tiny_tokenizer(), SIZES | {"eos_token_id": 2, "pad_token_id": 3}
    tokenizer.eos_token, tokenizer.pad_token = "ab", None
    take_special_tokens(tokenizer, AutoModelForCausalLM.from_config(LlamaConfig(**sizes)))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 3)
