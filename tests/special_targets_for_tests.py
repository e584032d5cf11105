# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What becomes of targets with a speciality, for one prompt and for a padded batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from batches_for_tests import padded_batch
from hybrids_for_tests import BATCHED, CORE, hybrid_target
from multimodal_for_tests import MULTIMODAL, multimodal_target, prompts_with_images
from options_for_tests import EXACT, ONE, SEVERAL, refusal, same_text
from targets_for_tests import LIMIT, MOE_FAMILIES, OFFLOADED, TargetKind, make_target


Outcome = tuple[str, str]


def exact(*kinds: TargetKind) -> Outcome:
    for kind in kinds:
        for lengths in (ONE, SEVERAL):
            same_text(make_target(kind), padded_batch(lengths), dict)
    return EXACT, EXACT


def refused(kind: TargetKind) -> Outcome:
    return tuple(refusal(make_target(kind), padded_batch(lengths), dict) for lengths in (ONE, SEVERAL))


def multimodal() -> Outcome:
    for kind in MULTIMODAL:
        for lengths in (ONE, SEVERAL):
            same_text(multimodal_target(kind), padded_batch(lengths), dict)
            for images in (1, 2):
                batch = prompts_with_images(kind, lengths, images=images)
                other = prompts_with_images(kind, lengths, images=images, image_seed=9)
                text = same_text(multimodal_target(kind), batch, dict)
                assert not torch.equal(same_text(multimodal_target(kind), other, dict), text)
    return EXACT, EXACT


def recurrent() -> Outcome:
    for family in CORE:
        for lengths in (ONE, SEVERAL) if family in BATCHED else (ONE,):
            same_text(hybrid_target(family), padded_batch(lengths), dict)
    return "exact; verifies chains", "the same"


def router_logits() -> Outcome:
    for family in MOE_FAMILIES:
        same_text(make_target(TargetKind(family, flag="output_router_logits")), padded_batch(ONE), dict)
    return EXACT, "works, where plain decoding fails"


def longrope() -> Outcome:
    target = make_target(TargetKind(rope="longrope"))
    for length in (LIMIT - 3, LIMIT + 5):
        same_text(target, padded_batch((length,)), dict)
    same_text(target, padded_batch((LIMIT + 5, LIMIT + 1)), dict)
    said = refusal(target, padded_batch(SEVERAL), dict)
    return EXACT, f"exact on either side of the length; across it: {said}"


def dynamic_rope() -> Outcome:
    kind = TargetKind(rope="dynamic")
    same_text(make_target(kind), padded_batch((LIMIT - 3,)), dict)
    same_text(make_target(kind), padded_batch((5, 3)), lambda: {"max_new_tokens": 8})
    said = refusal(make_target(kind), padded_batch(SEVERAL), dict)
    return "exact; without drafts beyond the length", f"exact within the length; otherwise: {said}"


SPECIAL: dict[str, Callable[[], Outcome]] = {
    "LLaVA, Gemma 3, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5: text, one or two pictures in each prompt": multimodal,
    "Qwen3.5, Qwen3-Next, LFM2, Falcon-H1, Bamba, Granite 4, Nemotron-H (recurrent layers)": recurrent,
    "Jamba (recurrent layers that do not go on from a state)": lambda: refused(TargetKind("jamba")),
    "`output_router_logits` in the configuration (Mixtral, Qwen3 MoE, OLMoE)": router_logits,
    "weights kept elsewhere by accelerate: `cpu_offload`, `disk_offload`, `dispatch_model`": lambda: exact(
        *(TargetKind(wrap=offload) for offload in OFFLOADED)
    ),
    "a `forward` wrapped in `*args, **kwargs`": lambda: exact(TargetKind(wrap="wrapped forward")),
    "adapters of weights on some layers (adaption prompt)": lambda: exact(TargetKind(wrap="adaption prompt")),
    "prompt tuning, p-tuning, prefix tuning (here: prompt tuning)": lambda: refused(TargetKind(wrap="prompt tuning")),
    "`train()` with dropout": lambda: refused(TargetKind(mode="dropout")),
    'RoPE of type "longrope", over its original length': longrope,
    'RoPE of type "dynamic", over its length': dynamic_rope,
}
