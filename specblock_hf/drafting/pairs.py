# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What the target says of a tree, and what a drafter learns from that: a state together with the token after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import nn

from ..devices import on_device, upload


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..trees.tree import DraftTree
    from ..trees.verification import Walk


class TokenTable:
    """
    The target's token embedding and head, as drafters need them; nothing of it is ever copied or saved with a drafter.

    Args:
        embedding (`nn.Module`): The target's input embedding, called with ids `[...]`, giving `[..., d]`.
        head (`nn.Module`): The target's output head, called with `[..., d]`, giving logits `[..., vocab_size]`.
        vocab_size (`int`): Number of ids that the target's head scores.
    """

    def __init__(self, embedding: nn.Module, head: nn.Module, vocab_size: int):
        self.embedding = embedding
        self.output_head = head
        self.vocab_size = vocab_size

    @classmethod
    def of(cls, target: PreTrainedModel) -> TokenTable:
        """Read the table off a stock transformers model."""
        return cls(
            target.get_input_embeddings(), target.get_output_embeddings(), target.config.get_text_config().vocab_size
        )

    def embed(self, ids: torch.LongTensor, raw: bool = False) -> torch.Tensor:
        """
        Args:
            ids (`torch.LongTensor` of any shape): Target token ids, on any device.
            raw (`bool`, *optional*, defaults to `False`):
                Skip what the embedding module does beside the look-up (Gemma scales its rows).

        Returns:
            `torch.Tensor` of shape `[*ids.shape, d]` in the target's dtype, on its device.
        """
        ids = ids.to(self.device)
        if not raw:
            return self.embedding(ids)
        with align_module_device(self.embedding):
            return nn.functional.embedding(ids, self.embedding.weight)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """The target's logits `[..., vocab_size]` of final hidden states `[..., d]`."""
        return self.output_head(hidden)

    @property
    def device(self) -> torch.device:
        """Where embeddings come from, wherever accelerate keeps their weights between forwards."""
        if has_offloaded_params(self.embedding):
            return torch.device(self.embedding._hf_hook.execution_device)
        return self.embedding.weight.device


