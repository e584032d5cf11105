# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Keys and values of a drafter's own layers, and what its rows may see of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import rotate_half

from ...devices import on_device


@dataclass
class OpenBlock:
    """
    A block before the last layer's output, S slots in B texts.

    Args:
        hidden (`torch.Tensor` of shape `[B, S, d]`): What enters the last layer.
        position_embeddings (`tuple` of `torch.Tensor` of shape `[B, S, head_dim]`): Cosines and sines.
        keys, values (`torch.Tensor` of shape `[B, heads, columns, head_dim]`): The last layer's, earlier blocks' too.
        attention_mask (`torch.BoolTensor` of shape `[B, 1, S, columns]`, *optional*): As the block was given it.
    """

    hidden: torch.Tensor
    position_embeddings: tuple[torch.Tensor, torch.Tensor]
    keys: torch.Tensor
    values: torch.Tensor
    attention_mask: torch.BoolTensor | None

    def visible(self, slots: torch.LongTensor) -> torch.BoolTensor:
        """What slots `[B, Q]` of each text see: `[B, 1, Q, columns]`."""
        if self.attention_mask is None:
            seen = torch.arange(self.keys.shape[2], device=slots.device) <= slots.unsqueeze(-1)
        else:
            rows = torch.arange(len(slots), device=slots.device).unsqueeze(1)
            seen = self.attention_mask[:, 0].expand(len(slots), -1, -1)[rows, slots]
        return seen.unsqueeze(1)


def backend_mask(mask: torch.BoolTensor, implementation: str, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask as an attention backend wants it: the eager one adds it to the scores."""
    if implementation != "eager":
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def masked_or_causal(
    mask: torch.BoolTensor | None, implementation: str, rows: int, like: torch.Tensor
) -> torch.Tensor | None:
    """As [`backend_mask`]; without a mask attention is causal, which the eager backend has to be told."""
    if mask is None and implementation == "eager":
        mask = torch.ones(1, 1, rows, rows, dtype=torch.bool, device=like.device).tril()
    return None if mask is None else backend_mask(mask, implementation, like.dtype)


def keys_and_values(
    attention: nn.Module,
    rows: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    norm: Callable[[torch.Tensor], torch.Tensor] = lambda keys: keys,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What an attention layer makes of rows `[B, T, d]` that ask for nothing: `[B, heads, T, head_dim]` each."""
    heads = (*rows.shape[:-1], -1, attention.head_dim)
    keys = norm(attention.k_proj(rows).view(heads)).transpose(1, 2)
    cos, sin = (part.unsqueeze(1) for part in position_embeddings)
    return keys * cos + rotate_half(keys) * sin, attention.v_proj(rows).view(heads).transpose(1, 2)


class BlockCache:
    """
    Keys and values of one `generate()` call: first the committed columns of every row of the batch, then scratch
    columns of the forwards that draft, which the next committed forward overwrites. Written in place; it grows by
    doubling.

    Args:
        config ([`~transformers.LlamaConfig`]): For the number of layers and the geometry of the heads.
        batch_size (`int`): Rows of the batch.
        columns (`int`): Columns to make room for at first (one slot of one position is one column).
        dtype (`torch.dtype`): Of keys and values.
        device (`torch.device`): Of keys and values.
    """

    def __init__(self, config: LlamaConfig, batch_size: int, columns: int, dtype: torch.dtype, device: torch.device):
        shape = (batch_size, config.num_key_value_heads, columns, config.head_dim)
        # Zeros, because a ragged batch attends over columns that it masks and has not written: NaN would come through.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.offsets: int | torch.LongTensor = 0
        self.width = 0

    def seek(self, offsets: int | torch.LongTensor, width: int) -> None:
        """
        Say where the next forward writes.

        Args:
            offsets (`int` or `torch.LongTensor` of shape `[B]`): First column to write, the same for all rows or one
                for each.
            width (`int`): Columns `[0, width)` are what the next forward attends to, its own included.
        """
        self.offsets, self.width = offsets, width
        if width > self.keys[0].shape[2]:
            room = self._room(width)
            self.keys = [_grown(k, room) for k in self.keys]
            self.values = [_grown(v, room) for v in self.values]

    def _room(self, width: int) -> int:
        """Columns to make where so many are needed."""
        return max(width, 2 * self.keys[0].shape[2])

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Go on with these rows of the batch and forget the others."""
        index = on_device(rows, self.keys[0].device)
        self.keys = [k[index] for k in self.keys]
        self.values = [v[index] for v in self.values]

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Called by the attention layer with `[B, heads, Q, head_dim]`; returns all visible keys and values."""
        for store, new in ((self.keys[layer_idx], keys), (self.values[layer_idx], values)):
            if isinstance(self.offsets, int):
                store[:, :, self.offsets : self.offsets + new.shape[2]] = new
            else:
                columns = self.columns_of(new.shape[2])[:, None, :, None]
                # Under autocast they come in another dtype.
                store.scatter_(2, columns.expand_as(new), new.to(store.dtype))
        return self.keys[layer_idx][:, :, : self.width], self.values[layer_idx][:, :, : self.width]

    def columns_of(self, count: int) -> torch.LongTensor:
        """Where rows write so many columns, `[B or 1, count]`."""
        first = self.offsets if isinstance(self.offsets, int) else self.offsets[:, None]
        return first + torch.arange(count, device=self.keys[0].device).unsqueeze(0)


class FixedBlockCache(BlockCache):
    """
    The same in memory that stays where it is: it grows at most once for the scratch of a kind of round, and exactly.
    What a row would write behind the columns that it was made with, which is padding, ends up in the last of them.
    """

    def __init__(self, config: LlamaConfig, batch_size: int, columns: int, dtype: torch.dtype, device: torch.device):
        super().__init__(config, batch_size, columns, dtype, device)
        self._own = columns

    def _room(self, width: int) -> int:
        return width

    def clear(self) -> None:
        for store in (*self.keys, *self.values):
            store.zero_()

    def columns_of(self, count: int) -> torch.LongTensor:
        columns = super().columns_of(count)
        return columns if isinstance(self.offsets, int) else columns.clamp_max(self._own - 1)


def _grown(store: torch.Tensor, columns: int) -> torch.Tensor:
    new = store.new_zeros((*store.shape[:2], columns, store.shape[3]))
    new[:, :, : store.shape[2]] = store
    return new


class GraphCache:
    """
    The same for training: it concatenates, so that gradients flow into the keys of earlier forwards.

    Args:
        num_layers (`int`): Layers of the network.
    """

    def __init__(self, num_layers: int):
        self.keys: list[torch.Tensor | None] = [None] * num_layers
        self.values: list[torch.Tensor | None] = [None] * num_layers

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args, **kwargs):
        if self.keys[layer_idx] is not None:
            keys = torch.cat([self.keys[layer_idx], keys], dim=2)
            values = torch.cat([self.values[layer_idx], values], dim=2)
        self.keys[layer_idx], self.values[layer_idx] = keys, values
        return keys, values


