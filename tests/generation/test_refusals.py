# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What a call with a drafter cannot do exactly is refused before any token; what it does not ask for is left alone."""

from __future__ import annotations

from copy import deepcopy
from functools import wraps

import peft
import pytest
import torch
from batches_for_tests import garbage, padded_batch
from conftest import VOCAB, prompt_of, tiny_target
from drafters_for_tests import GarbageDrafter
from fresh_import_for_tests import HOOKED
from test_loop import GREEDY, KeepingStreamer, oracle, plain_text
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import specblock_hf
from specblock_hf import DraftingPlan
from specblock_hf.compat import CACHE
from specblock_hf.drafting.pairs import TokenTable
from specblock_hf.generation.hook import is_installed
from specblock_hf.generation.requests import drafting_plan


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_beams": 2}, r"this call asks for beam search; set num_beams=1 .* or drop assistant_model\.$"),
        ({"num_beams": 2, "do_sample": True}, r"asks for beam sample;"),
        ({"penalty_alpha": 0.6, "top_k": 4, "trust_remote_code": True}, r"asks for contrastive search;"),
        ({"use_cache": False}, r"pass use_cache=True\.$"),
        (
            {"cache_implementation": "offloaded_static"},
            r"^cache_implementation='offloaded_static' keeps rows .* pass \"dynamic\" or \"static\"\.$",
        ),
        ({"cache_implementation": "offloaded"}, r"^cache_implementation='offloaded' "),
        ({"cache_implementation": "quantized"}, r"^cache_implementation='quantized' "),
        ({"synced_gpus": True}, r"^synced_gpus needs the same number of forwards"),
        ({"prompt_lookup_num_tokens": 3}, r"^prompt_lookup_num_tokens would be ignored next to a tree drafter"),
        ({"assistant_early_exit": 2}, r"^assistant_early_exit would be ignored"),
        ({"assistant_ensemble_weight": 0.5}, r"^assistant_ensemble_weight would be ignored"),
    ],
)
def test_what_cannot_be_exact_is_refused_before_any_token(options, sentence):
    target = tiny_target("llama", "eager")
    refused_before_any_token(target, GarbageDrafter(VOCAB), sentence, options)


def refused_before_any_token(target, drafter, sentence: str, options: dict | None = None) -> None:
    streamer = KeepingStreamer()
    # Beam search refuses a streamer itself, after us.
    with pytest.raises(ValueError, match=sentence):
        target.generate(prompt_of(5), max_new_tokens=4, assistant_model=drafter, streamer=streamer, **options or {})
    assert not streamer.puts and not drafter.states


def test_a_drafter_for_another_target_is_refused(llama):
    refused_before_any_token(
        llama, GarbageDrafter(VOCAB + 1), r"^this drafter is for a target of another vocabulary; load"
    )


def test_a_cache_that_somebody_will_crop_is_refused():
    target = tiny_target("mistral")
    cache = DynamicCache(config=target.config)
    cache.activate_past_recording()
    sentence = r"^this cache records the past of its layers, .* or drop assistant_model\.$"
    with pytest.raises(ValueError, match=sentence):
        target.generate(prompt_of(5), max_new_tokens=4, assistant_model=GarbageDrafter(VOCAB), **{CACHE: cache})
    assert cache.get_seq_length() == 0
    assert all(layer.record_past for layer in cache.layers)


def hooks_of(target) -> list[int]:
    # Whoever asked the target for its states before has left transformers' own there.
    return [len(part._forward_hooks) for part in target.modules()]


