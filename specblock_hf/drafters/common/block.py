# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
What drafters have in common that attend to every committed pair: taking pairs in, and starting again below tree nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...devices import upload
from ...drafting.drafter import DraftState
from ...drafting.pairs import Pairs, TokenTable
from ...trees.expansion import Starts
from ...trees.tree import DraftTree
from .cache import BlockCache, BlockPath, FixedBlockCache, committed_mask
from .network import NetworkDrafter


PREFILL_PAIRS = 256  # pairs of one committed forward: bounds its attention mask to (K * 256) x (K * all pairs)


@dataclass
class BlockState(DraftState):
    """
    Adds to [`DraftState`] the drafter's keys and values, and how many columns of them each row has committed: one
    number for a batch of one, for more a tensor `[B]` on the host, which thus knows the longest row without asking the
    device; and, where the shapes are fixed, what runs as the network's forward.
    """

    cache: BlockCache | None = None
    committed: int | torch.LongTensor = 0
    network: Callable[..., torch.Tensor] | None = None

    @property
    def offsets(self) -> int | torch.LongTensor:
        """`committed` where the cache is."""
        if isinstance(self.committed, int):
            return self.committed
        return upload(self.committed, self.cache.keys[0].device)

    @property
    def committed_column(self) -> int | torch.LongTensor:
        """The same in a form that goes with tensors `[B, S]`."""
        offsets = self.offsets
        return offsets if isinstance(offsets, int) else offsets.unsqueeze(1)

    @property
    def longest(self) -> int:
        """Columns that the longest row has committed."""
        return self.committed if isinstance(self.committed, int) else int(self.committed.max())

    def width_with(self, columns: int) -> int:
        """Columns that a forward attends to which adds so many to the committed ones."""
        return self.longest + columns

    def advance(self, pairs: Pairs, columns: int = 1) -> None:
        """
        Count pairs as committed.

        Args:
            pairs ([`Pairs`]): Those; of a batch of one none is padding.
            columns (`int`, *optional*, defaults to 1): Of each pair.
        """
        if isinstance(self.committed, int):
            self.committed += pairs.tokens.shape[1] * columns
        else:
            self.committed = self.committed + pairs.host_lengths() * columns

    def keep_rows(self, places: Sequence[int]) -> None:
        super().keep_rows(places)
        self.cache.keep_rows(places)
        assert isinstance(self.committed, torch.Tensor)  # a batch of one has no row to lose
        left = self.committed[places]
        self.committed = left if len(places) > 1 else int(left)


@dataclass
class FixedBlockState(BlockState):
    """
    Of fixed shapes: `lengths` counts the committed columns of every row where the cache is, and every forward attends
    to all `columns` that could be committed.
    """

    cache: FixedBlockCache | None = None
    lengths: torch.Tensor | None = None
    columns: int = 0

    @classmethod
    def empty(
        cls, drafter: NetworkDrafter, columns_per_pair: int, table: TokenTable, batch_size: int, pairs: int, width: int
    ) -> FixedBlockState:
        """
        Args:
            drafter ([`NetworkDrafter`]): Whose state it is.
            columns_per_pair (`int`): Columns of the cache that a committed pair takes.
            table ([`TokenTable`]): The target's embedding and head, or the drafter's own.
            batch_size (`int`): Rows of the batch.
            pairs (`int`): Most pairs that a row may commit.
            width (`int`): Pairs that a round takes in, padding counted, which may be written behind all others.
        """
        columns = (pairs + 2 * width) * columns_per_pair
        cache = FixedBlockCache(drafter.config, batch_size, columns, drafter.dtype, drafter.device)
        lengths = torch.zeros(batch_size, dtype=torch.long, device=drafter.device)
        return cls(table, batch_size, pairs, cache=cache, network=drafter, lengths=lengths, columns=columns)

    @property
    def offsets(self) -> torch.LongTensor:
        return self.lengths.clone()

    def width_with(self, columns: int) -> int:
        return self.columns

    def advance(self, pairs: Pairs, columns: int = 1) -> None:
        self.lengths.add_(pairs.lengths * columns)

    def reset(self) -> None:
        super().reset()
        self.lengths.zero_()
        self.cache.clear()

    def fuse(self, wrap: Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]) -> None:
        self.network = wrap(self.network)


