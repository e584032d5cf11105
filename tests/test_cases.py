# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Kinds of faults that users of this and of other libraries have met, one test for each, which tells what happens now:
`pytest tests -k cases -s`. Each kind has more members, in the tests of the part that it concerns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import pytest
import torch
from batches_for_tests import garbage, padded_batch
from conftest import SIZES, prompt_of, tiny_target
from fresh_import_for_tests import imported_afresh
from interruptions_for_tests import Broken, Ended, Listener
from multimodal_for_tests import MULTIMODAL, multimodal_target, prompts_with_images
from options_for_tests import BASE, refusal, same_text
from targets_for_tests import LIMIT, MOE_FAMILIES, OFFLOADED, ROPES, TargetKind, forget_the_past, make_target
from transformers import AutoModelForCausalLM, DynamicCache, Phi3Config

from specblock_hf import SpecBlockConfig, SpecBlockDrafter
from specblock_hf.compat import CACHE


def case(number: int, fault: str) -> Callable[[Callable[..., str]], Callable[..., None]]:
    """
    Makes a test of a function that checks what happens now and returns it as the end of the printed line.

    Args:
        number (`int`): Of the case.
        fault (`str`): What once went wrong.
    """

    def decorate(check: Callable[..., str]) -> Callable[..., None]:
        @wraps(check)
        def test(*args, **kwargs) -> None:
            print(f"\n{number:2d}. {fault}: {check(*args, **kwargs)}", end="")

        return test

    return decorate


# Targets: 1 to 8.


@case(1, "a call that is broken off")
def test_a_cache_after_a_call_that_was_broken_off() -> str:
    emitted = {}
    for kind in ("llama", "gemma3"):
        target, prompt = tiny_target(kind), prompt_of(11)
        cache, listener = DynamicCache(config=target.config), Listener(Ended(Broken, 9))
        with pytest.raises(Broken):
            target.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                streamer=listener,
                assistant_model=garbage(1),
                **BASE | {CACHE: cache, "eos_token_id": None},
            )
        ids = torch.cat((prompt, torch.tensor([listener.tokens]), prompt_of(4, seed=1)), dim=1)
        options = BASE | {"attention_mask": torch.ones_like(ids)}
        plain = target.generate(ids, **options)
        assert torch.equal(target.generate(ids, **options, **{CACHE: cache}, assistant_model=garbage(1)), plain)
        emitted[kind] = len(listener.tokens)
    return f"after {emitted['llama']} tokens the next turn with the same cache writes plain decoding's text"


@case(2, "columns that are not the prompt's")
def test_a_prompt_that_adds_other_columns() -> str:
    said = refusal(make_target(TargetKind(wrap="prompt tuning")), padded_batch((9,)), dict)
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 10000.0} | ROPES["longrope"]
    config = Phi3Config(**SIZES, original_max_position_embeddings=LIMIT, rope_parameters=rope)
    same_text(AutoModelForCausalLM.from_config(config).eval(), padded_batch((100,)), dict)
    return f"Phi-3 beyond its original length writes plain decoding's text; prompt tuning: {said}"


@case(3, "rows of a forward that depend on each other")
def test_rows_that_depend_on_each_other() -> str:
    for rope in ("dynamic", "longrope"):
        kind = TargetKind(rope=rope)
        for length in (LIMIT - 7, LIMIT - 2, LIMIT + 20):
            batch, texts = padded_batch((length,)), []
            for drafter in (None, garbage(1)):
                forget_the_past(kind, make_target(kind))
                texts.append(make_target(kind).generate(**batch, **BASE, assistant_model=drafter))
            assert torch.equal(*texts)
    said = refusal(make_target(TargetKind(mode="dropout")), padded_batch((9,)), dict)
    return f"dynamic RoPE and longrope write plain decoding's text across their length; dropout: {said}"


@case(4, "what transformers adds to a multimodal call")
def test_multimodal_targets() -> str:
    for kind in MULTIMODAL:
        target = multimodal_target(kind)
        same_text(target, padded_batch((7,)), dict)
        plain = same_text(target, prompts_with_images(kind, (7,)), dict)
        drafter = SpecBlockDrafter(SpecBlockConfig.for_target(target.config, feature_layers=[0, 1, 2])).eval()
        chunks = BASE | {"prefill_chunk_size": 3, "assistant_model": drafter}
        assert torch.equal(target.generate(**prompts_with_images(kind, (7,)), **chunks), plain)
    return f"{', '.join(MULTIMODAL)}: text, a picture, and a picture with prefill_chunk_size are exact"


@case(5, "training flags in a saved configuration")
def test_training_flags() -> str:
    for family in MOE_FAMILIES:
        same_text(make_target(TargetKind(family, flag="output_router_logits")), padded_batch((7,)), dict)
    for flag in ("output_hidden_states", "output_attentions", "use_cache"):
        same_text(make_target(TargetKind(attention="eager", flag=flag)), padded_batch((7,)), dict)
    return f"{', '.join(MOE_FAMILIES)} with output_router_logits and Llama with three others are exact"


@case(6, "weights that are elsewhere between forwards")
def test_offloaded_weights() -> str:
    for offload in OFFLOADED:
        target = make_target(TargetKind(wrap=offload))
        plain = same_text(target, padded_batch((7,)), dict)
        drafter = SpecBlockDrafter(SpecBlockConfig.for_target(target.config, feature_layers=[0, 1, 2])).eval()
        assert torch.equal(target.generate(**padded_batch((7,)), **BASE, assistant_model=drafter), plain)
    return f"{', '.join(OFFLOADED)}: exact"


@case(7, "ids of int32, no ids")
def test_other_ids() -> str:
    batch = padded_batch((7,))
    same_text(tiny_target("llama"), batch | {"input_ids": batch["input_ids"].int()}, dict)
    empty = torch.ones(1, 0, dtype=torch.long)
    said = refusal(tiny_target("llama"), {"input_ids": empty, "attention_mask": empty}, dict)
    return f"int32 is exact; an empty prompt: {said}"


@case(8, "a wrapped forward, a package imported afresh")
def test_wrapped_and_imported_afresh() -> str:
    same_text(make_target(TargetKind(wrap="wrapped forward")), padded_batch((7,)), dict)
    target = tiny_target("llama")
    plain = target.generate(**padded_batch((7,)), **BASE)
    old = SpecBlockDrafter(SpecBlockConfig.for_target(target.config)).eval()
    with imported_afresh() as package:
        new = package.SpecBlockDrafter(package.SpecBlockConfig.for_target(target.config)).eval()
        assert not isinstance(new, SpecBlockDrafter)
        for drafter in (old, new):
            assert torch.equal(target.generate(**padded_batch((7,)), **BASE, assistant_model=drafter), plain)
    return "both are exact, with drafters of the old package and of the new one"


# Drafters: 9 to 11, 14, 15, 17.


# Adaptation: 12, 13, 16, 18.


# Checkpoints: 19 to 23.