@dataclass
class Pairs:
    """
    What the target has learned since the drafter was last asked: features at position i together with the token
    x_{i+1} that
    followed. Columns beyond a row's length are padding on the right.

    Args:
        tokens (`torch.LongTensor` of shape `[B, T]`): x_{i+1}; -1 where the prompt came as embeddings.
        features (`tuple` of `torch.Tensor` of shape `[B, T, d]`):
            One tensor per entry of the drafter's `feature_layers`, the target's states at x_i.
        positions (`torch.LongTensor` of shape `[B, T]`): i, counted without padding.
        lengths (`torch.LongTensor` of shape `[B]`): Valid columns of each row; 0 for one that has learned nothing.
        table (`TokenTable`): The target's embedding.
        given_embeds (`torch.Tensor` of shape `[B, T, d]`, *optional*): The embeddings of a prompt that had no ids.
        read (`list[list[int]]`, *optional*):
            `tokens` without padding, where the host knows them; see [`~Pairs.host_tokens`].
    """

    tokens: torch.LongTensor
    features: tuple[torch.Tensor, ...]
    positions: torch.LongTensor
    lengths: torch.LongTensor
    table: TokenTable
    given_embeds: torch.Tensor | None = None
    read: list[list[int]] | None = None

    def embeds(self) -> torch.Tensor:
        """The target's embeddings `[B, T, d]` of `tokens`, made only when a drafter asks for them."""
        if self.given_embeds is not None:
            return self.given_embeds
        return self.table.embed(self.tokens.clamp_min(0))

    def last_tokens(self) -> torch.LongTensor:
        """The last token of each row, `[B]`; any valid id for a row that has learned nothing."""
        last = (self.lengths - 1).clamp_min(0).unsqueeze(1)
        return self.tokens.gather(1, last).clamp_min(0).squeeze(1)

    def host_tokens(self) -> list[list[int]]:
        """The tokens of each row on the host, without padding; read from the device for a prompt only."""
        if self.read is not None:
            return self.read
        return [row[:length] for row, length in zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)]

    def host_lengths(self) -> torch.LongTensor:
        """`lengths` on the host; read from the device for a prompt only."""
        if self.read is None:
            return self.lengths.cpu()
        return torch.tensor([len(row) for row in self.read], device="cpu")

    def of_rows(self, rows: Sequence[int]) -> Pairs:
        """The pairs of these rows of the batch, without columns that are padding in all of them."""
        width = int(self.host_lengths()[list(rows)].max())
        index = on_device(rows, self.tokens.device)

        def picked(values: torch.Tensor) -> torch.Tensor:
            return values[index.to(values.device), :width]

        read = None if self.read is None else [self.read[row] for row in rows]
        return self.each(picked, lengths=self.lengths[index], read=read)

    def part(self, first: int, count: int) -> Pairs:
        """
        Some columns of every row.

        Args:
            first (`int`): The first of them.
            count (`int`): Most of them.

        Returns:
            [`Pairs`]: `[B, min(count, T - first)]`; a row that ends before has none.
        """
        return self.each(
            lambda values: values[:, first : first + count],
            lengths=(self.lengths - first).clamp(0, count),
            read=None if self.read is None else [row[first : first + count] for row in self.read],
        )

    def split(self, count: int) -> tuple[Pairs | None, Pairs]:
        """
        The ends of all rows apart from what is before them, however long each row is.

        Args:
            count (`int`): Most pairs of an end.

        Returns:
            `tuple`: The pairs before, `[B, T - count]`, or `None` if no row can have more than `count`; and the last
            ones, `[B, min(count, T)]`.
        """
        width = self.tokens.shape[1] - count
        if width <= 0:
            return None, self
        before = (self.lengths - count).clamp_min(0)
        columns = before[:, None] + torch.arange(count, device=before.device)

        def taken(values: torch.Tensor) -> torch.Tensor:
            return values.take_along_dim(columns.to(values.device).view(*columns.shape, *[1] * (values.ndim - 2)), 1)

        last = self.each(taken, lengths=self.lengths - before, read=None)
        return self.each(lambda values: values[:, :width], lengths=before, read=None), last

    def each(self, change: Callable[[torch.Tensor], torch.Tensor], **more: Any) -> Pairs:
        """With `change` of everything that is there for every pair, and what else is said."""
        return replace(
            self,
            tokens=change(self.tokens),
            features=tuple(map(change, self.features)),
            positions=change(self.positions),
            given_embeds=None if self.given_embeds is None else change(self.given_embeds),
            **more,
        )

    @classmethod
    def joined(cls, parts: Sequence[Pairs]) -> Pairs:
        """
        Pairs that came one after the other as one.

        Args:
            parts (sequence of [`Pairs`]): Of the same rows.
        """
        if len(parts) == 1:
            return parts[0]
        lengths = torch.stack([part.host_lengths() for part in parts])
        widths = [part.tokens.shape[1] for part in parts]
        # Columns of each row without the padding between them: they are moved to the left in their order.
        columns = [torch.arange(width, device="cpu") for width in widths]
        padding = torch.cat([c >= n.unsqueeze(1) for c, n in zip(columns, lengths, strict=True)], dim=1)
        order = padding.long().argsort(dim=1, stable=True)[:, : int(lengths.sum(0).max())]
        gather = None if not padding.any() else upload(order, parts[0].tokens.device)

        def packed(values: Sequence[torch.Tensor]) -> torch.Tensor:
            whole = torch.cat(list(values), dim=1)
            if gather is None:
                return whole
            index = gather.to(whole.device).view(*gather.shape, *[1] * (whole.ndim - 2))
            return whole.take_along_dim(index, dim=1)

        reads = [part.read for part in parts]
        embedded = any(part.given_embeds is not None for part in parts)
        return cls(
            tokens=packed([part.tokens for part in parts]),
            features=tuple(packed(feature) for feature in zip(*(part.features for part in parts), strict=True)),
            positions=packed([part.positions for part in parts]),
            lengths=torch.stack([part.lengths for part in parts]).sum(0),
            table=parts[0].table,
            given_embeds=packed([part.embeds() for part in parts]) if embedded else None,
            read=None if None in reads else [sum(rows, []) for rows in zip(*reads, strict=True)],
        )

    @classmethod
    def of(
        cls,
        tree: DraftTree,
        features: tuple[torch.Tensor, ...],
        walk: Walk,
        base: torch.LongTensor,
        table: TokenTable,
    ) -> Pairs:
        """
        The pairs that one verified round teaches: (state of the root, first emitted token), (state of that token,
        second), ...

        Args:
            tree (`DraftTree`): The verified tree; only its depths matter.
            features (`tuple` of `torch.Tensor` of shape `[B, N, d]`): The target's states at every node.
            walk (`Walk`): The kept nodes and the tokens that followed them.
            base (`torch.LongTensor` of shape `[B]`): Position of each row's root.
            table (`TokenTable`): The target's embedding.
        """
        kept = walk.to(base.device)
        gather = kept.nodes.clamp_min(0).unsqueeze(-1)
        steps = torch.arange(kept.nodes.shape[1], device=base.device)
        return cls(
            tokens=kept.tokens,
            features=tuple(f.gather(1, gather.to(f.device).expand(-1, -1, f.shape[-1])) for f in features),
            positions=base.unsqueeze(1) + steps,
            lengths=kept.lengths,
            table=table,
            read=walk.emitted(),
        )


@dataclass
class Scored:
    """
    What a forward of the target says.

    Args:
        logits (`torch.Tensor` of shape `[R, N, V]`):
            At every node; at the last position only for a prompt. Of the R rows that had not been retired.
        features (`tuple` of `torch.Tensor` of shape `[B, N, d]`):
            One for each of the drafter's `feature_layers`; those of retired rows mean nothing.
        rows (sequence of `int`): Which rows of the batch the logits belong to.
    """

    logits: torch.Tensor
    features: tuple[torch.Tensor, ...]
    rows: Sequence[int]
