# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Calls of `generate()` that name no drafter, of a target that has one attached."""

from __future__ import annotations

import gc
import logging
import pickle
import threading
from copy import deepcopy

import peft
import pytest
import torch
from batches_for_tests import padded_batch
from conftest import VOCAB, prompt_of, tiny_target
from drafters_for_tests import GarbageDrafter, OracleDrafter
from targets_for_tests import TargetKind, make_target
from test_loop import KeepingStreamer
from torch import nn
from training_for_tests import tiny_drafter
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig, LogitsProcessorList, T5Config

from specblock_hf.compat import CACHE
from specblock_hf.drafting.attachment import attachment_of, set_aside
from specblock_hf.target.features import FeatureTaps


GREEDY = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None}


def oracle(target, prompt=None, **options) -> OracleDrafter:
    text = target.generate(prompt_of(7) if prompt is None else prompt, **GREEDY | options)
    return OracleDrafter(VOCAB, text[0].tolist(), plan=lambda number: 4)


@pytest.fixture
def target():
    # One that nobody has asked for its states yet, for which transformers puts hooks up that cannot be pickled.
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(deepcopy(tiny_target("llama").config)).eval()


def test_calls_that_name_no_assistant_are_served(target):
    plain, drafter = target.generate(prompt_of(7), **GREEDY), oracle(target)
    with drafter.attach(target) as attachment:
        assert torch.equal(target.generate(prompt_of(7), **GREEDY), plain)
        # Positions instead of names.
        assert torch.equal(target.generate(prompt_of(7), GenerationConfig(**GREEDY)), plain)
    statistics = attachment.statistics
    assert (statistics.calls, statistics.served, statistics.tokens) == (2, 2, 40)
    assert statistics.tau == 1 + statistics.kept / statistics.rounds > 4
    calls = drafter.last_statistics
    assert torch.equal(target.generate(prompt_of(7), **GREEDY), plain)
    assert statistics.calls == 2 and drafter.last_statistics is calls


def test_a_batch_is_served(target):
    batch = padded_batch((5, 3)) | {"pad_token_id": 0}
    plain = target.generate(**batch, **GREEDY)
    with tiny_drafter().attach(target) as attachment:
        assert torch.equal(target.generate(**batch, **GREEDY), plain)
    assert attachment.statistics.served == 1


def nobody_knows(ids, scores):
    return scores


