# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Medusa (https://huggingface.co/papers/2401.10774): independent heads on the target's last state.

Kept of the paper: the heads, their start at the target's own predictions, a target that is not touched (Medusa-1) and
the weights of their losses, 0.8 to the power of the head's number. Left out: a projection to the vocabulary for every
head, which all share here, over a part of the vocabulary (five of the target's size would be larger than a small
target); labels, where the target's own distribution is learned from; the tree whose shape is found once on calibration
data, instead of which every round takes the paths with the largest products of the heads' probabilities (what that
search maximises on average); the target that is trained along (Medusa-2) and typical acceptance, which change the
output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...drafting.drafter import DraftState
from ...drafting.pairs import Pairs, TokenTable
from ...drafting.plan import Limits
from ...drafting.target_batch import Losses, TargetBatch
from ...trees.tree import DraftTree
from ..common.network import NetworkDrafter
from ..common.slot_loss import slots_loss
from .modeling import MedusaModel


@dataclass(frozen=True)
class MedusaObjective:
    """
    What may be chosen about the objective.

    Args:
        head_decay (`float`, *optional*, defaults to 0.8): Head k counts this to the power of k (paper: 0.8).
    """

    head_decay: float = 0.8


class MedusaDrafter(NetworkDrafter, MedusaModel):
    """
    A drafter that predicts the next K tokens from the target's last state, each without the others.

    Args:
        config ([`MedusaConfig`]): The drafter's configuration.

    Example:

    ```python
    >>> from specblock_hf import AutoDrafter

    >>> drafter = AutoDrafter.from_pretrained("org/medusa-smollm2-135m", target=target, dtype=target.dtype)
    >>> output = target.generate(**inputs, assistant_model=drafter, max_new_tokens=256)
    ```
    """

    objective_class = MedusaObjective

    def begin(self, table: TokenTable, batch_size: int, max_length: int, *, first_position: int = 0) -> DraftState:
        return DraftState(table, batch_size, max_length, first_position=first_position)

    def extend(self, state: DraftState, pairs: Pairs) -> None:
        """Nothing is remembered: the last state has read the text."""

    def propose(self, state: DraftState, pairs: Pairs, limits: Limits) -> DraftTree:
        last = (pairs.lengths - 1).clamp_min(0)[:, None, None]
        (features,) = pairs.features
        features = features.gather(1, last.to(features.device).expand(-1, -1, features.shape[-1]))
        state.calls += 1
        state.forward_rows += len(features)
        return self.product_tree(self.root_of(pairs), self(features.to(self.device, self.dtype)), limits)

    def _loss(self, batch: TargetBatch, objective: MedusaObjective, progress: float, generator: Any) -> Losses:
        """The mean cross-entropy of every head at every place of the answers; see [`TreeDrafter.loss`]."""
        hidden = self(batch.features[:, :-1])
        return slots_loss(self, batch, hidden, objective.head_decay)