def committed_mask(
    rows: int, size: int, offsets: int | torch.LongTensor, width: int, device
) -> torch.BoolTensor | None:
    """
    Who sees whom in a forward over new committed pairs: everything before, and one's own row up to one's own slot.

    Args:
        rows (`int`): New pairs R.
        size (`int`): Slots K of a pair.
        offsets (`int` or `torch.LongTensor` of shape `[B]`): Committed columns before them.
        width (`int`): Columns in all.
        device (`torch.device`): Where to make it.

    Returns:
        `torch.BoolTensor` of shape `[B or 1, 1, R * K, width]`, or `None` where plain causal attention says the same.
    """
    if isinstance(offsets, int) and offsets == 0:
        return None
    own = torch.arange(rows * size, device=device)
    first = offsets if isinstance(offsets, int) else offsets[:, None, None, None]
    return torch.arange(width, device=device).expand(1, 1, 1, -1) <= first + own[:, None]


@dataclass
class BlockPath:
    """
    The way from the committed pairs to the rows of a later block.

    Args:
        visible (`torch.LongTensor` of shape `[B, R]`):
            First-block columns that a row sees: those of all earlier pairs, and at its own pair the slots before the
            cut.
        size (`int`): Slots K of a row.
        later (`torch.BoolTensor` of shape `[B, R, columns]`, *optional*):
            Which columns of the later blocks on the way a row sees; `None` for a block that follows the first one.
    """

    visible: torch.LongTensor
    size: int
    later: torch.BoolTensor | None = None

    @property
    def columns(self) -> int:
        """Columns of the later blocks on the way."""
        return 0 if self.later is None else self.later.shape[-1]

    @cached_property
    def own(self) -> torch.BoolTensor:
        """Who sees whom within the block, `[R * K, R * K]`: the slots of its own row up to its own."""
        rows = torch.arange(self.visible.shape[1] * self.size, device=self.visible.device) // self.size
        return (rows[:, None] == rows).tril()

    def step(self, rows: torch.LongTensor, slots: torch.LongTensor) -> BlockPath:
        """
        The paths of rows that start at slots of the block that these paths led to.

        Args:
            rows (`torch.LongTensor` of shape `[B, R']`): Row of that block which each new row continues.
            slots (`torch.LongTensor` of shape `[B, R']`): Slot of it where the new row starts.
        """
        seen = self.own[rows * self.size + slots]
        if self.later is not None:
            before = self.later.gather(1, rows.unsqueeze(-1).expand(-1, -1, self.columns))
            seen = torch.cat([before, seen], dim=-1)
        return BlockPath(self.visible.gather(1, rows), self.size, seen)

    def mask(self, first_width: int) -> torch.BoolTensor:
        """
        Who sees whom in a later block: its path, and the slots of its own row up to its own.

        Args:
            first_width (`int`): Columns of the first block, all pairs together.

        Returns:
            `torch.BoolTensor` of shape `[B, 1, R * K, columns]`, the columns of one block after those of the block
                before.
        """
        path = torch.arange(first_width, device=self.visible.device) < self.visible.unsqueeze(-1)
        if self.later is not None:
            path = torch.cat([path, self.later], dim=-1)
        if self.size > 1:
            path = path.repeat_interleave(self.size, dim=1)
        return torch.cat([path, self.own.expand(len(path), -1, -1)], dim=-1).unsqueeze(1)