class BlockDrafter(NetworkDrafter):
    """
    A drafter whose network keeps keys and values of K slots (`config.block_size`; 1 for EAGLE-3) for every committed
    pair. The network's `forward(embeds, conditions, positions, mask, cache)` turns rows into states `[B, R, K, d]`,
    and `project_features` makes the conditions of committed pairs. The conditions of later rows are states that the
    forward returned. `keep_keys`, with the forward's arguments, is a forward of which nobody reads the states.
    """

    state_class: type[Any] = BlockState  # what `begin` makes

    @property
    def columns_per_pair(self) -> int:
        """Slots of a committed pair whose keys and values are kept."""
        return self.config.block_size

    def begin(self, table: TokenTable, batch_size: int, max_length: int, *, first_position: int = 0) -> Any:
        committed = 0 if batch_size == 1 else torch.zeros(batch_size, dtype=torch.long, device="cpu")
        columns = min(max_length, PREFILL_PAIRS) * self.columns_per_pair
        cache = BlockCache(self.config, batch_size, columns, self.dtype, self.device)
        return self.state_class(
            self.own_table(table), batch_size, max_length, first_position, cache=cache, committed=committed
        )

    def begin_fixed(self, table: TokenTable, batch_size: int, max_length: int, width: int) -> FixedBlockState:
        return FixedBlockState.empty(self, self.columns_per_pair, self.own_table(table), batch_size, max_length, width)

    def extend(self, state: BlockState, pairs: Pairs) -> None:
        for first in range(0, pairs.tokens.shape[1], PREFILL_PAIRS):
            self._commit(state, pairs.part(first, PREFILL_PAIRS), self.keep_keys)

    def _first_block(self, state: BlockState, pairs: Pairs) -> tuple[DraftTree, torch.Tensor, torch.LongTensor]:
        """Take `pairs` in; a tree of roots, and the states `[B, 1, K, d]` and positions `[B, 1]` of the last pairs."""
        before, pairs = pairs.split(PREFILL_PAIRS)
        if before is not None:
            self.extend(state, before)
        hidden = self._commit(state, pairs, state.network or self)
        last = (pairs.lengths - 1).clamp_min(0).to(self.device)
        hidden = hidden[torch.arange(len(hidden), device=self.device), last].unsqueeze(1)
        return self.root_of(pairs), hidden, pairs.positions.to(self.device).gather(1, last.unsqueeze(1))

    def _commit(self, state: BlockState, pairs: Pairs, forward: Callable[..., Any]) -> Any:
        """
        What a forward over at most `PREFILL_PAIRS` new pairs returns, which leaves their keys behind: states
        `[B, T, K, d]`, or nothing if it is `keep_keys`.
        """
        size, count = self.columns_per_pair, pairs.tokens.shape[1]
        embeds = replace(pairs, table=state.table).embeds().to(self.device, self.dtype)
        features = torch.cat([f.to(self.device, self.dtype) for f in pairs.features], dim=-1)
        offsets, width = state.offsets, state.width_with(count * size)
        state.advance(pairs, size)
        state.cache.seek(offsets, width)
        mask = committed_mask(count, size, offsets, width, self.device)
        state.calls += 1
        state.forward_rows += len(embeds) * count
        positions = pairs.positions.to(self.device)
        return forward(embeds, self.project_features(features), positions, mask, state.cache)

    def _path_to(self, starts: Starts, path: BlockPath | None, state: BlockState) -> BlockPath:
        """What new starts see, given the path of the block before; `None` for the first."""
        if path is not None:
            return path.step(starts.parent_start, starts.slot)
        # The committed columns end with the drafting pair's own K; a start sees those up to its slot.
        own = state.committed_column - self.config.block_size
        return BlockPath(own + 1 + starts.slot, self.config.block_size)

    def _later_block(
        self,
        state: BlockState,
        before: torch.Tensor,
        starts: Starts,
        path: BlockPath,
        positions: torch.LongTensor,
        first_width: int,
    ) -> torch.Tensor:
        """One batched forward over all starts; its keys are scratch that the next commit overwrites."""
        size, count = self.config.block_size, starts.slot.shape[1]
        flat = starts.parent_start * size + starts.slot
        conditions = before.flatten(1, 2).gather(1, flat.unsqueeze(-1).expand(-1, -1, before.shape[-1]))
        embeds = state.table.embed(starts.tokens).to(self.device, self.dtype)
        offset = first_width + path.columns
        state.cache.seek(offset, offset + count * size)
        state.calls += 1
        state.forward_rows += len(embeds) * count
        mask = path.mask(first_width)
        forward = state.network or self
        return forward(embeds, conditions, positions.expand(-1, count), mask, state.cache)
