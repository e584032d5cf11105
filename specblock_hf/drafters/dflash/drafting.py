# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""DFlash, DFlash 2, JetSpec and DSpark as a drafter: the network of `modeling_block_diffusion.py`, once a round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...drafting.drafter import Scope
from ...drafting.pairs import Pairs, TokenTable
from ...drafting.plan import DraftingPlan, Limits
from ...drafting.target_batch import Losses, TargetBatch
from ...trees.expansion import Best, BlockOutputs, Children, Starts, best_first, children_by_parent
from ...trees.sampling import distributions_of
from ...trees.tree import DraftTree
from ..common.block import BlockState, FixedBlockState
from ..common.cache import BlockCache
from ..common.network import NetworkDrafter
from .loss import BlockDiffusionObjective, block_diffusion_loss
from .modeling import BlockDiffusionModel


FIRST_COLUMNS = 512  # of the cache, which doubles when it is full


# Of a drafter with little training, for one whose configuration does not say: nodes, forwards, starts (0: all), tau
# alone and tau joined with a look-up.
TYPICAL_ACCEPTANCE = (
    (3, 1, 0, 1.6, 2.0),
    (7, 1, 0, 1.95, 2.25),
    (11, 1, 0, 2.1, 2.45),
    (15, 1, 0, 2.2, 2.55),
    (31, 1, 0, 2.5, 2.8),
    (60, 1, 0, 2.8, 3.0),
)


@dataclass
class Block:
    """
    What one forward says about the D tokens after the anchors of B rows.

    Args:
        hidden (`torch.Tensor` of shape `[B, D, d]`): States after the final norm.
        logits (`torch.Tensor` of shape `[B, D, vocab_size]`): Of the head alone.
    """

    hidden: torch.Tensor
    logits: torch.Tensor


