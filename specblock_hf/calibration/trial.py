# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether drafting pays, tried: the same greedy answers by plain `generate()` and by every plan, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel

from ..devices import timed
from ..drafting.attachment import set_aside
from ..drafting.drafter import TreeDrafter
from ..drafting.pairs import TokenTable
from ..drafting.plan import DraftingPlan
from ..generation.compilation import keeping


TRIAL_TOKENS = 48
"""Of each answer: enough for the prompt not to weigh too much, and for rows of a batch to drift apart."""

REPEATS = 2
"""Times that every answer is made; the first time warms up."""

Batch = Mapping[str, torch.LongTensor]


def batches_of(prompts: Sequence[torch.LongTensor], size: int, pad: int) -> list[Batch]:
    """
    Prompts in batches, padded on the left; what fills none is left out.

    Args:
        prompts (sequence of `torch.LongTensor` of shape `[1, T]`): On one device.
        size (`int`): Rows of a batch.
        pad (`int`): The id to pad with.

    Raises:
        ValueError: There are fewer prompts than rows.
    """
    if len(prompts) < size:
        raise ValueError(f"{len(prompts)} prompt(s) fill no batch of {size}; give at least {size}.")
    return [padded(prompts[first : first + size], pad) for first in range(0, len(prompts) - size + 1, size)]


def padded(prompts: Sequence[torch.LongTensor], pad: int) -> Batch:
    """Prompts `[1, T]` as one batch, padded on the left."""
    width = max(ids.shape[1] for ids in prompts)

    def stacked(rows: Sequence[torch.LongTensor], value: int) -> torch.LongTensor:
        return torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0), value=value) for row in rows])

    return {
        "input_ids": stacked(prompts, pad),
        "attention_mask": stacked([torch.ones_like(ids) for ids in prompts], 0),
    }


def answers(ids: torch.LongTensor, eos: int | Sequence[int] | None) -> list[list[int]]:
    """Each row's new tokens `[B, n]` to its end, without what fills it up behind that."""
    ends = {eos} if isinstance(eos, int) else set(eos or ())
    rows = []
    for row in ids.tolist():
        places = [place for place, token in enumerate(row) if token in ends]
        rows.append(row[: places[0] + 1] if places else row)
    return rows


def try_plans(
    target: PreTrainedModel,
    drafter: TreeDrafter,
    plans: Sequence[DraftingPlan],
    prompts: Sequence[torch.LongTensor],
    batch_size: int = 1,
    progress: bool = False,
    cache_implementation: str | None = None,
) -> list[float]:
    """
    Each plan's tokens per second over those of plain `generate()`. A batch is answered by all of them before the next
    one is begun, in turns forwards and backwards; of the times of an answer the shortest counts, because a busy
    machine only ever adds to it.

    Args:
        target ([`~transformers.PreTrainedModel`]): The target, where and as it will run.
        drafter ([`TreeDrafter`]): Its own plan is not changed.
        plans (sequence of [`DraftingPlan`]): What to try.
        prompts (sequence of `torch.LongTensor` of shape `[1, T]`): At least one batch of them.
        batch_size (`int`, *optional*, defaults to 1): Texts that are decoded together.
        progress (`bool`, *optional*, defaults to `False`): Show a bar on the standard error stream.
        cache_implementation (`str`, *optional*): Of all calls. Defaults to what the target's `generation_config` says.

    Raises:
        ValueError: There are fewer prompts than rows in a batch.
    """
    settings = deepcopy(target.generation_config)
    settings.update(do_sample=False, num_beams=1, max_new_tokens=TRIAL_TOKENS, return_dict_in_generate=False)
    settings.cache_implementation = cache_implementation or settings.cache_implementation
    if settings.pad_token_id is None:
        settings.pad_token_id = 0
    sides: list[DraftingPlan | None] = [None, *plans]
    tokens, seconds = [0] * len(sides), [0.0] * len(sides)
    device = TokenTable.of(target).device
    batches = batches_of([ids.to(device) for ids in prompts], batch_size, settings.pad_token_id)
    # Otherwise drafts would be captured anew in every call, and the time for it be theirs.
    with keeping(drafter, device, len(plans)), set_aside(target):
        for batch in tqdm(batches, desc=f"trying plans of {drafter.label}", unit="batch", disable=not progress):
            spent: list[list[float]] = [[] for _ in sides]
            made = [0] * len(sides)
            for repeat in range(REPEATS):
                for side in range(len(sides))[:: -1 if repeat % 2 else 1]:
                    took, made[side] = _answer(target, drafter, sides[side], batch, settings)
                    spent[side].append(took)
            tokens = [total + new for total, new in zip(tokens, made, strict=True)]
            seconds = [total + min(times) for total, times in zip(seconds, spent, strict=True)]
    plain, *speeds = (made / took for made, took in zip(tokens, seconds, strict=True))
    return [speed / plain for speed in speeds]


def _answer(
    target: PreTrainedModel, drafter: TreeDrafter, plan: DraftingPlan | None, batch: Batch, settings: GenerationConfig
) -> tuple[float, int]:
    """Seconds of a call and the tokens that it emitted; plain without a plan."""
    config, helper = deepcopy(settings), None
    if plan is not None:
        config.drafting_plan, helper = plan, drafter
    options = {**batch, "generation_config": config, "assistant_model": helper}
    output, took = timed(batch["input_ids"].device, lambda: target.generate(**options))
    return took, sum(map(len, answers(output.cpu()[:, batch["input_ids"].shape[1] :], config.eos_token_id)))
