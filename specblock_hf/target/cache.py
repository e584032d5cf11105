# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The target's keys and values while trees grow on them: which columns count, and what a walk leaves of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, StaticCache, cache_utils

from ..compat import crop
from ..devices import on_device
from .cache_layer import RoomyLayer
from .recurrent import LayerStates, RecurrentStates


@dataclass
class _SafePoint:
    """
    What a cache can go back to: so many columns. Layers that see all hold them as long as they hold more; of those
    that slide, which drop columns, here are the keys, the values and the number of columns so far.
    """

    width: int
    sliding: dict[int, tuple[torch.Tensor | None, torch.Tensor | None, int]]
    states: list[LayerStates]


class TargetCache:
    """
    A target's cache in which every row of the batch ends in the same column, however much of a tree each row keeps: a
    row that keeps less is shifted to the right, behind more padding. So columns of a row are as far apart as its
    positions are, which is what sliding windows count, and no column is wasted on all rows.

    Args:
        cache ([`~transformers.DynamicCache`] or [`~transformers.StaticCache`]): What `generate()` prepared.
        batch_size (`int`): Rows of the batch.
        width (`int`): Columns that hold committed tokens, once the prompt has been read.
        visible (`torch.BoolTensor` of shape `[B, width]`, *optional*):
            Columns that count; `None` for all, which stays so until rows grow apart.
        device (`torch.device`): Where masks are made, which need not be the layers'.

    Attributes:
        static (`bool`): The cache does not grow.
        own (`list[int]`): Columns of each row without the padding that shifting it brought.
        states ([`RecurrentStates`]): Of layers that keep a state beside, or instead of, keys and values.
    """

    def __init__(
        self, cache: Any, batch_size: int, width: int, visible: torch.BoolTensor | None, device: torch.device
    ):
        self.cache = cache
        self._device = device
        self.width = width
        self.visible = visible
        self.static = isinstance(cache, StaticCache)
        self.own = [width] * batch_size
        self.states = RecurrentStates(cache)
        self._safe: _SafePoint | None = None
        self._shifting = False

    def room(self) -> int | None:
        """Free columns of a static cache; `None` for one that grows."""
        return self.cache.get_max_length() - self.width if self.static else None

    def stored(self, layer: int) -> int:
        """How many of the committed columns a layer holds; one that slides drops those before its window."""
        return self.width if self.static else self.cache.layers[layer].keys.shape[-2]

    def chain_mask(self, count: int) -> torch.LongTensor | None:
        """Plain decoding's own mask `[B, T]` for `count` new columns that are a text; `None` if all columns count."""
        visible = self.visible
        if visible is None and self.static and self.states:
            # Convolutions that record make transformers take a static cache for one that grows, all of which counts.
            visible = torch.ones(len(self.own), self.width, dtype=torch.bool, device=self._device)
        return None if visible is None else nn.functional.pad(visible, (0, count), value=True).long()

    def unused(self, layer: int, count: int) -> int:
        """Columns behind `count` new ones that the layer shows to the attention although nothing is in them."""
        return self.cache.layers[layer].keys.shape[-2] - self.width - count if self.static else 0

    def begin_prompt(self) -> None:
        """Before the target reads the prompt: sliding layers need not keep what they slide over."""
        self._record_past(False)
        self.secure(int(self.cache.get_seq_length()))

    def read_prompt(self, columns: int) -> None:
        """
        The target has read the prompt up to this column.

        Raises:
            ValueError: It added others than these, or not to this cache.
        """
        filled = self._filled
        # A static layer has to be asked on its device.
        held = {int(layer.get_seq_length()) for layer in filled[: 1 if self.static else None]}
        if held != {columns}:
            raise ValueError(
                f"the target's cache holds {' or '.join(map(str, sorted(held))) or 'no'} columns after {columns} "
                "tokens of the prompt, behind which a draft tree would have to stand: the target adds tokens of its "
                "own, or goes on with another cache; drop assistant_model."
            )
        self.secure(columns)

    def secure(self, width: int) -> None:
        """
        What a call that is broken off from now on leaves of a user's cache: its first `width` columns. Behind the
        prompt they hold committed tokens only, which are the first of those that were emitted, so that plain decoding
        is right to go on with the cache and all that the user was shown. The rows of a batch are at different tokens,
        of which nobody has been shown any: they go back to their prompts.
        """
        if is_users(self.cache):
            sliding = {
                index: (layer.keys, layer.values, layer.cumulative_length)
                for index, layer in enumerate(self.cache.layers)
                if isinstance(layer, cache_utils.DynamicSlidingWindowLayer)
            }
            self._safe = _SafePoint(width, sliding, self.states.snapshot())

    def begin_rounds(self) -> None:
        """
        After the target has read the prompt, whose last column is the first root's: it counts as scored and not as
        committed.
        """
        # Only from here on: recording would keep every row of a long prompt in the sliding layers.
        self._record_past(True)
        layers = self.cache.layers
        for index, layer in enumerate(layers):
            if type(layer) is cache_utils.DynamicLayer and layer.is_initialized:
                layers[index] = RoomyLayer(layer)
                layer.keys = layer.values = None
        self.width -= 1
        self.own = [columns - 1 for columns in self.own]
        if self.visible is not None:
            self.visible = self.visible[:, :-1]

    def empty(self) -> None:
        """Forget what the layers hold, because the target reads all of it again."""
        self.secure(0)
        for layer in self._filled:
            if self.static:
                layer.cumulative_length.zero_()
            else:
                layer.keys, layer.values = layer.keys[..., :0, :], layer.values[..., :0, :]
                if layer.is_sliding:
                    layer.cumulative_length = 0

    def end(self, kept: bool, broken_off: bool) -> None:
        """
        Give the cache its own layers back.

        Args:
            kept (`bool`): Somebody goes on with it.
            broken_off (`bool`):
                An exception ended the call, wherever it was; the cache goes back to what [`~TargetCache.secure`] said.
        """
        self._record_past(False)
        layers = self.cache.layers
        for index, layer in enumerate(layers):
            if type(layer) is RoomyLayer:
                layers[index] = layer.original(kept and not broken_off)
        if kept:
            self.states.release()
        if broken_off and self._safe is not None:
            self._go_back(self._safe)

    def _go_back(self, safe: _SafePoint) -> None:
        # Rows that were being shifted are nowhere in particular; of nothing, all is read again.
        width = 0 if self._shifting else safe.width
        shifts = [self.width - own for own in self.own] if len(self.own) > 1 else [0]
        source = torch.tensor(shifts, device="cpu").unsqueeze(1) + torch.arange(width, device="cpu")
        if width == 0:
            self.states.forget()
        else:
            self.states.restore(safe.states)
        for index, layer in enumerate(self.cache.layers):
            if not isinstance(layer, cache_utils.CacheLayerMixin):
                continue
            if self.static:
                layer.cumulative_length.fill_(width)
            elif width == 0:
                layer.keys = layer.values = None
                layer.is_initialized = False
                if layer.is_sliding:
                    layer.cumulative_length = 0
            elif index in safe.sliding:
                layer.keys, layer.values, layer.cumulative_length = safe.sliding[index]
            elif layer.keys is not None:
                columns = source[:, None, :, None].to(layer.keys.device)
                layer.keys = layer.keys.take_along_dim(columns, dim=2)
                layer.values = layer.values.take_along_dim(columns, dim=2)

    def commit(self, nodes: torch.LongTensor, scored: int) -> None:
        """
        Keep the walked nodes' columns next to those of their row and drop the others.

        Args:
            nodes (`torch.LongTensor` of shape `[B, E]`): Kept nodes of each row; -1 is padding.
            scored (`int`): Nodes that the last forward appended.
        """
        kept = nodes.tolist()
        self._shifting = len(kept) > 1
        lengths = [sum(node >= 0 for node in row) for row in kept]
        widest = max(lengths)
        self.own = [own + length for own, length in zip(self.own, lengths, strict=True)]
        # Never less than before, although the longest row may have gone: sliding layers have dropped what that needs.
        width = max(self.width, *self.own)
        if min(lengths) == widest and width == self.width + widest:
            if any(row != list(range(widest)) for row in kept):
                self._move(self.width + on_device(kept, self._device), self.width)
            if self.visible is not None:
                self.visible = nn.functional.pad(self.visible, (0, widest), value=True)
        else:
            source = self._shifted(on_device(kept, self._device), width)
            self._see(source)
            self._move(source.clamp_min(0), 0)
        self.states.commit(lengths, scored)
        # Sliding layers return to their window here, even if nothing is dropped.
        crop(self.cache, self.width + scored - width)
        self.width = width
        self._shifting = False
        if len(kept) == 1:
            self.secure(width)

    def keep_rows(self, rows: list[int]) -> None:
        """Go on with these rows of the batch and forget the others."""
        self.own = [self.own[row] for row in rows]
        index = on_device(rows, self._device)
        if self.visible is not None:
            self.visible = self.visible[index.to(self.visible.device)]
        self.states.keep_rows(index)
        for layer in self._filled:
            own = index.to(layer.keys.device)
            if self.static:
                layer.keys, layer.values = layer.keys[own], layer.values[own]
            else:
                layer.batch_select_indices(own)

    def behind(self) -> list[int]:
        """1 for each row that has fewer tokens than another, 0 for the others; empty if all have as many."""
        longest = max(self.own)
        return [int(own < longest) for own in self.own] if min(self.own) < longest else []

    def align_left(self) -> None:
        """Lay every row's columns out as plain decoding does, token j in column j."""
        own = torch.tensor(self.own, device="cpu").unsqueeze(1)
        source = self.width - own + torch.arange(self.width, device="cpu")
        self._shifting = True
        self._move(source.clamp_max(self.width - 1), 0)
        self.own = [self.width] * len(self.own)
        self._shifting = False

    def _record_past(self, on: bool) -> None:
        """
        Sliding layers must not drop columns before a tree's rejected nodes are gone; transformers has no call to end
        that.
        """
        for layer in self.cache.layers:
            if isinstance(layer, cache_utils.DynamicSlidingWindowLayer):
                layer.record_past = on
        self.states.record_past(on)

    def _shifted(self, nodes: torch.LongTensor, width: int) -> torch.LongTensor:
        """What moves to each column `[B, width]`: a committed column, a node behind these, or -1 for padding."""
        lengths = (nodes >= 0).sum(1, keepdim=True)
        from_end = width - 1 - torch.arange(width, device=nodes.device)
        picked = nodes.gather(1, (lengths - 1 - from_end).clamp(0, nodes.shape[1] - 1))
        committed = (self.width - 1 - (from_end - lengths)).clamp_min(-1)
        return torch.where(from_end < lengths, self.width + picked, committed)

    def _see(self, source: torch.LongTensor) -> None:
        """Let `visible` follow the columns of `source`."""
        visible = self.visible
        if visible is None:
            visible = torch.ones(source.shape[0], self.width, dtype=torch.bool, device=self._device)
        visible = visible.gather(1, source.clamp(0, self.width - 1))
        self.visible = (source >= self.width) | ((source >= 0) & visible)

    def _move(self, source: torch.LongTensor, start: int) -> None:
        """Write what columns `source` `[B, count]` hold to the columns from `start` on, in all layers with rows."""
        for layer in self._filled:
            # A sliding layer lacks the oldest columns, and nobody asks for what moves out of it.
            first = 0 if self.static else layer.get_seq_length() - layer.keys.shape[-2]
            skipped = max(first - start, 0)
            index = (source[:, skipped:].to(layer.keys.device) - first).clamp_min(0)[:, None, :, None]
            there = slice(start + skipped - first, start + source.shape[1] - first)
            for rows in (layer.keys, layer.values):
                rows[..., there, :] = rows.gather(2, index.expand(-1, rows.shape[1], -1, rows.shape[3]))

    @property
    def _filled(self) -> list[Any]:
        """The layers that hold keys and values."""
        layers = self.cache.layers
        return [layer for layer in layers if isinstance(layer, cache_utils.CacheLayerMixin) and layer.keys is not None]


