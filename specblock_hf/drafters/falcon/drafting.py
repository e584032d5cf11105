# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Falcon (https://huggingface.co/papers/2412.12639): semi-autoregressive blocks of k tokens in a static tree.

Kept of the paper: the network (two LSTM layers, one attention layer with the relaxed causal mask), which reads the
target's last states and predicts them k positions on; several forwards a round, each of which continues every path
that a forward before has ended; a tree whose shape is the same in every round; the objective, see [`falcon_loss`].
Left out: the authors' hand-made trees, instead of which the shape follows from how often a rank is right, so that
there is one for every budget; drawing the children where the target samples; the target's whole head, of which the
draft vocabulary's rows are trained here as in all drafters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ...devices import on_device
from ...drafting.pairs import Pairs, TokenTable
from ...drafting.plan import Limits
from ...drafting.target_batch import Losses, TargetBatch
from ...trees.static_shape import TreeShape, likely_shape
from ...trees.tree import DraftTree
from ..common.block import BlockDrafter, BlockState
from ..common.cache import BlockPath, keys_and_values
from .loss import FalconObjective, falcon_loss
from .modeling import FalconModel, Memory


@dataclass
class FalconState(BlockState):
    """
    Adds to [`BlockState`] what the LSTM knows, and what it said last.

    Args:
        memory (`tuple` of `torch.Tensor` of shape `[layers, B, d]`): After each row's last pair.
        recent (`torch.Tensor` of shape `[B, k, d]`): The states s of each row's last k pairs; zeros before the text.
    """

    memory: Memory | None = None
    recent: torch.Tensor | None = None

    def keep_rows(self, places: Sequence[int]) -> None:
        super().keep_rows(places)
        hidden, cell = self.memory
        self.memory = (hidden[:, places], cell[:, places])
        self.recent = self.recent[places]


@dataclass
class FalconBlock:
    """
    The rows of one forward, R blocks of k rows each.

    Args:
        features (`torch.Tensor` of shape `[B, R, k, d]`): What it predicted.
        memory (`tuple` of `torch.Tensor` of shape `[layers, B, R, d]`): Of the LSTM after each block's rows.
        path (`BlockPath`, *optional*): How the blocks hang on the committed pairs; `None` in the first one.
    """

    features: torch.Tensor
    memory: Memory
    path: BlockPath | None = None