def test_a_target_that_counts_positions_its_own_way_is_refused():
    target = deepcopy(tiny_target("llama"))
    prepare, hooks = target.prepare_inputs_for_generation, hooks_of(target)

    def one_further(*args, **kwargs):  # as PaliGemma's does
        inputs = prepare(*args, **kwargs)
        return inputs | {"position_ids": inputs["position_ids"] + 1}

    target.prepare_inputs_for_generation = one_further
    with pytest.raises(ValueError, match=r"^LlamaForCausalLM puts this prompt at other positions than generate\(\)"):
        target.generate(prompt_of(5), max_new_tokens=4, assistant_model=GarbageDrafter(VOCAB, (2,)))
    assert hooks_of(target) == hooks
    # Without positions a forward counts columns, which is the same where there is no padding.
    target.prepare_inputs_for_generation = lambda *args, **kwargs: prepare(*args, **kwargs) | {"position_ids": None}
    output = target.generate(prompt_of(5), max_new_tokens=4, do_sample=False, assistant_model=GarbageDrafter(VOCAB))
    assert torch.equal(output, target.generate(prompt_of(5), max_new_tokens=4, do_sample=False))
    batch = padded_batch((5, 3))
    with pytest.raises(ValueError, match=r"^LlamaForCausalLM puts this prompt at other positions than generate\(\)"):
        target.generate(**batch, max_new_tokens=4, pad_token_id=0, assistant_model=garbage(2))


def test_a_batch_with_an_adapter_for_each_row_is_refused():
    target = deepcopy(tiny_target("llama"))
    model = peft.get_peft_model(target, peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False), "a")
    model.add_adapter("b", peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False))
    model.eval()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    batch = padded_batch((5, 3))
    with pytest.raises(ValueError, match=r"^this call names an adapter for each row of LlamaForCausalLM's batch"):
        model.generate(**batch, **options, adapter_names=["a", "b"], assistant_model=garbage(2))
    for options["adapter_names"] in (["a"], ["b"]):
        plain = model.generate(input_ids=prompt_of(5), **options)
        drafted = model.generate(input_ids=prompt_of(5), **options, assistant_model=GarbageDrafter(VOCAB))
        assert torch.equal(drafted, plain)


def test_guidance_remembers_how_it_was_called():
    target, drafter = tiny_target("llama"), GarbageDrafter(VOCAB)
    drafter.can_sample = True
    for rule in ("token", "block"):
        drafter.drafting_plan = DraftingPlan(4, 1, draft_sampling="sampled", verification=rule)
        sentence = r"^UnbatchedClassifierFreeGuidanceLogitsProcessor may remember how it was called"
        with pytest.raises(ValueError, match=sentence):
            target.generate(prompt_of(5), do_sample=True, guidance_scale=1.5, assistant_model=drafter)
        assert not drafter.states


def test_targets_that_cannot_score_a_tree_are_refused(monkeypatch):
    sizes = {"vocab_size": VOCAB, "d_model": 16, "d_ff": 16, "d_kv": 4, "num_heads": 4, "num_layers": 1}
    encoder_decoder = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    refused_before_any_token(
        encoder_decoder, GarbageDrafter(VOCAB), r"^T5ForConditionalGeneration is an encoder-decoder "
    )
    target = LlamaForCausalLM(LlamaConfig(**llama_sizes()))
    monkeypatch.setattr(LlamaForCausalLM, "_is_stateful", True)
    refused_before_any_token(target, GarbageDrafter(VOCAB), r"^LlamaForCausalLM keeps a recurrent state ")
    monkeypatch.setattr(LlamaForCausalLM, "_is_stateful", False)
    target.config.layer_types, target.config.attention_chunk_size = ["full_attention", "chunked_attention"], 8
    refused_before_any_token(target, GarbageDrafter(VOCAB), r"^LlamaForCausalLM has layers of type chunked_attention,")
    target.config.layer_types = target.config.attention_chunk_size = None
    layers = target.model._modules.pop("layers")
    refused_before_any_token(target, GarbageDrafter(VOCAB), r"does not list its layers as get_decoder\(\)\.layers")
    target.model.layers = layers
    assert target.generate(prompt_of(5), max_new_tokens=4, assistant_model=GarbageDrafter(VOCAB)).shape == (1, 9)


def llama_sizes() -> dict:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "eos_token_id": None,
        "bos_token_id": None,
    }