_STATIC_LAYERS = {cache_utils.StaticLayer, cache_utils.LinearAttentionAndStaticFullAttentionLayer}


def is_users(cache: Any) -> bool:
    """Whether the cache was passed to `generate()`, which notes that on it, and so outlives the call."""
    return vars(cache).get("_is_user_defined", False)


def check_cache(cache: Any, batch_size: int, returns_cache: bool) -> None:
    """
    Refuse caches whose columns cannot be rearranged.

    Args:
        cache ([`~transformers.Cache`]): What `generate()` prepared.
        batch_size (`int`): Rows of the batch.
        returns_cache (`bool`): Somebody goes on with the cache after the call.

    Raises:
        ValueError: In one sentence: what, why and what to do.
    """
    # A subclass may store its rows differently, so this is about the exact classes.
    if type(cache) not in (DynamicCache, StaticCache) or cache.offloading:
        raise ValueError(
            f"the cache is a {type(cache).__name__} whose rows a draft tree cannot rearrange; pass a "
            "DynamicCache or a StaticCache that is not offloaded, or none."
        )
    if any(vars(layer).get("record_past") for layer in cache.layers):
        raise ValueError(
            "this cache records the past of its layers, so that somebody can crop it after the call, and a drafted "
            "call rolls that back itself; pass one without activate_past_recording(), or drop assistant_model."
        )
    attends = [type(layer) for layer in cache.layers if isinstance(layer, cache_utils.CacheLayerMixin)]
    if type(cache) is StaticCache and not _STATIC_LAYERS.issuperset(attends):
        raise ValueError(
            "this StaticCache has layers that slide, which overwrite rows before a draft tree is verified; pass a "
            "DynamicCache, or none."
        )
    if type(cache) is StaticCache and batch_size > 1 and RecurrentStates(cache):
        raise ValueError(
            "the recurrent states of a batch lie at different tokens, between which a StaticCache has no room; pass a "
            "DynamicCache, or none."
        )
    if type(cache) is StaticCache and batch_size > 1 and returns_cache:
        raise ValueError(
            "the rows of a batch end at different rounds and a StaticCache has no room to keep those that have ended; "
            "leave out return_dict_in_generate and the cache, or pass a DynamicCache."
        )
