# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What drafters learn from: the target's distributions on a text, and the losses taken on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .pairs import TokenTable


Losses = dict[str, torch.Tensor]
"""What a drafter is trained by: its loss, the parts of it, and counts; see [`TreeDrafter.loss`]."""

CPU_WORK, DEVICE_WORK = 2**21, 2**28
"""Numbers of a vocabulary-wide pass: 8 MB stay in a processor's cache between two operations, 1 GB fills a GPU."""


def rows_at_once(width: int, device: torch.device) -> int:
    """
    Rows of a vocabulary-wide pass.

    Args:
        width (`int`): Numbers of a row.
        device (`torch.device`): Where the pass runs.
    """
    return max(1, (CPU_WORK if device.type == "cpu" else DEVICE_WORK) // width)


@dataclass
class TargetBatch:
    """
    B texts as the target sees them. Token t of a row is x_t; pair i is (features at x_i, x_{i+1}), so there is one
    pair less than
    tokens. A drafter's first guess at pair i is about x_{i+2}.

    Args:
        tokens (`torch.LongTensor` of shape `[B, T]`): The texts, padded on the right.
        embeds (`torch.Tensor` of shape `[B, T, d]`): The target's embeddings of `tokens`.
        features (`torch.Tensor` of shape `[B, T, F * d]`): The target's states at `tokens`, one block per feature
            layer.
        lengths (`torch.LongTensor` of shape `[B]`): Tokens of each text.
        top_ids (`torch.LongTensor` of shape `[B, T, k]`): Draft-vocabulary ids of the likeliest tokens at place t, -1
            outside the
            draft vocabulary.
        top_probs (`torch.Tensor` of shape `[B, T, k]`): The target's probabilities of them, given x_0 .. x_{t-1}.
        scored (`torch.BoolTensor` of shape `[B, T]`): Where x_t is part of an answer, so that its prediction counts.
        table ([`TokenTable`], *optional*):
            The target's embedding and head, for drafters that read more of them than `embeds`.
    """

    tokens: torch.LongTensor
    embeds: torch.Tensor
    features: torch.Tensor
    lengths: torch.LongTensor
    top_ids: torch.LongTensor
    top_probs: torch.Tensor
    scored: torch.BoolTensor
    table: TokenTable | None = None

    @property
    def counted(self) -> torch.BoolTensor:
        """
        `[B, T]`: places whose prediction is trained, that is scored ones whose likeliest token the drafter can
        say.
        """
        return self.scored & (self.top_ids[..., 0] >= 0)