LEFT_ALONE = {
    "beams": ({"num_beams": 2}, "speeds up greedy decoding and sampling"),
    "lookup": ({"prompt_lookup_num_tokens": 3}, "would be ignored next to a tree drafter"),
    "no cache": ({"use_cache": False}, "pass use_cache=True"),
    "synced": ({"synced_gpus": True}, "synced_gpus needs the same number"),
    "processor": ({"logits_processor": LogitsProcessorList([nobody_knows])}, "may look at a whole batch at once"),
    "offloaded": ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded'"),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_calls_that_a_drafter_cannot_serve_run_as_without_it(target, name, caplog):
    options, reason = LEFT_ALONE[name]
    batch, outcomes, states = padded_batch((5, 3)) | {"pad_token_id": 0}, [], []
    for attached in (False, True):
        if attached:
            attachment = tiny_drafter().attach(target)
        for _ in range(2):
            torch.manual_seed(0)
            try:
                outcomes.append(target.generate(**batch, **GREEDY | options).tolist())
            except Exception as error:
                outcomes.append(f"{type(error).__name__}: {error}")
            states.append(torch.get_rng_state().tolist())
    attachment.detach()
    assert outcomes == outcomes[:1] * 4 and states == states[:1] * 4
    ((said, count),) = attachment.statistics.left_alone.items()
    assert reason in said and count == 2 and attachment.statistics.served == 0
    assert len([record for record in caplog.records if reason in record.message]) == 1


def test_a_target_that_hides_its_states_decodes_without_the_drafter(target, monkeypatch):
    plain = target.generate(prompt_of(7), **GREEDY)
    unheard = nn.Identity()
    monkeypatch.setattr(FeatureTaps, "_hook", lambda *_: unheard.register_forward_hook(lambda *_: None))
    with tiny_drafter().attach(target) as attachment:
        assert torch.equal(target.generate(prompt_of(7), **GREEDY), plain)
    ((reason, count),) = attachment.statistics.left_alone.items()
    assert count == 1 and "uncompiled" in reason


def test_what_drafts_for_another_target_is_left_alone(target):
    big = deepcopy(target)
    plain = big.generate(prompt_of(7), **GREEDY)
    with tiny_drafter().attach(target) as attachment:
        assert torch.equal(big.generate(prompt_of(7), **GREEDY, assistant_model=target), plain)
    assert {*attachment.statistics.left_alone} == {"it drafts for another target, which rolls its cache back."}


def test_other_assistants_and_methods_go_first(target):
    drafter, plain = oracle(target), target.generate(prompt_of(7), **GREEDY)
    with GarbageDrafter(VOCAB).attach(target) as attachment:
        assert torch.equal(target.generate(prompt_of(7), **GREEDY, assistant_model=drafter), plain)
        assert sum(drafter.last_statistics.accepted) > 0
        assert torch.equal(target.generate(prompt_of(7), **GREEDY, assistant_model=tiny_target("llama")), plain)
        own = target.generate(prompt_of(7), **GREEDY, custom_generate=lambda model, ids, **rest: ids)
        assert torch.equal(own, prompt_of(7))
    assert attachment.statistics.left_alone == {
        "it names an assistant of its own.": 2,
        "it brings a decoding method of its own.": 1,
    }


def test_a_streamer_hears_of_the_prompt_once(target):
    heard = []
    for options in ({}, {"prompt_lookup_num_tokens": 2}):
        for attached in (False, True):
            streamer = KeepingStreamer()
            attachment = GarbageDrafter(VOCAB).attach(target) if attached else None
            # A mask that hides the prompt's last token is refused after the prompt was streamed.
            mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0]])
            target.generate(prompt_of(7), attention_mask=mask, streamer=streamer, **GREEDY | options)
            heard.append([put.tolist() for put in streamer.puts])
            if attachment is not None:
                attachment.detach()
                assert attachment.statistics.left_alone.total() == 1
    assert heard[0] == heard[1]


def test_an_error_midway_is_the_calls_own(target):
    plain = target.generate(prompt_of(7), **GREEDY)
    drafter = oracle(target)

    def broken(ids, scores):
        if ids.shape[1] > 12:
            raise ValueError("of the user")
        return scores

    with drafter.attach(target) as attachment:
        with pytest.raises(ValueError, match="of the user"):
            target.generate(prompt_of(7), **GREEDY, logits_processor=LogitsProcessorList([broken]))
        assert torch.equal(target.generate(prompt_of(7), **GREEDY), plain)
    assert (attachment.statistics.calls, attachment.statistics.served) == (1, 1)


def test_nothing_is_put_on_the_target(target):
    before, weights = sorted(vars(target)), target.state_dict()
    with GarbageDrafter(VOCAB).attach(target) as attachment:
        assert sorted(vars(target)) == before and target.state_dict().keys() == weights.keys()
        for copy in (deepcopy(target), pickle.loads(pickle.dumps(target))):
            assert attachment_of(copy) is None
            copy.generate(prompt_of(7), **GREEDY)
    assert attachment.statistics.calls == 0
    attachment.detach()


def test_a_target_that_is_gone_takes_its_attachment_along():
    target = deepcopy(tiny_target("llama"))
    attachment = GarbageDrafter(VOCAB).attach(target)
    del target
    gc.collect()
    attachment.detach()
    assert attachment._target() is None


