# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The pairs of a prompt: what a drafter is told before the first token."""

from __future__ import annotations

from typing import Any

import torch

from ..drafting.pairs import Pairs, TokenTable


class PromptPairs:
    """
    The pairs of a prompt: every token's state with the token that follows it, padding removed.

    Args:
        table (`TokenTable`): The target's embedding.
        ids (`torch.LongTensor` of shape `[B, P]`): The prompt; empty if it comes as embeddings.
        embeds (`torch.Tensor` of shape `[B, P, d]`, *optional*): The prompt's embeddings.
        new (`int`): How many of its last columns the target is about to read.
        visible (`torch.BoolTensor` of shape `[B, rows]`, *optional*):
            Which columns of cache and prompt count; `None` for all.
        rows (`int`): Columns of cache and prompt.
    """

    def __init__(
        self,
        table: TokenTable,
        ids: torch.LongTensor,
        embeds: torch.Tensor | None,
        new: int,
        visible: torch.BoolTensor | None,
        rows: int,
    ):
        self.table = table
        self.padded = visible is not None
        if visible is None:
            visible = torch.ones(ids.shape[0], rows, dtype=torch.bool, device=table.device)
        self.positions = (visible.cumsum(1) - 1)[:, -new:]
        self.visible = visible[:, -new:]
        self.tokens = torch.full(self.visible.shape, -1, device=table.device)
        self.embeds = None if embeds is None else torch.zeros_like(embeds[:, -new:], device=table.device)
        source: Any = ids if embeds is None else embeds
        following = self.tokens if self.embeds is None else self.embeds
        for row, columns in enumerate(seen.nonzero().squeeze(1) for seen in self.visible):
            following[row, columns[:-1]] = source[row, -new:].to(table.device)[columns[1:]]
        # Ids beyond the vocabulary stand for pictures, as embeddings do.
        self.tokens[self.tokens >= table.vocab_size] = -1

    def pairs(self, features: tuple[torch.Tensor, ...], start: int, end: int) -> Pairs:
        """Those of the new tokens `start` to `end`, whose states are `features`, each `[B, end - start, d]`."""
        visible = self.visible[:, start:end]
        lengths = visible.sum(1)
        order = (~visible).long().argsort(dim=1, stable=True)[:, : int(lengths.max()) if self.padded else None]

        def packed(values: torch.Tensor) -> torch.Tensor:
            if not self.padded:
                return values
            return values.take_along_dim(order.to(values.device).view(*order.shape, *[1] * (values.ndim - 2)), dim=1)

        return Pairs(
            tokens=packed(self.tokens[:, start:end]),
            features=tuple(packed(feature) for feature in features),
            positions=packed(self.positions[:, start:end]),
            lengths=lengths,
            table=self.table,
            given_embeds=None if self.embeds is None else packed(self.embeds[:, start:end]),
        )
