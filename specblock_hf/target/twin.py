# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""A second model of the same weights, which may have hooks and settings that nobody else sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..twins import copied
from .features import decoder_layers, tap
from .inputs import without_training_flags


_NO_LIMIT = (0.0, float("inf"))  # of the time steps of Mamba layers


def twin_of(target: PreTrainedModel, layers: Sequence[int]) -> Callable[..., tuple[torch.Tensor, tuple]]:
    """
    The target's forward that also returns states of its decoder. It may be compiled: its hooks are there from the
    beginning, and the target has none of them.

    Args:
        target ([`~transformers.PreTrainedModel`]): The model; all weights are shared.
        layers (sequence of `int`): Which states; see [`FeatureTaps`].

    Returns:
        `Callable`: The inputs of the target by name to logits and a tuple with a state `[B, N, d]` for each layer.

    Raises:
        `ValueError`: The forward of a part was replaced.
    """
    decoder = target.get_decoder()
    twin = copied(target, {decoder, *decoder_layers(decoder)}, "which cannot be compiled")
    layers, flags = tuple(layers), without_training_flags(target)
    states: dict[int, torch.Tensor] = {}

    for index in set(layers):
        tap(twin.get_decoder(), index, _kept(states, index))

    def forward(**inputs: Any) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        outputs = twin(**inputs, use_cache=True, return_dict=True, **flags)
        features = tuple(states[index] for index in layers)
        states.clear()
        return outputs.logits, features

    return forward


def _kept(states: dict[int, torch.Tensor], index: int) -> Callable[[torch.Tensor], None]:
    """What writes a state down; a plain function, because torch 2.11 cannot trace a partial of a method of `dict`."""

    def keep(state: torch.Tensor) -> None:
        states[index] = state

    return keep


def stepwise(target: PreTrainedModel) -> PreTrainedModel:
    """
    A target that reads several tokens as it would read one after the other. transformers' Mamba layers bound time
    steps (`time_step_limit`; Nemotron-H, Zamba2: `time_step_min`) where they read several tokens, such as a prompt,
    and not where they go on by one.

    Args:
        target ([`~transformers.PreTrainedModel`]): The model; all weights and its present hooks are shared.

    Returns:
        [`~transformers.PreTrainedModel`]: The target itself if it bounds nothing.

    Raises:
        `ValueError`: The forward of a part was replaced.
    """
    bounded = {part for part in target.modules() if vars(part).get("time_step_limit", _NO_LIMIT) != _NO_LIMIT}
    if not bounded:
        return target
    twin = copied(target, bounded, "whose time steps a draft cannot have as plain decoding has them")
    for part in twin.modules():
        if "time_step_limit" in vars(part):
            part.time_step_limit = _NO_LIMIT
    return twin
