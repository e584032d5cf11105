# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What a call of `generate()` asks for, and what of it cannot be had with a drafter."""

from __future__ import annotations

from typing import Any, Literal

from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMode

from ..drafting.drafter import TreeDrafter
from ..drafting.pairs import TokenTable
from ..drafting.plan import DraftingPlan
from ..target.support import check_attentions, check_target


# Sources of drafts that `generate()` has itself, and its lossy verification. Together with a drafter they would be
# ignored.
RIVAL_OPTIONS = (
    "assistant_early_exit",
    "assistant_ensemble_weight",
    "prompt_lookup_num_tokens",
    "speculation_type",
    "use_mtp",
)


def drafting_plan(
    target: PreTrainedModel, drafter: TreeDrafter, generation_config: GenerationConfig
) -> DraftingPlan | Literal["auto"]:
    """
    How much the rounds of a call draft: what the call's `generation_config.drafting_plan` says, otherwise what the
    drafter was given, which is `"auto"` if it was given nothing and its default for the device if it was given `None`.

    Raises:
        ValueError: It is something else, or draws where that cannot be.
    """
    device = TokenTable.of(target).device
    # A field of ours, which a configuration has only where somebody set it.
    plan = vars(generation_config).get("drafting_plan") or drafter.drafting_plan or drafter.default_plan(device)
    if plan != "auto" and not isinstance(plan, DraftingPlan):
        raise ValueError(f'drafting_plan={plan!r} is no plan; give a DraftingPlan, "auto", or None for the default.')
    drawn = generation_config.do_sample and plan != "auto" and plan.draft_sampling != "topk"
    if drawn and device.type == "mps":
        raise ValueError(
            'draft_sampling="sampled" draws from float64, which MPS does not have; leave it out, or run the target on '
            "another device."
        )
    if (target.tp_size or 1) > 1:
        # Its processes have to read the same trees, and each of them measures other times and draws other drafts.
        if drawn:
            raise ValueError(
                f"every process of this tensor-parallel {type(target).__name__} would draw drafts of its own; leave "
                "draft_sampling out."
            )
        return drafter.default_plan(device) if plan == "auto" else plan
    return plan


def check_request(
    target: PreTrainedModel,
    drafter: TreeDrafter,
    mode: GenerationMode,
    generation_config: GenerationConfig,
    mode_kwargs: dict[str, Any],
) -> None:
    """
    Refuse what cannot be decoded exactly with a drafter, before any work.

    Raises:
        ValueError: In one sentence: what, why and what to do.
    """
    check_target(target)
    drafter.check_target(target)
    if mode != GenerationMode.ASSISTED_GENERATION:
        raise ValueError(
            "a tree drafter speeds up greedy decoding and sampling and this call asks for "
            f"{mode.value.replace('_', ' ')}; set num_beams=1 and leave out penalty_alpha, dola_layers and "
            "constraints, or drop assistant_model."
        )
    rivals = [option for option in RIVAL_OPTIONS if getattr(generation_config, option)]
    if rivals:
        raise ValueError(
            f"{rivals[0]} would be ignored next to a tree drafter; set it to None, or drop assistant_model."
        )
    plan = drafting_plan(target, drafter, generation_config)
    if generation_config.do_sample and plan != "auto" and plan.draft_sampling != "topk" and not drafter.can_sample:
        raise ValueError(
            f"{drafter.label} drafts the likeliest tokens only and the drafting plan asks for drawn ones; leave out "
            f"draft_sampling={plan.draft_sampling!r}."
        )
    if generation_config.output_attentions:
        check_attentions(target)
    if generation_config.use_cache is False:
        raise ValueError(
            "draft trees are verified against the target's cache, which this call or the target's configuration turns "
            "off; pass use_cache=True."
        )
    if generation_config.cache_implementation not in (None, "dynamic", "static"):
        raise ValueError(
            f"cache_implementation={generation_config.cache_implementation!r} keeps rows that a draft tree cannot "
            'rearrange; leave it out or pass "dynamic" or "static".'
        )
    if mode_kwargs.get("synced_gpus"):
        raise ValueError(
            "synced_gpus needs the same number of forwards on every device and rounds of a tree drafter differ; drop "
            "assistant_model."
        )
