# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""`generate()` with every kind of drafter on every device that is there, with every attention."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

from specblock_hf import DraftingPlan
from specblock_hf.drafters.common.registry import trainable_drafters
from specblock_hf.drafting.drafter import TreeDrafter
from specblock_hf.evaluation.divergence import divergence_between


GPU = torch.cuda.is_available()
DEVICES = ["cpu", *(["cuda"] if GPU else [])]
# The other tests run on the CPU: here it only shows that these would fail. Flex attention wants heads of 16 or more.
PLACES = [("cpu", "sdpa"), *[("cuda", attention) for attention in ("sdpa", "eager", "flex_attention") if GPU]]
DRAFTERS = sorted(trainable_drafters()) if GPU else ["specblock"]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
CONFIGS = {"llama": LlamaConfig, "qwen3": Qwen3Config}
PLAN = DraftingPlan(20, 2, 4)


@cache
def target_on(device: str, attention: str, kind: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(CONFIGS[kind](**SIZES), attn_implementation=attention, dtype=dtype)
    return target.eval().to(device)


def drafter_for(target: PreTrainedModel, kind: str) -> TreeDrafter:
    """A random drafter, of whose many guesses a few are right."""
    made, fields = trainable_drafters()[kind]
    torch.manual_seed(1)
    drafter = made(made.config_class.for_target(target.config, **fields)).to(target.device, target.dtype).eval()
    if kind not in ("dflash", "jetspec"):
        drafter.set_draft_vocabulary(torch.arange(SIZES["vocab_size"]))
    drafter.drafting_plan = PLAN
    return drafter


def prompts(device: str, lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random prompts, padded on the left."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(SIZES["vocab_size"], (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths).unsqueeze(1)
    return {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("place", PLACES, ids="-".join)
def test_greedy_text_is_the_plain_one(place, drafter):
    target = target_on(*place, "llama", torch.float32)
    for lengths in ((9,), (4, 12, 7)):
        inputs = prompts(place[0], lengths)
        plain = target.generate(**inputs, do_sample=False, max_new_tokens=24)
        made = drafter_for(target, drafter)
        drafted = target.generate(**inputs, assistant_model=made, do_sample=False, max_new_tokens=24)
        assert drafted.tolist() == plain.tolist()
        assert drafted.device.type == place[0] and sum(made.last_statistics.accepted) > 0


@pytest.mark.parametrize("place", PLACES, ids="-".join)
def test_a_seed_gives_the_tokens_of_plain_sampling(place):
    target = target_on(*place, "qwen3", torch.float32)
    inputs = prompts(place[0], (9,))
    drafter = drafter_for(target, "specblock")
    for seed in range(3):
        texts = []
        for helper in (None, drafter):
            torch.manual_seed(seed)
            output = target.generate(**inputs, assistant_model=helper, do_sample=True, top_p=0.9, max_new_tokens=24)
            texts.append(output.tolist())
        assert texts[0] == texts[1]


@pytest.mark.parametrize("place", PLACES, ids="-".join)
def test_in_bfloat16_only_ties_differ(place):
    target = target_on(*place, "llama", torch.bfloat16)
    for kind in ("specblock", "eagle3"):
        drafter = drafter_for(target, kind)
        inputs = prompts(place[0], (9,))
        options = {"do_sample": False, "max_new_tokens": 24}
        plain = target.generate(**inputs, **options)
        drafted = target.generate(**inputs, assistant_model=drafter, **options)
        divergence = divergence_between(target, inputs["input_ids"], plain, drafted, **options)
        # The logits are about 10: bfloat16 tells them apart by 0.06.
        assert divergence is None or divergence.margin < 0.25


@pytest.mark.parametrize("device", DEVICES)
def test_static_cache(device):
    target = target_on(device, "sdpa", "qwen3", torch.float32)
    inputs = prompts(device, (9,))
    options = {"do_sample": False, "max_new_tokens": 24, "cache_implementation": "static", "disable_compile": True}
    plain = target.generate(**inputs, **options)
    drafted = target.generate(**inputs, assistant_model=drafter_for(target, "specblock"), **options)
    assert drafted.tolist() == plain.tolist()
