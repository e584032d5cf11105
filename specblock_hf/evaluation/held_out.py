# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The objective's own counts on held-out answers: how often every slot of every block is right, and the rank head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..data.examples import Example
from ..devices import without_cudnn_attention
from ..drafting.pairs import TokenTable
from ..training.batches import batches_of_epoch, collate, draft_ids_of
from ..training.metrics import describe_counts
from ..training.target_views import TargetView


@torch.no_grad()
@without_cudnn_attention
def held_out_rates(
    drafter: PreTrainedModel,
    table: TokenTable,
    examples: Sequence[Example],
    views: Sequence[TargetView],
    objective: Any = None,
    batch_tokens: int = 4096,
) -> dict:
    """
    Rates that need no tree: the share of right guesses of every block and slot, given that the drafts before were
    right (the paper's appendix C), and the rank head's precision, recall and F1 (appendix B).

    Args:
        drafter ([`~transformers.PreTrainedModel`]): A [`TreeDrafter`] with a `loss`.
        table ([`TokenTable`]): The target's embedding and head.
        examples (`Sequence[Example]`): Held-out conversations.
        views (`Sequence[TargetView]`): The target's view of each.
        objective (*optional*): As in [`TreeDrafter.loss`].
        batch_tokens (`int`, *optional*, defaults to 4096): Tokens of a batch, padding included.

    Returns:
        `dict`: See [`describe_counts`]; every name begins with `held_out_`.
    """
    draft_ids = draft_ids_of(drafter, table.vocab_size)
    generator = torch.Generator().manual_seed(0)  # the same cuts at every evaluation
    totals: dict[str, torch.Tensor] = {}
    for indices in batches_of_epoch(examples, batch_tokens, seed=0, epoch=0):
        batch = collate([examples[i] for i in indices], [views[i] for i in indices], table, draft_ids)
        out = drafter.loss(batch, objective, generator=generator)
        for name, value in out.items():
            if value.ndim > 0:
                totals[name] = totals[name] + value if name in totals else value
    return {f"held_out_{name}": value for name, value in describe_counts(totals).items()}