@pytest.mark.parametrize("wrapped_first", [False, True])
def test_wrappers(target, wrapped_first):
    drafter = GarbageDrafter(VOCAB)
    policy = peft.get_peft_model(target, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    plain = policy.generate(input_ids=prompt_of(7), **GREEDY)
    with drafter.attach(policy if wrapped_first else target) as attachment:
        assert torch.equal(policy.generate(input_ids=prompt_of(7), **GREEDY), plain)
        with policy.disable_adapter():
            bare = policy.generate(input_ids=prompt_of(7), **GREEDY)
    with policy.disable_adapter():
        assert torch.equal(policy.generate(input_ids=prompt_of(7), **GREEDY), bare)
    assert not torch.equal(plain, bare) and attachment.statistics.served == 2


def test_a_target_that_changes_between_calls(target):
    """A policy that learns: whatever was drafted for the old one, the tokens are the new one's."""
    drafter = oracle(target)
    with drafter.attach(target), torch.no_grad():
        for step in range(3):
            for weight in target.parameters():
                weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)))
            changed = deepcopy(target).generate(prompt_of(7), **GREEDY)
            assert torch.equal(target.generate(prompt_of(7), **GREEDY), changed)


def test_threads_and_inference_mode(target):
    plain, texts = target.generate(prompt_of(7), **GREEDY), []

    def call():
        with torch.inference_mode():
            texts.append(target.generate(prompt_of(7), **GREEDY))

    with tiny_drafter().attach(target) as attachment:
        threads = [threading.Thread(target=call) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(texts) == 3 and all(torch.equal(text, plain) for text in texts)
    assert attachment.statistics.served == 3


def test_a_cache_goes_on_after_a_refused_call(target):
    first = target.generate(prompt_of(7), **GREEDY, return_dict_in_generate=True)
    longer = torch.cat((first.sequences, prompt_of(3)), dim=1)
    texts = []
    with tiny_drafter().attach(target) as attachment:
        for attached in (True, False):
            for options in ({"prompt_lookup_num_tokens": 2}, {}):
                texts.append(target.generate(longer, **GREEDY, **options, **{CACHE: deepcopy(first[CACHE])}))
            if attached:
                attachment.detach()
    assert torch.equal(texts[0], texts[2]) and torch.equal(texts[1], texts[3])
    assert attachment.statistics.served == 1 and attachment.statistics.left_alone.total() == 1


def test_what_cannot_be_attached_to(target):
    drafter = GarbageDrafter(VOCAB)
    with drafter.attach(target):
        with pytest.raises(ValueError, match=r"^this LlamaForCausalLM has a GarbageDrafter attached already; detach"):
            tiny_drafter().attach(target)
    with pytest.raises(ValueError, match=r"^Linear has no generate\(\) to draft for; attach to a causal"):
        drafter.attach(nn.Linear(2, 2))
    sizes = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "vocab_size": 32}
    with pytest.raises(ValueError, match=r"^T5ForConditionalGeneration is an encoder-decoder, whose texts"):
        drafter.attach(AutoModelForSeq2SeqLM.from_config(T5Config(**sizes)))
    with pytest.raises(ValueError, match=r"^This drafter"):
        tiny_drafter().attach(make_target(TargetKind("llama", vocab_size=40)))


def test_continuous_batching_is_counted(target, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    with GarbageDrafter(VOCAB).attach(target) as attachment:
        assert not target.generate_batch([])
    assert [reason.split(" ")[0] for reason in attachment.statistics.left_alone] == ["generate_batch()"]


def test_a_target_whose_attachment_is_set_aside(target):
    drafter = oracle(target)
    wrapped = peft.get_peft_model(deepcopy(target), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with drafter.attach(wrapped) as attachment:
        with set_aside(wrapped):
            wrapped.generate(input_ids=prompt_of(7), **GREEDY)
            assert attachment.statistics.calls == 0
            # Other threads' calls are served all the while.
            other = threading.Thread(target=wrapped.generate, kwargs={"input_ids": prompt_of(7)} | GREEDY)
            other.start()
            other.join()
            assert attachment.statistics.served == 1
            attachment.detach()
        wrapped.generate(input_ids=prompt_of(7), **GREEDY)
        assert attachment.statistics.calls == 1
