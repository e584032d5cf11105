# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Attention of drafters that are trained along paths: every committed pair sees the pairs before it, and each pair has a
path of further rows, one a step, that sees the committed pairs up to its own and the earlier rows of its own path. A
mask over all columns would be almost empty, so a path's few rows are scored one by one.
"""

from __future__ import annotations

import torch


CHUNK = 256  # queries of one product: they need no columns of later pairs


class PathCache:
    """
    Keys and values of one layer for training: those of the committed pairs from the first forward, and one row of each
    pair's path from every later one. Gradients flow into them.
    """

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    @property
    def holds_pairs(self) -> bool:
        """Whether the committed pairs are in, so that what comes is a row of every path."""
        return bool(self.keys)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by the attention layer with `[B, heads, T, head_dim]`; returns what it was given."""
        self.keys.append(keys)
        self.values.append(values)
        return keys, values

    def attend(self, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """
        What the newest row of every path sees.

        Args:
            query (`torch.Tensor` of shape `[B, heads, T, head_dim]`): Of that row, whose keys are in.
            scaling (`float`): Factor of the scores.

        Returns:
            `torch.Tensor` of shape `[B, T, heads * head_dim]`.
        """
        pairs, pair_values = (stored[0].unsqueeze(2) for stored in (self.keys, self.values))
        path = torch.stack(self.keys[1:], dim=-2).unsqueeze(2)  # [B, key heads, 1, T, rows, head_dim]
        path_values = torch.stack(self.values[1:], dim=-2).unsqueeze(2)
        grouped = (query * scaling).unflatten(1, (pairs.shape[1], -1))
        places = torch.arange(query.shape[2], device=query.device)
        outputs = []
        for first in range(0, query.shape[2], CHUNK):
            rows = slice(first, min(first + CHUNK, query.shape[2]))
            part = grouped[:, :, :, rows]
            scores = part @ pairs[:, :, :, : rows.stop].transpose(-1, -2)
            ahead = places[: rows.stop] > places[rows, None]
            scores = scores + torch.zeros_like(ahead, dtype=scores.dtype).masked_fill_(ahead, -torch.inf)
            own = (path[:, :, :, rows] @ part.unsqueeze(-1)).squeeze(-1)
            weights = torch.cat([scores, own], dim=-1).softmax(-1)
            seen, on_path = weights.split((rows.stop, own.shape[-1]), dim=-1)
            out = seen @ pair_values[:, :, :, : rows.stop]
            outputs.append(out + (on_path.unsqueeze(-2) @ path_values[:, :, :, rows]).squeeze(-2))
        return torch.cat(outputs, dim=3).flatten(1, 2).transpose(1, 2).flatten(2)
