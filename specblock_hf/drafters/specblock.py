# Copyright 2026 The specblock_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""SpecBlock as a drafter: the network of `modeling_specblock.py` in the loop forward, expand, start again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from ..configuration_specblock import SpecBlockConfig
from ..drafter import DrafterLock, DraftingPlan, DraftState, Limits, Pairs, TokenTable, TreeDrafter
from ..expansion import BlockOutputs, Branching, Starts, best_first, limit_starts, rank_guided
from ..modeling_specblock import BlockCache, BlockPath, SpecBlockModel, committed_mask
from ..training.objective import TargetBatch
from ..tree import DraftTree
from .specblock_loss import specblock_loss


PREFILL_PAIRS = 256  # pairs of one committed forward: bounds its attention mask to (K * 256) x (K * all pairs)


# Of a drafter with little training, for one whose configuration does not say: nodes, blocks, starts (0: all), tau
# alone and tau joined with a look-up.
TYPICAL_ACCEPTANCE = (
    (4, 1, 0, 1.6, 2.0),
    (8, 1, 0, 1.8, 2.2),
    (12, 1, 0, 1.9, 2.3),
    (12, 2, 4, 2.0, 2.4),
    (16, 2, 8, 2.15, 2.5),
    (32, 2, 8, 2.35, 2.7),
    (60, 2, 0, 2.6, 2.9),
)


@dataclass
class SpecBlockState(DraftState):
    """
    Adds to [`DraftState`] the drafter's keys and values, and how many columns of them each row has committed: one
    number
    for a batch of one, which the host knows, a tensor `[B]` for more.
    """

    cache: BlockCache | None = None
    committed: int | torch.LongTensor = 0


