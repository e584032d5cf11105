# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Conversations in batches: which ones go together, what they weigh, and how they become tensors."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import torch

from ..data.examples import Example
from ..drafters.common.head import DraftHead
from ..drafting.pairs import TokenTable
from ..drafting.target_batch import TargetBatch
from .target_views import TargetView


NEIGHBOURS = 256  # conversations of similar length among which batches are mixed anew in every epoch


def batches_of_epoch(examples: Sequence[Example], batch_tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices of one epoch's batches: neighbours in length, in an order that only `seed` and `epoch` decide."""
    rng = random.Random(f"{seed}-{epoch}")
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
    for first in range(0, len(order), NEIGHBOURS):
        window = order[first : first + NEIGHBOURS]
        rng.shuffle(window)
        order[first : first + NEIGHBOURS] = window
    batches: list[list[int]] = []
    batch: list[int] = []
    longest = 0
    for index in order:
        longest = max(longest, len(examples[index].input_ids))
        if batch and longest * (len(batch) + 1) > batch_tokens:
            batches.append(batch)
            batch, longest = [], len(examples[index].input_ids)
        batch.append(index)
    batches.append(batch)
    rng.shuffle(batches)
    return batches


def draft_vocabulary(examples: Sequence[Example], size: int, vocab_size: int) -> tuple[torch.LongTensor, float]:
    """
    The most frequent tokens of the answers, and the share of the answers' tokens that they cover.

    Args:
        examples (`Sequence[Example]`): Training conversations.
        size (`int`): Tokens to choose; if fewer occur, the lowest other ids (bytes, punctuation) fill up.
        vocab_size (`int`): Of the target.
    """
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for example in examples:
        answer = torch.tensor(example.input_ids[example.answer_start :])
        counts.index_add_(0, answer, torch.ones_like(answer))
    ids = counts.sort(descending=True, stable=True).indices[:size]
    return ids.sort().values, (counts[ids].sum() / counts.sum()).item()


def draft_ids_of(drafter: DraftHead, vocab_size: int) -> torch.LongTensor:
    """The draft id of every target id `[vocab_size]`, on the CPU where batches are made; -1 where there is none."""
    ids = torch.full((vocab_size,), -1, dtype=torch.long)
    order = drafter.draft_to_target.cpu()
    ids[order] = torch.arange(len(order))
    return ids


def collate(
    examples: Sequence[Example], views: Sequence[TargetView], table: TokenTable, draft_ids: torch.LongTensor
) -> TargetBatch:
    """
    Pad conversations and the target's view of them into one batch.

    Args:
        examples (`Sequence[Example]`): B conversations.
        views (`Sequence[TargetView]`): The target's view of each.
        table (`TokenTable`): The target's embedding.
        draft_ids (`torch.LongTensor` of shape `[vocab_size]`): Draft id of every target id, -1 outside the draft
            vocabulary.
    """
    lengths = torch.tensor([len(e.input_ids) for e in examples])
    shape = (len(examples), int(lengths.max()))
    top_k = views[0].top_ids.shape[1]
    tokens = torch.zeros(shape, dtype=torch.long)
    features = torch.zeros(*shape, views[0].features[0].numel(), dtype=views[0].features.dtype)
    top_ids = torch.full((*shape, top_k), -1, dtype=torch.long)
    top_probs = torch.zeros(*shape, top_k)
    scored = torch.zeros(shape, dtype=torch.bool)
    for row, (example, view) in enumerate(zip(examples, views, strict=True)):
        length = len(example.input_ids)
        answer = slice(example.answer_start, length)
        tokens[row, :length] = torch.tensor(example.input_ids)
        features[row, :length] = view.features.flatten(1)
        top_ids[row, answer] = draft_ids[view.top_ids.long().cpu()]
        top_probs[row, answer] = view.top_probs
        scored[row, answer] = True
    device = table.device
    with torch.no_grad():
        embeds = table.embed(tokens.to(device))
    return TargetBatch(
        tokens.to(device),
        embeds,
        features.to(device),
        lengths.to(device),
        top_ids.to(device),
        top_probs.to(device),
        scored.to(device),
        table,
    )


def batches_from(examples: Sequence[Example], batch_tokens: int, seed: int, first: int) -> Iterator[list[int]]:
    """
    The endless sequence of batches, epoch after epoch, from number `first` on. It follows from the arguments alone, so
    that a resumed run and every process of a run see the very same one.
    """
    passed = 0
    for epoch in itertools.count():
        epoch_batches = batches_of_epoch(examples, batch_tokens, seed, epoch)
        yield from epoch_batches[max(0, first - passed) :]
        passed += len(epoch_batches)


def padding_share(examples: Sequence[Example], batches: Sequence[Sequence[int]]) -> float:
    """Share of the batches' places that hold no token."""
    lengths = [[len(examples[i].input_ids) for i in batch] for batch in batches]
    places = sum(len(batch) * max(batch) for batch in lengths)
    return 1 - sum(map(sum, lengths)) / places
