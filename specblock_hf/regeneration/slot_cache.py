# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
A cache of slots: every row ends in the same column, and a new prompt is laid into one row beside the others. Recurrent
layers have nothing that could be laid beside others, so their prompts stay together until the last one is answered.
"""

from __future__ import annotations

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, cache_utils

from ..compat import layer_types


SPARE_COLUMNS = 64  # steps between two shifts of everything to the left
ATTENTIONS = {"full_attention", "sliding_attention", "dummy"}  # the last have no part of the cache of their own


class SlotLayer(cache_utils.DynamicLayer):
    """
    Keys and values of a layer in a buffer of fixed size, of which the attention sees the written columns.

    Args:
        capacity (`int`): Columns of the buffer.
    """

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity
        self.end = 0

    def allocate(self, slots: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Make the buffers for rows as these `[B, heads, T, head_dim]`; latent attention has values of their own."""
        # Not empty: what is masked is still multiplied by 0, and that must not be nan.
        self.keys, self.values = (
            like.new_zeros(slots, like.shape[1], self.capacity, like.shape[3]) for like in (keys, values)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start, self.end = self.end, self.end + key_states.shape[-2]
        self.keys[:, :, start : self.end] = key_states
        self.values[:, :, start : self.end] = value_states
        return self.keys[:, :, : self.end], self.values[:, :, : self.end]

    def get_seq_length(self) -> int:
        return self.end


class SlotCache:
    """
    The rows of a batch, of which each may start in a column of its own. Columns of a row are as far apart as its
    positions, which is what sliding windows count; the keys were rotated by true positions before they came here.

    Args:
        target ([`~transformers.PreTrainedModel`]): Whose keys and values they are.
        slots (`int`): Rows.
        longest (`int`): Most columns of a row that is still of use.

    Raises:
        ValueError: The target has layers that are neither full nor sliding attention.
    """

    def __init__(self, target: PreTrainedModel, slots: int, longest: int):
        types = layer_types(target)
        if others := sorted(set(types) - ATTENTIONS):
            raise ValueError(
                f"{type(target).__name__} has layers of {', '.join(others)}, whose state cannot be "
                "handed from prompt to prompt; serve the target with an engine of its own and name that with --server."
            )
        self.capacity = longest + SPARE_COLUMNS
        self.cache = Cache(layers=[SlotLayer(self.capacity) for _ in types])
        self.visible = torch.zeros(slots, self.capacity, dtype=torch.bool, device=target.device)
        self.end = 0

    def to_read(self) -> DynamicCache:
        """An empty cache for prompts that are to be placed."""
        return DynamicCache()  # without the configuration sliding layers keep every column

    def place(self, at: torch.LongTensor, read: DynamicCache, mask: torch.BoolTensor) -> None:
        """
        Lay prompts into slots.

        Args:
            at (`torch.LongTensor` of shape `[R]`): The slots.
            read ([`~transformers.DynamicCache`]): Of the forward that read the prompts.
            mask (`torch.BoolTensor` of shape `[R, T]`): Its columns that hold tokens; the last one always does.
        """
        width = mask.shape[1]
        if self.end < width:
            self._shift(width - self.end)
        columns = slice(self.end - width, self.end)
        self.visible[at] = False
        self.visible[at, columns] = mask
        for layer, new in zip(self.cache.layers, read.layers, strict=False):
            if not layer.is_initialized:
                layer.allocate(len(self.visible), new.keys, new.values)
            layer.keys[at, :, columns] = new.keys
            layer.values[at, :, columns] = new.values
            layer.end = self.end

    def extend(self, busy: list[int]) -> torch.LongTensor:
        """
        Make room for one column, to be written by the next forward.

        Args:
            busy (`list[int]`): Slots whose columns are still of use.

        Returns:
            `torch.LongTensor` of shape `[slots, columns]`: The mask of that forward.
        """
        if self.end == self.capacity:
            first = int(self.visible[busy].any(0).int().argmax())
            self._shift(-first)
        self.visible[:, self.end] = True
        self.end += 1
        return self.visible[:, : self.end].long()

    def keep(self, at: torch.LongTensor) -> None:
        """Go on with these slots alone."""
        self.visible = self.visible[at]
        for layer in self.cache.layers:
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys[at], layer.values[at]

    def _shift(self, by: int) -> None:
        """Move all columns to the right (or the left, where those that nobody needs fall out)."""
        source = slice(max(-by, 0), self.end)
        there = slice(max(by, 0), self.end + by)
        buffers = [self.visible]
        for layer in self.cache.layers:
            layer.end = self.end + by
            if layer.is_initialized:
                buffers += [layer.keys.transpose(1, 2), layer.values.transpose(1, 2)]
        for buffer in buffers:
            buffer[:, there] = buffer[:, source].clone()
        self.visible[:, : there.start] = False
        self.visible[:, there.stop :] = False
        self.end += by


class BatchCache:
    """
    The same for a target with recurrent layers: all slots are filled at once.

    Args:
        target ([`~transformers.PreTrainedModel`]): Whose states they are.
    """

    def __init__(self, target: PreTrainedModel):
        self.config = target.config
        self.cache = self.to_read()
        self.visible = torch.ones(0, 0, dtype=torch.bool)

    def to_read(self) -> DynamicCache:
        """An empty cache for prompts that are to be placed."""
        return DynamicCache(config=self.config)

    def place(self, at: torch.LongTensor, read: DynamicCache, mask: torch.BoolTensor) -> None:
        """Go on from these prompts, one for every slot; the arguments are those of [`SlotCache`]."""
        self.cache, self.visible = read, mask

    def extend(self, busy: list[int]) -> torch.LongTensor:
        """The mask of the next forward, over one column more."""
        self.visible = torch.nn.functional.pad(self.visible, (0, 1), value=True)
        return self.visible.long()

    def keep(self, at: torch.LongTensor) -> None:
        """Go on with these slots alone."""
        self.visible = self.visible[at]
        self.cache.reorder_cache(at)
