# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Where a drafted answer leaves the plain one, and how close the call was there.

In fp32 the two are the same. In bf16 the target's kernels round differently for a tree than for one token, and two
tokens whose logits nearly tie can change places; a small margin at the first divergence is the sign of that, a large
one the sign of a bug.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from ..drafting.drafter import TreeDrafter


@dataclass(frozen=True)
class Divergence:
    """
    The first difference between a plain and a drafted answer.

    Args:
        position (`int`): Index of the first differing new token; 0 is the first one after the prompt.
        plain_token (`int`, *optional*): The token there without the drafter; `None` if that answer had ended.
        drafted_token (`int`, *optional*): The token there with the drafter; `None` if that answer had ended.
        margin (`float`, *optional*):
            Difference of the two largest scores that plain decoding chose from there, in logits after every processor;
            `None` if it had ended.
    """

    position: int
    plain_token: int | None
    drafted_token: int | None
    margin: float | None


class _Margins(LogitsProcessor):
    """Keeps the top-2 margin of every step and leaves the scores alone."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        best, second = scores[0].float().topk(2).values.tolist()
        self.values.append(best - second)
        return scores


def first_divergence(
    target: PreTrainedModel, drafter: TreeDrafter, prompt_ids: torch.LongTensor, *, seed: int = 0, **generate_kwargs
) -> Divergence | None:
    """
    Generate without and with a drafter and compare.

    Args:
        target ([`~transformers.PreTrainedModel`]): The model.
        drafter ([`TreeDrafter`]): The drafter.
        prompt_ids (`torch.LongTensor` of shape `[1, T]`): One prompt.
        seed (`int`, *optional*, defaults to 0): Both runs start from this seed; it matters only for sampling.
        **generate_kwargs: For both `generate()` calls, such as `max_new_tokens`.

    Returns:
        [`Divergence`] or `None`: `None` if both answers are the same, token for token.

    Raises:
        ValueError: More than one prompt.
    """
    if prompt_ids.shape[0] != 1:
        raise ValueError(f"first_divergence compares one prompt, not {prompt_ids.shape[0]}; call it once per row.")
    plain = _generate(target, prompt_ids, seed, generate_kwargs)
    drafted = _generate(target, prompt_ids, seed, generate_kwargs | {"assistant_model": drafter})
    return divergence_between(target, prompt_ids, plain, drafted, seed=seed, **generate_kwargs)


def divergence_between(
    target: PreTrainedModel,
    prompt_ids: torch.LongTensor,
    plain: torch.LongTensor,
    drafted: torch.LongTensor,
    *,
    seed: int = 0,
    **generate_kwargs,
) -> Divergence | None:
    """
    Compare two answers that exist already; only if they differ, plain decoding is repeated up to the difference.

    Args:
        target ([`~transformers.PreTrainedModel`]): The model.
        prompt_ids (`torch.LongTensor` of shape `[1, T]`): The prompt of both.
        plain (`torch.LongTensor` of shape `[1, T + n]`): What `generate()` returned without the drafter.
        drafted (`torch.LongTensor` of shape `[1, T + m]`): What it returned with the drafter.
        seed (`int`, *optional*, defaults to 0): The seed of both; it matters only for sampling.
        **generate_kwargs: The arguments of both `generate()` calls.

    Returns:
        [`Divergence`] or `None`: `None` if both answers are the same, token for token.
    """
    prompt = prompt_ids.shape[1]
    left, right = plain[0, prompt:].tolist(), drafted[0, prompt:].tolist()
    position = first_difference(left, right)
    if position is None:
        return None
    margin = None
    if position < len(left):
        margin = plain_margins(target, prompt_ids, position + 1, seed=seed, **generate_kwargs)[position]
    return Divergence(
        position=position,
        plain_token=left[position] if position < len(left) else None,
        drafted_token=right[position] if position < len(right) else None,
        margin=margin,
    )


def first_difference(plain: Sequence[int], drafted: Sequence[int]) -> int | None:
    """Where two answers first differ, one that ends earlier included; `None` if they are the same."""
    shared = zip(plain, drafted, strict=False)
    position = next((i for i, (a, b) in enumerate(shared) if a != b), min(len(plain), len(drafted)))
    return None if position == max(len(plain), len(drafted)) else position


def plain_margins(
    target: PreTrainedModel, prompt_ids: torch.LongTensor, count: int, *, seed: int = 0, **generate_kwargs
) -> list[float]:
    """
    Repeat plain decoding and tell how close every choice was.

    Args:
        target ([`~transformers.PreTrainedModel`]): The model.
        prompt_ids (`torch.LongTensor` of shape `[1, T]`): The prompt.
        count (`int`): New tokens to repeat.
        seed (`int`, *optional*, defaults to 0): That of the answer; it matters only for sampling.
        **generate_kwargs: The other arguments of the `generate()` call.

    Returns:
        `list[float]`: For each new token, the difference of the two largest scores that it was chosen from.
    """
    margins = _Margins()
    processors = LogitsProcessorList([*generate_kwargs.get("logits_processor", []), margins])
    _generate(target, prompt_ids, seed, generate_kwargs | {"max_new_tokens": count, "logits_processor": processors})
    return margins.values


def _generate(target: PreTrainedModel, prompt_ids: torch.LongTensor, seed: int, kwargs: dict) -> torch.LongTensor:
    """One seeded `generate()` call that leaves the caller's random state alone."""
    devices = [target.device] if target.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        defaults = {"attention_mask": torch.ones_like(prompt_ids)}
        return target.generate(prompt_ids, **(defaults | kwargs | {"return_dict_in_generate": False}))
