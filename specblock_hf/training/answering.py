# Copyright 2026 The specblock_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Answering many prompts at once: left-padded batches of similar length, from which finished rows are dropped."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel


DROP_SHARE = 0.25  # of a batch's rows must have finished before they are dropped, because that copies the cache


@dataclass(frozen=True)
class Prompt:
    """
    A prompt that waits for its answer.

    Args:
        given (`str` or `list[dict[str, str]]`): The text or the messages, as they will be written beside the answer.
        source (`str`): Where it comes from.
        key (`str`): Digest of the messages.
        input_ids (`tuple[int, ...]`): What the target reads.
        temperature (`float`): 0 for a greedy answer.
    """

    given: str | list[dict[str, str]]
    source: str
    key: str
    input_ids: tuple[int, ...]
    temperature: float


def batches_of(
    prompts: Sequence[Prompt], batch_size: int, batch_tokens: int, max_new_tokens: int, seed: int = 0
) -> list[list[Prompt]]:
    """
    Batches of one temperature and similar length, in random order, so that a run that is stopped early leaves a fair
    sample and its speed so far tells the time left.

    Args:
        prompts (`Sequence[Prompt]`): All of them.
        batch_size (`int`): Most prompts of a batch.
        batch_tokens (`int`): Most tokens of a batch's cache, padding and answers included; a prompt that alone needs
            more still gets its answer.
        max_new_tokens (`int`): Longest answer.
        seed (`int`, *optional*, defaults to 0): Of the order.
    """
    batches: list[list[Prompt]] = []
    for prompt in sorted(prompts, key=lambda p: (p.temperature, len(p.input_ids), p.key)):
        batch = batches[-1] if batches else []
        needed = (len(batch) + 1) * (len(prompt.input_ids) + max_new_tokens)
        fits = batch and batch[0].temperature == prompt.temperature and len(batch) < batch_size
        if fits and needed <= batch_tokens:
            batch.append(prompt)
        else:
            batches.append([prompt])
    random.Random(seed).shuffle(batches)
    return batches


@torch.no_grad()
def answer_batch(
    target: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: set[int],
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """
    Answers from the target's bare law: no processor of its generation configuration takes part.

    Args:
        target ([`~transformers.PreTrainedModel`]): A decoder-only model.
        prompts (sequence of sequences of `int`): Token ids of B prompts.
        max_new_tokens (`int`): Longest answer.
        stop_ids (`set[int]`): Tokens that end an answer; they are part of it.
        temperature (`float`, *optional*, defaults to 0.0): 0 takes the likeliest token.
        generator (`torch.Generator`, *optional*): Draws the tokens; on the target's device.

    Returns:
        `list[list[int]]`: Of every prompt the answer's tokens.
    """
    inputs, mask = (tensor.to(target.device) for tensor in _left_padded(prompts))
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache = DynamicCache(config=target.config.get_text_config(decoder=True))
    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # the prompt that each row of the batch answers

    def ended(row: int) -> bool:
        return len(answers[row]) == max_new_tokens or (len(answers[row]) > 0 and answers[row][-1] in stop_ids)

    while True:
        out = target(
            input_ids=inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        chosen = _choose(out.logits[:, -1], temperature, generator)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if not ended(row):
                answers[row].append(token)
        alive = [place for place, row in enumerate(rows) if not ended(row)]
        if not alive:
            return answers
        inputs, positions = chosen.unsqueeze(1), positions[:, -1:] + 1
        mask = torch.cat((mask, mask.new_ones(len(rows), 1)), dim=1)
        if len(alive) <= (1 - DROP_SHARE) * len(rows):
            keep = torch.tensor(alive, device=target.device)
            cache.batch_select_indices(keep)
            inputs, positions, mask = inputs[keep], positions[keep], mask[keep]
            rows = [rows[place] for place in alive]


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Ids and mask `[B, longest]`; what stands in the padding is of no account."""
    longest = max(len(prompt) for prompt in prompts)
    ids, mask = torch.zeros(2, len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def _choose(logits: torch.Tensor, temperature: float, generator: torch.Generator | None) -> torch.LongTensor:
    """One token `[B]` from logits `[B, V]`."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits.float() / temperature).softmax(-1)
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)