class SpecBlockDrafter(SpecBlockModel, TreeDrafter):
    """
    A drafter that predicts K tokens a forward and repeats the forward from several nodes of its own draft tree
    (SpecBlock, https://huggingface.co/papers/2605.07243).

    Args:
        config ([`SpecBlockConfig`]): The drafter's configuration.

    Example:

    ```python
    >>> from specblock_hf import SpecBlockDrafter

    >>> drafter = SpecBlockDrafter.from_pretrained("org/specblock-smollm2-135m")
    >>> output = target.generate(**inputs, assistant_model=drafter, max_new_tokens=256)
    >>> drafter.last_statistics.tau
    ```
    """

    def __init__(self, config: SpecBlockConfig):
        super().__init__(config)
        self.lock = DrafterLock()

    @property
    def feature_layers(self) -> tuple[int, ...]:
        return tuple(self.config.feature_layers)

    def default_plan(self, device: torch.device) -> DraftingPlan:
        config = self.config
        if device.type == "cpu":
            # A verified node costs real time there: half a step for a dozen in float32.
            return DraftingPlan(min(12, config.tree_budget), config.num_blocks, 4)
        return DraftingPlan(config.tree_budget, config.num_blocks, config.max_starts)

    def acceptance(self, with_lookup: bool = False) -> list[tuple[DraftingPlan, float]]:
        rows = self.config.acceptance or TYPICAL_ACCEPTANCE
        return [
            (DraftingPlan(int(nodes), int(blocks), int(starts) or None), taus[with_lookup])
            for nodes, blocks, starts, *taus in rows
        ]

    def check_target(self, target: PreTrainedModel) -> None:
        text, config = target.config.get_text_config(), self.config
        for what, ours, theirs in (
            ("hidden size", config.target_hidden_size, text.hidden_size),
            ("vocabulary", config.vocab_size, text.vocab_size),
            ("number of layers", config.target_num_layers, text.num_hidden_layers),
        ):
            if ours is not None and ours != theirs:
                trained_for = config.target_name_or_path or "another target"
                raise ValueError(
                    f"This drafter was trained for {trained_for}: its {what} is {ours}, that of this "
                    f"{target.__class__.__name__} {theirs}; load the drafter that belongs to this target, or train "
                    "one with `specblock train`."
                )
        if max(self.feature_layers) > text.num_hidden_layers:
            raise ValueError(
                f"This drafter reads hidden state {max(self.feature_layers)} of a target with "
                f"{text.num_hidden_layers} layers; load the drafter that belongs to this target."
            )

    def begin(self, table: TokenTable, batch_size: int, max_length: int, *, first_position: int = 0) -> SpecBlockState:
        committed = 0 if batch_size == 1 else torch.zeros(batch_size, dtype=torch.long, device=self.device)
        columns = min(max_length, PREFILL_PAIRS) * self.config.block_size
        cache = BlockCache(self.config, batch_size, columns, self.dtype, self.device)
        return SpecBlockState(
            table, batch_size, max_length, first_position=first_position, cache=cache, committed=committed
        )

    def extend(self, state: SpecBlockState, pairs: Pairs) -> None:
        for _ in self._commit(state, pairs):
            pass

    def propose(self, state: SpecBlockState, pairs: Pairs, limits: Limits) -> DraftTree:
        hidden, positions = self._last_rows(self._commit(state, pairs), pairs)
        last = (pairs.lengths - 1).clamp_min(0).unsqueeze(1)
        tree = DraftTree.root(pairs.tokens.gather(1, last).squeeze(1).to(self.device))
        if max(limits.nodes) == 0 or max(limits.depth) == 0:
            return tree
        size, first_width = self.config.block_size, state.cache.width
        path, starts = None, Starts.root(tree)
        for forward in range(limits.num_forwards):
            tree, candidates = self._grow(tree, starts, hidden, forward, max(limits.nodes))
            if forward + 1 == limits.num_forwards or (forward + 1) * size > max(limits.depth):
                break
            starts = limit_starts(candidates, tree, limits.max_starts)
            if path is None:
                # The committed columns end with the drafting pair's own K; a start sees those up to its slot.
                own = torch.as_tensor(state.committed, device=self.device).reshape(-1, 1) - size
                path = BlockPath(visible=own + starts.slot + 1)
            else:
                path = path.step(starts.parent_start, starts.slot, hidden.shape[1])
            hidden = self._later_block(state, hidden, starts, path, positions, first_width)
        tree = tree.merge_duplicates().limit_depth(limits.depth)
        return tree.prune(limits.nodes)

    def _grow(
        self, tree: DraftTree, starts: Starts, hidden: torch.Tensor, forward: int, budget: int
    ) -> tuple[DraftTree, Starts]:
        """Append a block below every start, by the rule that the configuration names."""
        config = self.config
        if config.expansion == "best_first":
            width = min(config.root_width, budget)
            children = self._block_outputs(hidden, width, ranked=False).children(width)
            tree, candidates = best_first(tree, starts, children, config.block_size, budget, forward)
            # Every new node may start a block; more of them than the tree can hold are never worth a forward's rows.
            return tree, limit_starts(candidates, tree, budget)
        branching = Branching(tuple(config.branching), config.root_width, config.probability_cuts)
        outputs = self._block_outputs(hidden, branching.most(forward == 0))
        return rank_guided(tree, starts, outputs, branching, forward)

    def _commit(self, state: SpecBlockState, pairs: Pairs) -> Iterator[torch.Tensor]:
        """
        Forwards over new pairs, which leave their keys behind; yields the states `[B, T', K, d]` chunk by chunk.
        """
        size, total = self.config.block_size, pairs.tokens.shape[1]
        embeds = pairs.embeds().to(self.device, self.dtype)
        for first in range(0, total, PREFILL_PAIRS):
            rows = slice(first, min(first + PREFILL_PAIRS, total))
            count = rows.stop - rows.start
            features = torch.cat([f[:, rows].to(self.device, self.dtype) for f in pairs.features], dim=-1)
            offsets = state.committed
            if isinstance(offsets, int):
                width, state.committed = offsets + count * size, offsets + count * size
            else:
                width = int(offsets.max()) + count * size
                lengths = pairs.lengths.to(self.device)
                state.committed = offsets + (lengths - first).clamp(0, count) * size
            state.cache.seek(offsets, width)
            mask = committed_mask(count, size, offsets, width, self.device)
            positions = pairs.positions[:, rows].to(self.device)
            state.calls += 1
            yield self(embeds[:, rows], self.project_features(features), positions, mask, state.cache)

    def _last_rows(self, chunks: Iterator[torch.Tensor], pairs: Pairs) -> tuple[torch.Tensor, torch.LongTensor]:
        """The states `[B, 1, K, d]` and the position `[B, 1]` of every row's last pair."""
        last = (pairs.lengths - 1).clamp_min(0).to(self.device)
        hidden, first = None, 0
        for chunk in chunks:
            # Rows end in different chunks; a row that ended before keeps what it had.
            here = (last - first).clamp(0, chunk.shape[1] - 1)
            picked = chunk[torch.arange(len(chunk), device=self.device), here].unsqueeze(1)
            ended = (last >= first)[:, None, None, None]
            hidden = picked if hidden is None else torch.where(ended, picked, hidden)
            first += chunk.shape[1]
        return hidden, pairs.positions.to(self.device).gather(1, last.unsqueeze(1))

    def _later_block(
        self,
        state: SpecBlockState,
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
        offset = first_width + sum(path.widths) * size
        state.cache.seek(offset, offset + count * size)
        state.calls += 1
        mask = path.mask(first_width, size)
        return self(embeds, conditions, positions.expand(-1, count), mask, state.cache)

    def _block_outputs(self, hidden: torch.Tensor, width: int, ranked: bool = True) -> BlockOutputs:
        """The best tokens of every slot `[B, S, K, d]` and, if wanted, the rank head's bucket."""
        normed, logits = self.draft_logits(hidden)
        best = logits.topk(max(width, self.config.rank_top_k) if ranked else width, dim=-1)
        log_probs = best.values[..., :width].float() - logits.float().logsumexp(-1, keepdim=True)
        ids = best.indices[..., :width]
        tokens = ids + self.d2t[ids]
        if not ranked:
            return BlockOutputs(tokens, log_probs)
        rank_logits = self.rank_logits(normed, best.values[..., : self.config.rank_top_k])
        return BlockOutputs(tokens, log_probs, rank_logits.argmax(-1))

    def parameters_of(self, scope: Literal["head", "full"]) -> list[nn.Parameter]:
        modules = [self.lm_head, self.rank_head] if scope == "head" else [self]
        return [p for module in modules for p in module.parameters()]

    def loss(
        self,
        batch: TargetBatch,
        num_blocks: int = 3,
        rank_weight: float = 1.0,
        cuts: list[int] | None = None,
        starts_share: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        The training objective; see [`specblock_loss`].

        Args:
            batch ([`TargetBatch`]): Texts and the target's view of them.
            num_blocks (`int`, *optional*, defaults to 3): Blocks that are trained (paper: 3).
            rank_weight (`float`, *optional*, defaults to 1.0): Weight of the rank head's loss.
            cuts (`list[int]`, *optional*): Cut of every transition; drawn uniformly from 1 to K if not given.
            starts_share (`float`, *optional*, defaults to 1.0): Share of a later block's starts that are trained.
            generator (`torch.Generator`, *optional*): Draws them.
        """
        if cuts is None:
            cuts = [random.randint(1, self.config.block_size) for _ in range(num_blocks - 1)]
        return specblock_loss(self, batch, num_blocks, rank_weight, cuts, starts_share, generator)
