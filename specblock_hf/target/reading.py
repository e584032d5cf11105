# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""By what the trees of a call are read: the target, or after some rounds a twin of it with prepacked weights."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ..prepacking import PrepackedWeights, fitting, version_of
from .twin import copied


PATIENCE = 4
"""Rounds of a call before weights are copied for it, which takes as long as some five plain steps."""


class RoundsReader:
    """
    What reads the trees of a call.

    Args:
        target ([`~transformers.PreTrainedModel`]): The target, or a twin of it.
        weights ([`PrepackedWeights`], *optional*): May replace it after some rounds.
    """

    def __init__(self, target: PreTrainedModel, weights: PrepackedWeights | None):
        self.target = target
        self._weights = weights if weights is not None and weights.has_room(target) else None
        self._rounds = self._version = 0
        self._twin: PreTrainedModel | None = None
        self._copied: list[nn.Parameter] = []

    @property
    def prepacked(self) -> bool:
        """Whether the last round was read with prepacked weights."""
        return self._twin is not None

    @property
    def settled(self) -> bool:
        """Whether later rounds will be read the same way."""
        return self._weights is None

    def next(self) -> PreTrainedModel:
        """Of the next round."""
        if self._weights is not None and (self._rounds == PATIENCE or self._weights.knows(self.target)):
            self._copied = [layer.weight for layer in fitting(self.target)]
            self._version = version_of(self._copied)
            self._twin = prepacked_twin(self.target, self._weights)
            self._weights = None
        elif self._twin is not None and self._version != version_of(self._copied):
            self._twin = None
        self._rounds += 1
        return self._twin or self.target


def prepacked_twin(target: PreTrainedModel, weights: PrepackedWeights) -> PreTrainedModel | None:
    """
    A model that reads as the target does, sooner; `None` where the forward of a part was replaced.

    Args:
        target ([`~transformers.PreTrainedModel`]): Not changed; its present hooks are the twin's as well.
        weights ([`PrepackedWeights`]): Of it and others.
    """
    try:
        twin = copied(target, {*fitting(target)}, "which leaves its weights where they are")
    except ValueError:
        return None
    weights.lend(twin)
    return twin
