# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Decoding with a drafter where the hook is not installed."""

from __future__ import annotations

import pytest
import torch
from conftest import VOCAB, prompt_of, tiny_target
from drafters_for_tests import GarbageDrafter, OracleDrafter
from test_loop import KeepingStreamer, tokenizer  # noqa: F401
from transformers import GenerationConfig
from transformers.generation import utils as generation

import specblock_hf
from specblock_hf.custom_generate import generate_without_hook


@pytest.fixture(autouse=True)
def no_hook():
    specblock_hf.uninstall()
    yield
    specblock_hf.install()


def test_the_text_and_the_rounds_are_those_of_the_hook(target):
    prompt = prompt_of(7)
    text = target.generate(prompt, max_new_tokens=40, do_sample=False)
    drafter = OracleDrafter(VOCAB, text[0].tolist(), plan=lambda number: 8)
    streamer = KeepingStreamer()
    options = {"inputs": prompt, "max_new_tokens": 40, "do_sample": False}
    assert torch.equal(generate_without_hook(target, drafter, streamer=streamer, **options), text)
    assert drafter.last_statistics.accepted == [8, 8, 8, 8, 2]
    # The prompt in one piece and then every token, as generate() does it.
    assert (
        streamer.puts[0].shape == (1, 7)
        and torch.cat([put.flatten() for put in streamer.puts]).tolist() == text[0].tolist()
    )
    assert len(streamer.puts) == 41 and streamer.ends == 1


def test_sampling_draws_what_plain_sampling_draws():
    options = {"inputs": prompt_of(5), "max_new_tokens": 20, "do_sample": True, "temperature": 0.9, "top_p": 0.9}
    target = tiny_target("llama")
    torch.manual_seed(3)
    plain = target.generate(**options)
    torch.manual_seed(3)
    assert torch.equal(generate_without_hook(target, GarbageDrafter(VOCAB), **options), plain)


def test_stop_strings(tokenizer):  # noqa: F811
    target, prompt = tiny_target("llama"), prompt_of(7, seed=3)
    text = target.generate(prompt, max_new_tokens=30, do_sample=False)[0].tolist()
    options = {"inputs": prompt, "max_new_tokens": 30, "do_sample": False, "tokenizer": tokenizer}
    options["stop_strings"] = [tokenizer.decode(text[11:13])]
    plain = target.generate(**options)
    assert plain.shape[1] < 37
    drafter = OracleDrafter(VOCAB, text, plan=lambda number: 8)
    assert torch.equal(generate_without_hook(target, drafter, **options), plain)


@pytest.mark.parametrize(
    "options", [{"generation_config": GenerationConfig(stop_strings=["a"])}, {"token_healing": True}]
)
def test_what_needs_the_tokenizer_elsewhere_is_refused(options, tokenizer):  # noqa: F811
    options |= {"inputs": prompt_of(5), "tokenizer": tokenizer, "max_new_tokens": 4}
    with pytest.raises(ValueError, match=r"^custom_generate hands no tokenizer on.*give stop_strings and tokenizer"):
        generate_without_hook(tiny_target("llama"), GarbageDrafter(VOCAB), **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"num_beams": 2},
            r"^a tree drafter speeds up greedy decoding and sampling and this call asks for beam search",
        ),
        ({"prompt_lookup_num_tokens": 3}, r"^prompt_lookup_num_tokens would be ignored next to a tree drafter"),
    ],
)
def test_refusals_are_those_of_the_hook(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        generate_without_hook(
            tiny_target("llama"), GarbageDrafter(VOCAB), inputs=prompt_of(5), max_new_tokens=4, **options
        )


def test_processes_that_need_equally_many_forwards_are_refused_unasked(monkeypatch):
    monkeypatch.setattr(generation, "is_fsdp_managed_module", lambda model: True)
    monkeypatch.setattr(generation, "_get_torch_distributed_world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"^synced_gpus needs the same number of forwards"):
        generate_without_hook(tiny_target("llama"), GarbageDrafter(VOCAB), inputs=prompt_of(5), max_new_tokens=4)
