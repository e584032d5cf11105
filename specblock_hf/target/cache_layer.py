# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Keys and values that grow in place instead of being copied whenever a few rows are added, and such that never grow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer


STEP = 256
"""Columns that a layer makes room for at a time; it copies what it holds once in so many tokens."""

LARGEST = 2**31 - 1
"""Numbers of a tensor that are addressed with 32 bits, which is faster."""


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


class RowMemory:
    """
    Keys and values of all layers in memory that stays where it is. Every row of the batch writes where `places` says,
    which a forward needs to be told, and attends to all columns, so that a mask has to hide those that do not count.

    Args:
        like (sequence of [`~transformers.cache_utils.CacheLayerMixin`]): Layers that hold something, for the shapes.
        batch_size (`int`): Rows of the batch.
        columns (`int`): Columns of each row.

    Attributes:
        cache ([`~transformers.Cache`]): What forwards are given.
        places (`torch.LongTensor` of shape `[B, N]`): Where each row of the next forward writes its columns.
    """

    def __init__(self, like: Sequence[CacheLayerMixin], batch_size: int, columns: int):
        self.columns = columns
        self.places: torch.Tensor | None = None
        self._own = [layer.keys is not None for layer in like]
        tensors = [part for layer in like if layer.keys is not None for part in (layer.keys, layer.values)]
        # Tensors of the same shape in one, so that a round's columns move in one piece.
        self._stacks: list[torch.Tensor] = []
        views: dict[int, torch.Tensor] = {}
        for shape in dict.fromkeys((part.shape[1], part.shape[3], part.dtype, part.device) for part in tensors):
            heads, size, dtype, device = shape
            numbers = [
                number
                for number, part in enumerate(tensors)
                if (part.shape[1], part.shape[3], part.dtype, part.device) == shape
            ]
            most = max(LARGEST // (batch_size * heads * columns * size), 1)
            for first in range(0, len(numbers), most):
                some = numbers[first : first + most]
                stack = torch.zeros(len(some), batch_size, heads, columns, size, dtype=dtype, device=device)
                self._stacks.append(stack)
                views |= dict(zip(some, stack, strict=True))
        parts = iter([views[number] for number in range(len(tensors))])
        layers = [RowLayer(self, next(parts), next(parts)) if own else RowLayer(self, None, None) for own in self._own]
        self.cache = Cache(layers=layers)

    def load(self, layers: Sequence[CacheLayerMixin]) -> None:
        """Begin with what these layers hold of a prompt; every other column is zero."""
        for stack in self._stacks:
            stack.zero_()
        for mine, theirs in zip(self.cache.layers, layers, strict=True):
            if theirs.keys is not None:
                mine.keys[:, :, : theirs.keys.shape[2]] = theirs.keys
                mine.values[:, :, : theirs.values.shape[2]] = theirs.values

    def move(self, source: torch.LongTensor, destination: torch.LongTensor) -> None:
        """Write what columns `source` `[B, count]` of each row hold to its columns `destination` `[B, count]`."""
        for stack in self._stacks:
            shape = (*stack.shape[:3], source.shape[1], stack.shape[4])
            moved = stack.gather(3, source[None, :, None, :, None].expand(shape))
            stack.scatter_(3, destination[None, :, None, :, None].expand(shape), moved)


class RowLayer(CacheLayerMixin):
    """
    A layer of a [`RowMemory`].

    Args:
        memory ([`RowMemory`]): Says where the next forward writes.
        keys, values (`torch.Tensor` of shape `[B, H, columns, D]`, *optional*):
            Where; `None` for a layer without any of its own.
    """

    def __init__(self, memory: RowMemory, keys: torch.Tensor | None, values: torch.Tensor | None):
        super().__init__()
        self._memory = memory
        self.keys, self.values = keys, values
        self.is_initialized = keys is not None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the memory is there."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        places = self._memory.places[:, None, :, None]
        # Under autocast they come in another dtype.
        self.keys.scatter_(2, places.expand_as(key_states), key_states.to(self.keys.dtype))
        self.values.scatter_(2, places.expand_as(value_states), value_states.to(self.values.dtype))
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._memory.columns, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self._memory.columns