class FalconDrafter(BlockDrafter, FalconModel):
    """
    A drafter that predicts k tokens a forward and continues the paths of a static tree, k tokens at a time.

    Args:
        config ([`FalconDrafterConfig`]): The drafter's configuration.

    Example:

    ```python
    >>> from specblock_hf import AutoDrafter

    >>> drafter = AutoDrafter.from_pretrained("org/falcon-smollm2-135m", target=target, dtype=target.dtype)
    >>> output = target.generate(**inputs, assistant_model=drafter, max_new_tokens=256)
    ```
    """

    objective_class = FalconObjective
    state_class = FalconState
    columns_per_pair = 1
    plans_that_pay = (
        *((nodes, 1, 0) for nodes in (3, 5, 7)),
        *((nodes, 2, 4) for nodes in (7, 11, 15)),
        *((15, 3, 4), (23, 3, 4), (23, 4, 8), (31, 4, 8), (60, 4, 0)),
    )

    def begin(self, table: TokenTable, batch_size: int, max_length: int, *, first_position: int = 0) -> FalconState:
        state = super().begin(table, batch_size, max_length, first_position=first_position)
        shape = (batch_size, self.config.block_size, self.config.hidden_size)
        state.recent = torch.zeros(shape, dtype=self.dtype, device=self.device)
        state.memory = self.no_memory(batch_size)
        return state

    def extend(self, state: FalconState, pairs: Pairs) -> None:
        (features,) = pairs.features
        count, lengths, offsets = pairs.tokens.shape[1], pairs.lengths.to(self.device), state.offsets
        embeds = replace(pairs, table=state.table).embeds().to(self.device, self.dtype)
        alone = state.batch_size == 1
        states, state.memory = self.read(
            embeds, features.to(self.device, self.dtype), state.memory, None if alone else pairs.host_lengths()
        )
        state.cache.seek(offsets, state.longest + count)
        state.forward_rows += len(embeds) * count
        layer, position_embeddings = self.layers[0], self.rotary_emb(states, pairs.positions.to(self.device))
        state.cache.update(*keys_and_values(layer.self_attn, layer.input_layernorm(states), position_embeddings), 0)
        state.advance(pairs)
        seen = torch.cat([state.recent, states], dim=1)
        last = lengths[:, None] + torch.arange(self.config.block_size, device=self.device)
        state.recent = seen.gather(1, last[..., None].expand(-1, -1, seen.shape[-1]))

    def propose(self, state: FalconState, pairs: Pairs, limits: Limits) -> DraftTree:
        self.extend(state, pairs)
        size, tree = self.config.block_size, self.root_of(pairs)
        shape = likely_shape(
            self.config.rank_weights,
            max(limits.nodes),
            min(size * limits.num_forwards, max(limits.depth)),
            size,
            limits.max_starts,
        )
        if len(shape.parents) == 1:
            return tree
        last = (pairs.lengths - 1).clamp_min(0).unsqueeze(1)
        positions = pairs.positions.gather(1, last).to(self.device)
        block = self._first_rows(state, positions)
        starts, number = [0], 0
        while True:
            tree = self._hang(tree, shape, starts, number, block.features)
            ends = [node for node, depth in enumerate(shape.depths) if depth == size * (number + 1)]
            after = [node for node in ends if node in shape.parents]
            if not after:
                return tree.limit_depth(limits.depth).prune(limits.nodes)
            rows = [starts.index(shape.ancestor(node, size * number)) for node in after]
            block = self._later_rows(state, block, rows, self._paths(tree, shape, after), positions, number)
            starts, number = after, number + 1

    def _hang(
        self, tree: DraftTree, shape: TreeShape, starts: list[int], number: int, features: torch.Tensor
    ) -> DraftTree:
        """
        Hang the levels of one forward below its starts.

        Args:
            tree ([`DraftTree`]): The levels before.
            shape (`TreeShape`): What it shall become.
            starts (`list[int]`): Nodes that the forward continues, a row each.
            number (`int`): Which forward of the round this is.
            features (`torch.Tensor` of shape `[B, R, k, d]`): What it predicted.
        """
        size, first = self.config.block_size, tree.tokens.shape[1]
        nodes = [n for n, depth in enumerate(shape.depths) if size * number < depth <= size * (number + 1)]
        slots = [shape.depths[n] - 1 - size * number for n in nodes]
        rows = [starts.index(shape.ancestor(n, size * number)) for n in nodes]
        tokens, log_probs = self.best_tokens(features, len(self.config.rank_weights))
        numbers = [rows, slots, [shape.ranks[n] for n in nodes], [shape.parents[n] for n in nodes]]
        *at, parents = on_device(numbers, self.device).unbind()
        origin = nn.functional.pad(at[1].unsqueeze(1), (1, 0), value=number)
        batch = len(features)
        assert nodes[0] == first  # the shape is listed level by level
        return DraftTree(
            tokens=torch.cat((tree.tokens, tokens[:, at[0], at[1], at[2]]), dim=1),
            parents=torch.cat((tree.parents, parents.expand(batch, -1)), dim=1),
            log_probs=torch.cat((tree.log_probs, log_probs[:, at[0], at[1], at[2]]), dim=1),
            origin=torch.cat((tree.origin, origin.expand(batch, -1, -1)), dim=1),
            height=shape.depths[nodes[-1]],
        )

    def _paths(self, tree: DraftTree, shape: TreeShape, nodes: list[int]) -> torch.LongTensor:
        """The last k tokens `[B, R, k]` on the way to each of R nodes."""
        size = self.config.block_size
        way = [[shape.ancestor(n, shape.depths[n] - size + 1 + slot) for slot in range(size)] for n in nodes]
        return tree.tokens[:, on_device(way, self.device)]

    def _first_rows(self, state: FalconState, positions: torch.LongTensor) -> FalconBlock:
        """The last k pairs, which see all pairs; `positions` `[B, 1]` are those of the last one."""
        size = self.config.block_size
        width = state.longest + size
        # They are in the cache already; what this forward writes behind them nobody sees.
        state.cache.seek(state.offsets, width)
        visible = torch.arange(width, device=self.device).expand(1, -1) < state.committed_column
        visible = visible[:, None, None].expand(-1, -1, size, -1)
        steps = torch.arange(1 - size, 1, device=self.device)
        state.calls += 1
        features = self(state.recent, positions + steps, visible, state.cache).unsqueeze(1)
        hidden, cell = state.memory
        return FalconBlock(features, (hidden.unsqueeze(2), cell.unsqueeze(2)))

    def _later_rows(
        self,
        state: FalconState,
        before: FalconBlock,
        rows: list[int],
        tokens: torch.LongTensor,
        positions: torch.LongTensor,
        number: int,
    ) -> FalconBlock:
        """
        The forward after forward `number`.

        Args:
            state (`FalconState`): Of the call.
            before (`FalconBlock`): The blocks that it continues.
            rows (`list[int]`): For each new block, which of those.
            tokens (`torch.LongTensor` of shape `[B, R, k]`): What was drafted there.
            positions (`torch.LongTensor` of shape `[B, 1]`): Of the last pair.
            number (`int`): Forwards before this one, less one.
        """
        size, (batch, count) = self.config.block_size, tokens.shape[:2]
        index = on_device(rows, self.device)
        features = before.features[:, index]
        embeds = state.table.embed(tokens).to(self.device, self.dtype)
        hidden, cell = (part[:, :, index].flatten(1, 2) for part in before.memory)
        states, memory = self.read(embeds.flatten(0, 1), features.flatten(0, 1), (hidden, cell))
        starts = index.expand(batch, -1)
        if before.path is None:
            nothing = torch.zeros(batch, count, dtype=torch.long, device=self.device)
            path = BlockPath(nothing + state.committed_column, size)
        else:
            path = before.path.step(starts, torch.full_like(starts, size - 1))
        first_width = state.longest
        mask = path.mask(first_width)
        own = torch.arange(count * size, device=self.device) // size
        mask[..., -count * size :] = own[:, None] == own
        offset = first_width + path.columns
        state.cache.seek(offset, offset + count * size)
        steps = torch.arange(size, device=self.device).repeat(count) + 1 + number * size
        state.calls += 1
        state.forward_rows += batch * count
        made = self(states.reshape(batch, count * size, -1), positions + steps, mask, state.cache)
        return FalconBlock(
            made.view(batch, count, size, -1),
            (memory[0].unflatten(1, (batch, count)), memory[1].unflatten(1, (batch, count))),
            path,
        )

    def _loss(self, batch: TargetBatch, objective: FalconObjective, progress: float, generator: Any) -> Losses:
        """The training objective; see [`falcon_loss`]."""
        return falcon_loss(self, batch, objective, progress, generator)
