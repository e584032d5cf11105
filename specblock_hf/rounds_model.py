# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What the rounds of a call run instead of a model whose forwards are made for prompts: the same numbers, sooner."""

from __future__ import annotations

from typing import Generic

from .grouped_attention import grouped_twin
from .prepacking import LONG_PROMPT, PrepackedWeights, are_slow, fitting, prepacked_twin, version_of
from .twins import Model


class RoundsModel(Generic[Model]):
    """
    What reads the trees of a call, or drafts them: a model as [`grouped_twin`] has it, and after some rounds a twin of
    that with prepacked weights.

    Args:
        model (`nn.Module`): A target, or the network of a drafter.
        weights ([`PrepackedWeights`], *optional*): May be used after some rounds.
        alone (`bool`, *optional*, defaults to `False`): The model itself is to be read, and no twin.
    """

    def __init__(self, model: Model, weights: PrepackedWeights | None, alone: bool = False):
        weights = None if alone else weights
        self.model, self._alone = model, alone
        self._grouped: Model | None = None
        self._layers = fitting(model) if weights is not None else []
        # Asked for in every round, of hundreds of layers: by `layer.weight` it takes five times as long.
        self._parameters = [vars(layer)["_parameters"] for layer in self._layers]
        self._weights = weights if weights is not None and weights.has_room(self._layers) else None
        self._version, self._changed = 0, False
        self._twin: Model | None = None

    @property
    def prepacked(self) -> bool:
        """Whether the last round had prepacked weights."""
        return self._twin is not None

    @property
    def settled(self) -> bool:
        """Whether later rounds will run as the last one did, and take as long."""
        return (self._weights is None or self._twin is not None) and not self._changed

    def of_prompt(self, tokens: int) -> Model:
        """
        What reads a prompt, of which nothing may stay on the model's parts: with prepacked weights if they are there,
        or if so many tokens are worth it.

        Args:
            tokens (`int`): Of a row.
        """
        weights = self._weights
        if weights is None:
            return self.model
        slow = tokens >= LONG_PROMPT and are_slow(self._layers)
        return self.next(at_once=True) if slow or weights.knows(self._layers) else self.model

    def next(self, at_once: bool = False) -> Model:
        """
        Of the next round.

        Args:
            at_once (`bool`, *optional*, defaults to `False`): Do not wait some rounds before weights are copied.
        """
        if self._grouped is None:  # not before a prompt that may leave things on the model's parts
            self._grouped = self.model if self._alone else grouped_twin(self.model)
        if self._twin is not None and self._version != self._version_now():
            self._twin = None  # as before there was one: what has changed may change again
        weights, self._changed = self._weights, False
        if weights is not None and self._twin is None:
            if at_once or weights.knows(self._layers) or not weights.waits(self.model):
                self._version, self._changed = self._version_now(), True
                self._twin = prepacked_twin(self._grouped, self._layers, weights)
                self._weights = weights if self._twin is not None else None
        return self._twin or self._grouped

    def _version_now(self) -> int:
        return version_of(parameters["weight"] for parameters in self._parameters)
