# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Hidden states and attentions of the emitted tokens, as plain `generate()` hands them back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .cache import TargetCache


Layers = tuple[torch.Tensor, ...]


class TokenOutputs:
    """
    Picks the verified nodes' hidden states and attentions out of the target's forwards. Every emitted token has an
    entry: that of the first one covers the prompt (its last chunk, if it was read in chunks), and the others a single
    query, whose attention spans the columns that plain decoding would have shown it: those of its row without the
    padding that a batch has between rounds, then its own path. After a row's end its entries are zeros.

    Args:
        wanted (sequence of `str`): `"hidden_states"`, `"attentions"`, both or none.
        batch_size (`int`): Rows of the batch.
        windows (sequence of `int`, *optional*): Sliding window of each layer; `None` for one that sees all.
        last_chunk (`int`): Tokens of the prompt's last chunk as the call asks for it; a prompt with pictures is read
            at once all the same.
    """

    def __init__(self, wanted: Sequence[str], batch_size: int, windows: Sequence[int | None], last_chunk: int):
        self._wanted, self._last_chunk = tuple(wanted), last_chunk
        self._windows = windows
        self._seen: dict[str, Layers] = {}
        self._prompt: dict[str, Layers] = {}
        # One list for each row, one entry for each of its tokens after the first.
        self._rows: dict[str, list[list[Layers]]] = {name: [[] for _ in range(batch_size)] for name in wanted}

    @property
    def flags(self) -> dict[str, bool]:
        """What makes the target's forward return them."""
        return {f"output_{name}": True for name in self._wanted}

    def observe(self, outputs: Any) -> None:
        """Take in what a forward of the target returned."""
        # None where the attention backend has none to show, for which plain decoding hands back empty tuples.
        self._seen = {name: outputs.get(name) or () for name in self._wanted}

    def keep(self, nodes: torch.LongTensor, committed: TargetCache, again: Sequence[int] | None = None) -> None:
        """
        Keep the walked nodes' part of the last forward.

        Args:
            nodes (`torch.LongTensor` of shape `[B, E]`): Kept nodes of each row; -1 is padding.
            committed ([`TargetCache`]): As it was during that forward.
            again (sequence of `int`, *optional*): Columns of each row that it read again, before its nodes.
        """
        if not self._wanted:
            return
        if not self._prompt:
            # Both have their queries in the last dimension but one.
            self._prompt = {
                name: tuple(layer[..., -self._last_chunk :, :] for layer in layers)
                for name, layers in self._seen.items()
            }
            return
        for row, first in enumerate(again or [0] * len(nodes)):
            path = torch.cat((torch.arange(first, device="cpu"), first + nodes[row][nodes[row] >= 0]))
            for name, layers in self._seen.items():
                for depth in range(first, len(path)):
                    if name == "hidden_states":
                        # Gemma 3n has several states at every token, `[N, B, S, d]`.
                        entry = tuple(layer[..., row, path[depth], :][..., None, None, :] for layer in layers)
                    else:
                        entry = self._attended(layers, row, path[: depth + 1], committed)
                    self._rows[name][row].append(entry)

    def output(self) -> dict[str, tuple[Layers, ...]]:
        """`hidden_states` and `attentions` of what `generate()` returns, whichever are wanted."""
        result = {}
        for name, rows in self._rows.items():
            longest = max(rows, key=len)
            steps = [
                tuple(
                    torch.cat(
                        [row[step][layer] if step < len(row) else torch.zeros_like(full) for row in rows],
                        dim=-3 if name == "hidden_states" else 0,
                    )
                    for layer, full in enumerate(layers)
                )
                for step, layers in enumerate(longest)
            ]
            result[name] = (self._prompt[name], *steps)
        return result

    def _attended(self, layers: Layers, row: int, path: torch.LongTensor, committed: TargetCache) -> Layers:
        """Of every layer `[1, H, 1, T]`: the path's last node's attention to its row's columns and to the path."""
        entry = []
        for number, layer in enumerate(layers):
            weights, window = layer[row, :, path[-1]], self._windows[number]
            # A layer that slides shows the newest of the committed columns, a static one also those still unused.
            stored = min(weights.shape[-1] - layer.shape[2], committed.width)
            first = stored - min(committed.own[row], stored)
            spanned = torch.cat((weights[:, first:stored], weights[:, stored + path.to(weights.device)]), dim=1)
            if window is not None:
                spanned = spanned[:, -window:]
            if committed.static:
                spanned = nn.functional.pad(spanned, (0, weights.shape[-1] - spanned.shape[-1]))
            entry.append(spanned[None, :, None])
        return tuple(entry)
