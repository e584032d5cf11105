# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The hook where the package is there twice."""

from __future__ import annotations

import importlib

import torch
from conftest import VOCAB, prompt_of
from drafters_for_tests import GarbageDrafter
from fresh_import_for_tests import HOOKED, imported_afresh
from transformers import GenerationMixin

import specblock_hf
from specblock_hf.generation import hook


GREEDY = {"do_sample": False, "max_new_tokens": 12}


def test_drafters_of_both_packages_go_on(llama):
    plain = llama.generate(prompt_of(7), **GREEDY)
    old = specblock_hf.SpecBlockDrafter(specblock_hf.SpecBlockConfig.for_target(llama.config)).eval()
    with imported_afresh() as package:
        new = package.SpecBlockDrafter(package.SpecBlockConfig.for_target(llama.config)).eval()
        assert package is not specblock_hf and type(new) is not type(old)
        for drafter in (old, new, old):
            drafter.last_statistics = None
            assert torch.equal(llama.generate(prompt_of(7), **GREEDY, assistant_model=drafter), plain)
            assert drafter.last_statistics.emitted == 12
        assert type(old.last_statistics) is not type(new.last_statistics)
        # One more import of either changes nothing.
        hooked = [getattr(GenerationMixin, name) for name in HOOKED]
        package.install()
        specblock_hf.install()
        assert [getattr(GenerationMixin, name) for name in HOOKED] == hooked
    assert torch.equal(llama.generate(prompt_of(7), **GREEDY, assistant_model=old), plain)


def test_uninstall_takes_both_out():
    originals = [getattr(GenerationMixin, name).__wrapped__ for name in HOOKED]
    with imported_afresh() as package:
        assert [getattr(GenerationMixin, name).__wrapped__.__wrapped__ for name in HOOKED] == originals
        package.uninstall()
        assert [getattr(GenerationMixin, name) for name in HOOKED] == originals
    assert hook.is_installed()


def test_a_module_that_runs_again_keeps_what_was_made_before(llama):
    # What `importlib.reload` and a notebook's autoreload do.
    plain, drafter = llama.generate(prompt_of(7), **GREEDY), GarbageDrafter(VOCAB)
    before = [getattr(GenerationMixin, name) for name in HOOKED]
    importlib.reload(hook).install()
    assert [getattr(GenerationMixin, name) for name in HOOKED] == before
    assert torch.equal(llama.generate(prompt_of(7), **GREEDY, assistant_model=drafter), plain)