def test_uninstall_gives_back_the_very_methods():
    ours = [getattr(GenerationMixin, name) for name in HOOKED]
    originals = [method.__wrapped__ for method in ours]
    specblock_hf.install()
    assert [getattr(GenerationMixin, name) for name in HOOKED] == ours  # twice is once
    assert is_installed()
    try:
        specblock_hf.uninstall()
        specblock_hf.uninstall()
        assert [getattr(GenerationMixin, name) for name in HOOKED] == originals
        assert all(method.__module__.startswith("transformers.generation.") for method in originals)
        assert not any("_specblock_hook" in vars(method) for method in originals)
        assert not is_installed()
        specblock_hf.install()
        assert [getattr(GenerationMixin, name).__wrapped__ for name in HOOKED] == originals
    finally:
        specblock_hf.install()


def test_a_wrapper_around_ours_stays(monkeypatch):
    ours = GenerationMixin._assisted_decoding

    @wraps(ours)
    def theirs(*args, **kwargs):
        return ours(*args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "_assisted_decoding", theirs)
    try:
        specblock_hf.uninstall()
        assert GenerationMixin._assisted_decoding is theirs and not is_installed()  # one of the two is gone
    finally:
        specblock_hf.install()
    assert GenerationMixin._assisted_decoding is theirs and is_installed()
    target = tiny_target("llama")
    output = target.generate(prompt_of(7), max_new_tokens=10, assistant_model=oracle(target), **GREEDY)
    assert output[0].tolist() == plain_text(target, 10)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "top_k": 8},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": "llama", "do_sample": True},
        {"assistant_model": "llama", "streamer": True},
        {"assistant_model": "llama", "num_return_sequences": 2, "do_sample": True},
        {"num_beams": 2, "streamer": True},
    ],
)
def test_everything_else_passes_through_untouched(options):
    target = LlamaForCausalLM(LlamaConfig(**llama_sizes())).eval()
    assistant = LlamaForCausalLM(LlamaConfig(**llama_sizes())).eval()
    if "assistant_model" in options:
        options = options | {"assistant_model": assistant}

    def run():
        torch.manual_seed(1)
        streamer = KeepingStreamer() if "streamer" in options else None
        try:
            output = target.generate(prompt_of(9), max_new_tokens=12, **options | {"streamer": streamer})
        except ValueError as error:
            return str(error)
        return output.tolist(), streamer and [put.tolist() for put in streamer.puts]

    hooked = run()
    try:
        specblock_hf.uninstall()
        assert run() == hooked
    finally:
        specblock_hf.install()


def test_trees_are_not_drawn_where_there_is_no_float64(monkeypatch):
    target, drafter = tiny_target("llama"), GarbageDrafter(VOCAB)
    monkeypatch.setattr(TokenTable, "device", torch.device("mps"))
    drafter.drafting_plan = DraftingPlan(4, 1, draft_sampling="sampled")
    assert drafting_plan(target, drafter, GenerationConfig(do_sample=False)) is drafter.drafting_plan
    with pytest.raises(ValueError, match=r"^draft_sampling=\"sampled\" draws from float64, which MPS does not have"):
        drafting_plan(target, drafter, GenerationConfig(do_sample=True))


@pytest.mark.auto_plan
def test_processes_of_a_tensor_parallel_target_read_the_same_trees(monkeypatch):
    target, drafter = deepcopy(tiny_target("llama")), GarbageDrafter(VOCAB)
    options = {"inputs": prompt_of(7), "max_new_tokens": 12, "assistant_model": drafter}
    target.generate(**options)
    assert not drafter.last_statistics.plan.endswith("as given")
    monkeypatch.setattr(target, "_tp_size", 2)
    target.generate(**options)
    assert drafter.last_statistics.plan.endswith("as given")
    drafter.drafting_plan = DraftingPlan(4, 1, draft_sampling="sampled")
    target.generate(**options)
    with pytest.raises(ValueError, match=r"^every process of this tensor-parallel LlamaForCausalLM would draw drafts"):
        target.generate(**options, do_sample=True)
