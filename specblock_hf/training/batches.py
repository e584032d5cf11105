# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Conversations in batches: which ones go together, what they weigh, and how they become tensors."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import torch
from torch import nn

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


def draft_vocabulary(
    examples: Sequence[Example], size: int, vocab_size: int, held_out: Sequence[Example] = ()
) -> tuple[torch.LongTensor, float]:
    """
    The most frequent tokens of the answers, and the share of tokens that they cover of answers that they were not
    chosen from, or of the same ones where there are no others.

    Args:
        examples (`Sequence[Example]`): Training conversations.
        size (`int`): Tokens to choose; if fewer occur, the lowest other ids (bytes, punctuation) fill up.
        vocab_size (`int`): Of the target.
        held_out (`Sequence[Example]`, *optional*): Other conversations.
    """
    counts = _answer_counts(examples, vocab_size)
    ids = counts.sort(descending=True, stable=True).indices[:size]
    others = _answer_counts(held_out, vocab_size) if held_out else counts
    return ids.sort().values, (others[ids].sum() / others.sum()).item()


def _answer_counts(examples: Sequence[Example], vocab_size: int) -> torch.LongTensor:
    """How often every token occurs in answers `[vocab_size]`."""
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for example in examples:
        answer = torch.tensor(example.input_ids[example.answer_start :])
        counts.index_add_(0, answer, torch.ones_like(answer))
    return counts


def draft_ids_of(drafter: DraftHead, vocab_size: int) -> torch.LongTensor:
    """The draft id of every target id `[vocab_size]`, where the drafter is; -1 where there is none."""
    order = drafter.draft_to_target
    ids = torch.full((vocab_size,), -1, dtype=torch.long, device=order.device)
    ids[order] = torch.arange(len(order), device=order.device)
    return ids


def collate(
    examples: Sequence[Example], views: Sequence[TargetView], table: TokenTable, draft_ids: torch.LongTensor
) -> TargetBatch:
    """
    Pad conversations and the target's view of them where the views are, into one batch where the drafter is.

    Args:
        examples (`Sequence[Example]`): B conversations.
        views (`Sequence[TargetView]`): The target's view of each.
        table (`TokenTable`): The target's embedding.
        draft_ids (`torch.LongTensor` of shape `[vocab_size]`): Draft id of every target id, -1 outside the draft
            vocabulary; where the drafter is, which may be apart from the target's embedding.
    """
    device, here = draft_ids.device, views[0].features.device
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(e.input_ids) for e in examples], batch_first=True)
    lengths = torch.tensor([len(e.input_ids) for e in examples])
    starts = torch.tensor([e.answer_start for e in examples])
    places = torch.arange(tokens.shape[1])
    scored = (places >= starts[:, None]) & (places < lengths[:, None])
    answers = scored.flatten().nonzero().squeeze(1).to(here)

    def padded(rows: list[torch.Tensor], fill: float) -> torch.Tensor:
        """What is said about the answers' places `[n, k]`, as `[B, T, k]`."""
        said = torch.cat(rows)
        everywhere = said.new_full((tokens.numel(), said.shape[1]), fill)
        return everywhere.index_copy_(0, answers, said).view(*tokens.shape, -1).to(device)

    ids = draft_ids.to(here)
    with torch.no_grad():
        embeds = table.embed(tokens).to(device)
    return TargetBatch(
        tokens.to(device),
        embeds,
        nn.utils.rnn.pad_sequence([view.features.flatten(1) for view in views], batch_first=True).to(device),
        lengths.to(device),
        padded([ids[view.top_ids.long()] for view in views], -1),
        padded([view.top_probs for view in views], 0),
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
