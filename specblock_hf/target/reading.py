# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""By what the trees of a call are read: the target, or after some rounds a twin of it with prepacked weights."""

from __future__ import annotations

from collections.abc import Iterable

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
        self._layers = fitting(target) if weights is not None else []
        self._weights = weights if weights is not None and weights.has_room(self._layers) else None
        self._rounds = self._version = 0
        self._twin: PreTrainedModel | None = None

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
        if self._weights is not None and (self._rounds == PATIENCE or self._weights.knows(self._layers)):
            self._version = self._version_now()
            self._twin = prepacked_twin(self.target, self._layers, self._weights)
            self._weights = None
        elif self._twin is not None and self._version != self._version_now():
            self._twin = None
        self._rounds += 1
        return self._twin or self.target

    def _version_now(self) -> int:
        return version_of(layer.weight for layer in self._layers)


def prepacked_twin(
    target: PreTrainedModel, layers: Iterable[nn.Linear], weights: PrepackedWeights
) -> PreTrainedModel | None:
    """
    A model that reads as the target does, sooner; `None` where the forward of a part was replaced.

    Args:
        target ([`~transformers.PreTrainedModel`]): Not changed; its present hooks are the twin's as well.
        layers (iterable of `nn.Linear`): Those of it that multiply by copies.
        weights ([`PrepackedWeights`]): The copies, of it and others.
    """
    try:
        twin = copied(target, {*layers}, "which leaves its weights where they are")
    except ValueError:
        return None
    weights.lend(twin)
    return twin