class BlockDiffusionDrafter(NetworkDrafter, BlockDiffusionModel):
    """
    A drafter that fills a block of masks in one forward, which reads the known text as keys and values made of the
    target's features alone (DFlash, https://huggingface.co/papers/2602.06036). Causal blocks make it JetSpec
    (https://huggingface.co/papers/2606.18394); DFlash 2 and DSpark add a term that depends on the token before.

    Its tree is the one of the likeliest paths: by the product of the distributions of every depth, which know nothing
    of each other, or where there is a selector or Markov head by distributions given the parent.

    Args:
        config ([`BlockDiffusionConfig`]): The drafter's configuration.

    Example:

    ```python
    >>> from specblock_hf import AutoDrafter

    >>> drafter = AutoDrafter.from_pretrained("z-lab/Qwen3-8B-DFlash-b16", target=target, dtype=target.dtype)
    >>> output = target.generate(**inputs, assistant_model=drafter, max_new_tokens=256)
    ```
    """

    objective_class = BlockDiffusionObjective
    typical_acceptance = TYPICAL_ACCEPTANCE
    has_fixed_rounds = True

    @property
    def draft_to_target(self) -> torch.LongTensor:
        """`[vocab_size]`: the drafter says every token of the target by its own id."""
        return torch.arange(self.config.vocab_size, device=self.device)

    @property
    def can_sample(self) -> bool:
        """
        Whether the distributions of a block are known before a token of it is, so that a tree can be drawn from them.
        """
        config = self.config
        return not (config.selector_rank or config.markov_rank or config.confidence_threshold)

    def acceptance(self, with_lookup: bool = False) -> list[tuple[DraftingPlan, float]]:
        # There never is a second forward.
        return [point for point in super().acceptance(with_lookup) if point[0].num_forwards == 1]

    def check_target(self, target: PreTrainedModel) -> None:
        name = type(target).__name__
        super().check_target(target)
        rows = target.get_input_embeddings().weight.shape[0]
        if self.config.mask_token_id >= rows and not self.config.own_embedding:
            raise ValueError(
                f"This drafter's mask is token {self.config.mask_token_id} and the embedding of this {name} has "
                f"{rows} rows; load the target with its full embedding."
            )

    def begin(self, table: TokenTable, batch_size: int, max_length: int, *, first_position: int = 0) -> BlockState:
        columns = min(max_length + self.config.block_size, FIRST_COLUMNS)
        return BlockState(
            self.own_table(table),
            batch_size,
            max_length,
            first_position=first_position,
            cache=BlockCache(self.config, batch_size, columns, self.dtype, self.device),
            committed=0 if batch_size == 1 else torch.zeros(batch_size, dtype=torch.long, device="cpu"),
        )

    def begin_fixed(self, table: TokenTable, batch_size: int, max_length: int, width: int) -> FixedBlockState:
        # The block is written behind the pairs.
        pairs = max_length + self.config.block_size
        return FixedBlockState.empty(self, 1, self.own_table(table), batch_size, pairs, width)

    def deepest(self, plan: DraftingPlan) -> int:
        return min(plan.tree_budget, self.config.num_predictions)

    def extend(self, state: BlockState, pairs: Pairs) -> None:
        state.cache.seek(state.offsets, state.width_with(pairs.tokens.shape[1]))
        state.advance(pairs)
        features = torch.cat([f.to(self.device, self.dtype) for f in pairs.features], dim=-1)
        self.append_context(features, pairs.positions.to(self.device), state.cache)

    def propose(self, state: BlockState, pairs: Pairs, limits: Limits) -> DraftTree:
        self.extend(state, pairs)
        tree = self.root_of(pairs)
        budget = max(limits.nodes)
        depth = min(self.config.num_predictions, max(limits.depth), budget)
        if depth == 0:
            return tree
        last = (pairs.lengths - 1).clamp_min(0).unsqueeze(1)
        block = self.draft_block(state, tree.tokens, pairs.positions.gather(1, last).to(self.device) + 1, depth)
        if limits.draft_sampling != "topk":
            return self._drawn_tree(state, tree, block, limits)
        children = self.children_of(block, min(self.config.tree_width or budget, budget))
        beam = min(limits.max_starts or budget, budget)
        tree, _ = best_first(tree, Starts.root(tree), children, depth, beam, 0, most=budget)
        return limits.cut(tree)

    def draft_block(
        self, state: BlockState, anchors: torch.LongTensor, positions: torch.LongTensor, depth: int
    ) -> Block:
        """
        The one forward of a round.

        Args:
            state (`BlockState`): After `extend`.
            anchors (`torch.LongTensor` of shape `[B, 1]`): Each row's last token.
            positions (`torch.LongTensor` of shape `[B, 1]`): Its position.
            depth (`int`): Tokens wanted after it.

        Returns:
            `Block`: Of `depth` tokens.
        """
        rows, skipped = self._num_rows(depth), int(not self.config.predicts_from_anchor)
        first, width = state.committed_column, state.width_with(rows)
        steps = torch.arange(rows, device=self.device)
        places = first + steps.unsqueeze(0)
        columns = torch.arange(width, device=self.device).unsqueeze(0)
        visible = None if isinstance(first, int) else (columns < first + rows).unsqueeze(1)
        state.cache.seek(first if isinstance(first, int) else first.squeeze(1), width)
        state.calls += 1
        state.forward_rows += len(anchors) * rows
        embeds = self.block_embeds(anchors, rows, state.table)
        masks = self.masks(places, columns, places[:, :1], visible)  # columns lie as far apart as their positions
        hidden = self(embeds, (positions + steps).unsqueeze(1), masks, state.cache)[:, 0]
        hidden = hidden[:, skipped : depth + skipped]
        # Its own head once more, because this round may have another one, of the same weights.
        return Block(hidden, self.head_logits(hidden, self.own_table(state.table)))

    def _drawn_tree(self, state: BlockState, roots: DraftTree, block: Block, limits: Limits) -> DraftTree:
        """A tree drawn from the distributions of the depths at the request's temperature."""
        distributions = distributions_of(block.logits, state.warp)
        return self.drawn_tree(self.drawn_growth(state, roots, self.draft_to_target, distributions, limits, 1), limits)

    def _num_rows(self, depth: int) -> int:
        """Rows to run for `depth` tokens: all that were trained together, unless later rows cannot be seen."""
        if all(causal for causal, _ in self.config.layer_rules):
            return depth + (not self.config.predicts_from_anchor)
        return self.config.block_size

    def children_of(self, block: Block, width: int) -> Children:
        """
        The `width` best tokens below nodes of a level, by whatever the drafter's distribution of a token depends on.
        """
        width = min(width, self.config.vocab_size)
        if self.config.selector_rank:
            children = self._selector_children(block, width)
        elif self.config.markov_rank:
            children = children_by_parent(block.logits.unsqueeze(1), self.markov_head, width, self.draft_to_target)
        else:
            best = block.logits.topk(width, dim=-1)
            log_probs = best.values - block.logits.logsumexp(-1, keepdim=True)
            children = BlockOutputs(best.indices.unsqueeze(1), log_probs.unsqueeze(1)).children(width)
        return self._confident(children, block) if self.config.confidence_threshold > 0 else children

    def _selector_children(self, block: Block, width: int) -> Children:
        count = self.config.selector_top_k
        unary, candidates = block.logits.topk(count, dim=-1)

        def children(level: int, rows: torch.LongTensor, tokens: torch.LongTensor) -> Best:
            gained = self.candidate_selector(block.hidden[:, level], tokens, candidates[:, level])
            best = (unary[:, level].unsqueeze(1) + gained).log_softmax(-1).topk(min(width, count), dim=-1)
            ids = candidates[:, level].unsqueeze(1).expand(-1, tokens.shape[1], -1)
            return ids.gather(2, best.indices), best.values

        return children

    def _confident(self, inner: Children, block: Block) -> Children:
        """Nothing below nodes whose children the target will hardly accept."""

        def children(level: int, rows: torch.LongTensor, tokens: torch.LongTensor) -> Best:
            ids, log_probs = inner(level, rows, tokens)
            sure = self.confidence(block.hidden[:, level], tokens) >= self.config.confidence_threshold
            return ids, log_probs.masked_fill(~sure.unsqueeze(-1), -torch.inf)

        return children

    def confidence(self, hidden: torch.Tensor, before: torch.LongTensor) -> torch.Tensor:
        """How likely the target accepts a token of a row `[B, d]` given the tokens before `[B, F]`: `[B, F]`."""
        inputs = hidden.unsqueeze(1).expand(-1, before.shape[1], -1)
        if self.config.confidence_head_with_markov:
            inputs = torch.cat([inputs, self.markov_head.markov_w1(before)], dim=-1)
        return self.confidence_head(inputs).sigmoid()

    def parameters_of(self, scope: Scope) -> list[nn.Parameter]:
        """The head is the target's, so the lighter scope is what makes rows of features, and the last norm."""
        modules = [self.fc, self.hidden_norm, self.norm] if scope == "head" else [self]
        return [weight for module in modules for weight in module.parameters()]

    def _loss(self, batch: TargetBatch, objective: BlockDiffusionObjective, progress: float, generator: Any) -> Losses:
        """
        The training objective; see [`block_diffusion_loss`].

        Raises:
            `ValueError`: The drafter has a selector, Markov or confidence head, whose training is not known.
        """
        return block_diffusion_loss(self, batch, objective, generator)
