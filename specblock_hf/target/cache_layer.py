# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Keys and values that grow in place instead of being copied whenever a few rows are added."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer


STEP = 256
"""Columns that a layer makes room for at a time; it copies what it holds once in so many tokens."""


class RoomyLayer(DynamicLayer):
    """
    Stands in for a [`~transformers.cache_utils.DynamicLayer`] during one call. That one concatenates all it holds with
    every round's tree; this one writes the tree behind what it holds, so that a round costs its own columns only.
    `keys` and `values` are views, cut back by the inherited `crop`.

    Args:
        layer ([`~transformers.cache_utils.DynamicLayer`]): What to stand in for; it holds something already.
    """

    def __init__(self, layer: DynamicLayer):
        super().__init__()
        self._layer = layer
        self.lazy_initialization(layer.keys, layer.values)
        # What was full to the last column grows at the first update.
        self.keys = self._all_keys = layer.keys
        self.values = self._all_values = layer.values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        held = self.keys.shape[-2]
        total = held + key_states.shape[-2]
        if total > self._all_keys.shape[-2]:
            self._all_keys, self._all_values = _roomier(self.keys, total), _roomier(self.values, total)
        self._all_keys[..., held:total, :] = key_states
        self._all_values[..., held:total, :] = value_states
        self.keys, self.values = self._all_keys[..., :total, :], self._all_values[..., :total, :]
        return self.keys, self.values

    def batch_select_indices(self, indices: Any) -> None:
        super().batch_select_indices(indices)
        self._all_keys, self._all_values = self.keys, self.values

    def original(self, kept: bool) -> DynamicLayer:
        """
        The layer that this one stood in for, with all that was added to it.

        Args:
            kept (`bool`): Somebody goes on with it, so that it must not hold on to room that it does not need.
        """
        self._layer.keys = self.keys.clone() if kept else self.keys
        self._layer.values = self.values.clone() if kept else self.values
        return self._layer


def _roomier(held: torch.Tensor, total: int) -> torch.Tensor:
    """`held` `[B, H, T, D]` with room for `total` columns and the next step's."""
    room = held.new_empty(*held.shape[:2], total + STEP, held.shape[3])
    room[..., : held.shape[2], :] = held
    return room
