# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What may be refused: how each sentence begins or goes on, and what must have been drawn for it to be true."""

from __future__ import annotations

from collections.abc import Callable

from cases_for_tests import SLIDING, Case
from targets_for_tests import LIMIT

from specblock_hf import DraftingPlan


CAN_SAMPLE = ("specblock", "best first", "dflash", "jetspec", "third party")


def _static(case: Case) -> bool:
    return "static" in (case.cache, case.options.get("cache_implementation"))


def _rows(case: Case) -> int:
    return len(case.lengths) * case.options.get("num_return_sequences", 1)


def _draws(case: Case) -> bool:
    """The plan asks for drawn tokens."""
    fields = case.plan.fields if case.plan else {}
    return case.options["do_sample"] and fields.get("draft_sampling", "topk") != "topk"


def _aborted_by(*names: str) -> Callable[[Case], bool]:
    return lambda case: len(case.lengths) > 1 and case.abort is not None and case.abort.by in names


def _of_family(*names: str) -> Callable[[Case], bool]:
    return lambda case: case.target.family in names


def _drops_out(case: Case) -> bool:
    return case.target.mode == "dropout" or (case.target.mode == "train" and case.target.wrap == "lora")


def _may_pass_the_limit(case: Case) -> bool:
    """Texts may grow over the length at which the RoPE of a whole batch changes."""
    more = case.turns * (case.options["max_new_tokens"] + case.more) if case.target.depends_on_the_past else 0
    return case.target.depends_on_the_past and len(case.lengths) > 1 and max(case.lengths) + more > LIMIT


REFUSALS: dict[str, Callable[[Case], bool]] = {
    "draft trees are verified against the target's cache": lambda case: (
        case.options.get("use_cache") is False or case.target.flag == "use_cache"
    ),
    "a tree drafter speeds up greedy decoding": lambda case: "num_beams" in case.options,
    "prompt_lookup_num_tokens would be ignored": lambda case: "prompt_lookup_num_tokens" in case.options,
    "cache_implementation='offloaded'": lambda case: case.options.get("cache_implementation") == "offloaded",
    "this StaticCache has layers that slide": lambda case: _static(case) and case.target.family in SLIDING,
    "the rows of a batch end at different rounds": lambda case: (
        _static(case) and _rows(case) > 1 and bool(case.cache or case.returns)
    ),
    "drafts the likeliest tokens only": lambda case: _draws(case) and case.drafter.name not in CAN_SAMPLE,
    "may remember how it was called, and comparing distributions": lambda case: (
        _draws(case) and DraftingPlan(**case.plan.fields).rule != "walk"
    ),
    # Where no mask is given, transformers takes the padding token for padding wherever it stands.
    "attention_mask hides the last token of a prompt": lambda case: case.mask in ("right", "absent"),
    "the prompt is empty": lambda case: case.source == "empty",
    "a streamer takes the tokens of one prompt": _aborted_by("streamer"),
    "may look at a whole batch at once": _aborted_by("criterion", "processor"),
    "without eos_token_id plain decoding lets rows": lambda case: (
        len(case.lengths) > 1 and "max_time" in case.options and case.options["eos_token_id"] is None
    ),
    "This drafter reads hidden state": lambda case: (
        case.drafter.layers == "unrecorded" and case.drafter.name in ("specblock", "best first")
    ),
    "adds its Boolean masks to the attention scores": lambda case: (
        case.target.family == "falcon" and case.target.attention == "sdpa" and "output_attentions" in case.returns
    ),
    "takes no position_ids or no cache": _of_family("bloom", "llama4"),
    "keeps a recurrent state": _of_family("mamba", "jamba"),
    "the recurrent states of a batch lie at different tokens": lambda case: (
        _static(case) and _rows(case) > 1 and case.target.is_recurrent
    ),
    "has the tokens of a picture see each other": lambda case: (
        case.source == "image" and case.target.family == "gemma3 with images" and "prefill_chunk_size" in case.options
    ),
    "read padding alone, which its recurrent layers take for a token": lambda case: (
        case.source == "image"
        and case.target.is_recurrent
        and case.options.get("prefill_chunk_size") == 1
        and len(set(case.lengths)) > 1
    ),
    "is in training mode and leaves out values at random": _drops_out,
    "do not describe one draft vocabulary": lambda case: case.drafter.detail.startswith("d2t"),
    "holds values that are infinite, absurdly large or not numbers": lambda case: (
        case.drafter.sent == "saved" and case.drafter.detail in ("nan", "all nan", "inf", "huge")
    ),
    "puts columns of its own before the prompt": lambda case: (
        case.target.wrap in ("prompt tuning", "prefix tuning", "p-tuning")
    ),
    "change for a whole batch when its longest text is over": _may_pass_the_limit,
}


def is_warranted(sentence: str, case: Case) -> bool:
    """Whether one of the reasons above is what a sentence says and holds for a case."""
    return any(part in sentence and holds(case) for part, holds in REFUSALS.items())
