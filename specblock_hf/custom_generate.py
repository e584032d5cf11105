# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Decoding with a drafter through `generate(custom_generate=...)`, which needs no hook in transformers. A repository that
`push_to_hub` made holds a file that calls this.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, StoppingCriteriaList, StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from .drafting.drafter import TreeDrafter
from .generation.loop import generate_with_drafter
from .generation.requests import check_request


def generate_without_hook(
    target: PreTrainedModel,
    drafter: TreeDrafter,
    *,
    streamer: BaseStreamer | None = None,
    stop_strings: str | list[str] | None = None,
    tokenizer: Any = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    **kwargs: Any,
):
    """
    `target.generate(**kwargs, assistant_model=drafter)` for a process without the hook.

    Args:
        target ([`~transformers.PreTrainedModel`]): The model whose text is wanted.
        drafter ([`TreeDrafter`]): Drafts for it.
        streamer, stop_strings, tokenizer, stopping_criteria (*optional*): As in `generate()`.
        **kwargs: Everything else of `generate()`.

    Raises:
        ValueError: As with the hook, for what cannot be decoded exactly; and for what needs the tokenizer elsewhere.
    """
    configs = [config for config in (kwargs.get("generation_config"), target.generation_config) if config is not None]
    if kwargs.get("token_healing") or any(config.stop_strings or config.token_healing for config in configs):
        raise ValueError(
            "custom_generate hands no tokenizer on, which token_healing and the stop_strings of a generation "
            "configuration need; give stop_strings and tokenizer to the call itself, or import specblock_hf and pass "
            "assistant_model=."
        )
    if stop_strings is not None:
        # A callable `custom_generate` loses the tokenizer, so the criterion is made here.
        stopping_criteria = StoppingCriteriaList(stopping_criteria or [])
        stopping_criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=stop_strings))

    # A callable is not told what `generate()` works out where the call does not say it (FSDP, DeepSpeed).
    asked = target._extract_generation_mode_kwargs(None, {}, kwargs.get("synced_gpus"), None, None)

    def decode(model: PreTrainedModel, input_ids: torch.LongTensor, *, generation_config, **inputs: Any):
        check_request(model, drafter, generation_config.get_generation_mode(drafter), generation_config, asked)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        return generate_with_drafter(
            model, drafter, input_ids, generation_config=generation_config, streamer=streamer, **inputs
        )

    return target.generate(custom_generate=decode, stopping_criteria=stopping_criteria, **kwargs)
