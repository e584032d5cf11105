# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What the tokens of a sampled tree were drawn from."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class DraftDistributions:
    """
    What the tokens of a sampled tree were drawn from. Siblings are drawn in the order of their nodes: the first from
    its distribution, each later one from the distribution without the siblings before it, or from the whole
    distribution again.

    Args:
        log_probs (`torch.Tensor` of shape `[B, R, D]`):
            R distributions over the D tokens that the drafter can draw, normalised or not; -inf where it never draws.
        token_ids (`torch.LongTensor` of shape `[D]`): The target's ids of those tokens.
        rows (`torch.LongTensor` of shape `[B, N]`):
            Which of the R distributions each node's token was drawn from, the same for all drawn siblings; -1 for a
            node that was not drawn but follows from the text before, and for the root.
    """

    log_probs: torch.Tensor
    token_ids: torch.LongTensor
    rows: torch.LongTensor
