# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What drafters with a network of their own have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from ...drafting.drafter import CPU_BUDGET, DraftState, Scope, TreeDrafter
from ...drafting.pairs import Pairs
from ...drafting.plan import DraftingPlan, Limits
from ...prepacking import PrepackedWeights
from ...rounds_model import RoundsModel
from ...trees.expansion import BlockOutputs, Starts, best_first
from ...trees.sampling import SampledGrowth, gumbel_draw, private_generator, shape_for
from ...trees.tree import DraftTree
from .configuration import UNRECORDED_LAYER, refuse_projected_embedding


def refuse_other_target(config: Any, target: PreTrainedModel) -> None:
    """
    Args:
        config ([`~transformers.PreTrainedConfig`]): Of a drafter, with what it knows about its target.
        target ([`~transformers.PreTrainedModel`]): What it shall draft for.

    Raises:
        ValueError: The target has another size, vocabulary or depth, the message names which; or an embedding of
            another width than its states.
    """
    text = target.config.get_text_config()
    refuse_projected_embedding(text)
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
    if max(config.feature_layers) > text.num_hidden_layers:
        raise ValueError(
            f"This drafter reads hidden state {max(config.feature_layers)} of a target with "
            f"{text.num_hidden_layers} layers; load the drafter that belongs to this target."
        )


class NetworkDrafter(TreeDrafter, nn.Module):
    """A drafter that names this class before its network, which ends in a head over the draft vocabulary."""

    typical_acceptance: Sequence[Sequence[float]] = ()
    """Rows like those of `config.acceptance`, for a drafter whose configuration has none."""

    plans_that_pay: Sequence[tuple[int, int, int]] = tuple((nodes, 1, 0) for nodes in (3, 5, 7, 11, 15, 31, 60))
    """
    Nodes, forwards and starts (0: all) of plans that are the best somewhere, from a slow CPU to a GPU. With the root
    small trees are multiples of four rows, or six; see `MULTIPLE` in `planning/estimates.py`.
    """

    @property
    def feature_layers(self) -> tuple[int, ...]:
        return tuple(self.config.feature_layers)

    def feature_layers_for(self, target: PreTrainedModel) -> tuple[int, ...]:
        """`feature_layers`, or the usual ones for this target's depth where the checkpoint does not record them."""
        if UNRECORDED_LAYER not in self.feature_layers:
            return self.feature_layers
        return tuple(self.config.usual_feature_layers(target.config.get_text_config().num_hidden_layers))

    @property
    def drafting_plan(self) -> DraftingPlan | Literal["auto"]:
        """The plan that was given or calibrated, `"auto"`, or for `None` what the drafter drafts where it is."""
        plan = vars(self).get("drafting_plan", TreeDrafter.drafting_plan)
        return self.default_plan(self.device) if plan is None else plan

    @drafting_plan.setter
    def drafting_plan(self, plan: DraftingPlan | Literal["auto"] | None) -> None:
        self.__dict__["drafting_plan"] = plan

    def check_target(self, target: PreTrainedModel) -> None:
        refuse_other_target(self.config, target)

    def default_plan(self, device: torch.device) -> DraftingPlan:
        budget = self.config.tree_budget
        return DraftingPlan(min(CPU_BUDGET, budget) if device.type == "cpu" else budget, self.config.num_blocks)

    def plans_to_measure(self) -> list[DraftingPlan]:
        """The plans that pay somewhere, but for those of more forwards than the drafter was made for."""
        return [
            DraftingPlan(nodes, forwards, starts or None)
            for nodes, forwards, starts in self.plans_that_pay
            if forwards <= self.config.num_blocks
        ]

    @property
    def acceptance_measured(self) -> bool:
        return bool(self.config.acceptance)

    def acceptance(self, with_lookup: bool = False) -> list[tuple[DraftingPlan, float]]:
        rows = self.config.acceptance or self.typical_acceptance
        if not rows:
            return super().acceptance(with_lookup)
        return [
            (DraftingPlan(int(nodes), int(forwards), int(starts) or None), taus[-1 if with_lookup else 0])
            for nodes, forwards, starts, *taus in rows
        ]

    def parameters_of(self, scope: Scope) -> list[nn.Parameter]:
        return list((self.lm_head if scope == "head" else self).parameters())

    def rounds_model(self, weights: PrepackedWeights | None) -> RoundsModel[NetworkDrafter]:
        return RoundsModel(self, weights)

    def with_network(self, network: NetworkDrafter) -> NetworkDrafter:
        return network

    def root_of(self, pairs: Pairs) -> DraftTree:
        """Each row's last token; any valid id in a finished row, whose tokens are -1."""
        return DraftTree.root(pairs.last_tokens().to(self.device))

    def drawn_growth(
        self,
        state: DraftState,
        roots: DraftTree,
        token_ids: torch.LongTensor,
        distributions: torch.Tensor,
        limits: Limits,
        num_forwards: int,
    ) -> SampledGrowth:
        """
        A tree of drawn tokens, grown by the first forward.

        Args:
            state ([`DraftState`]): Gets its generator here.
            roots ([`DraftTree`]): Each row's last token.
            token_ids (`torch.LongTensor` of shape `[D]`): The target's ids of the tokens that can be drawn.
            distributions (`torch.Tensor` of shape `[B, K, D]`): Of the first forward's slots; see `distributions_of`.
            limits ([`Limits`]): Of the round.
            num_forwards (`int`): Most forwards.
        """
        if state.generator is None:
            state.generator = private_generator(self.device)
        budget = min(nodes for nodes in limits.nodes if nodes)
        shape = shape_for(budget, max(limits.depth), num_forwards, limits.max_starts, distributions)
        growth = SampledGrowth(roots.tokens[:, 0], token_ids, shape, gumbel_draw(state.generator))
        growth.grow(distributions[:, [shape.distributions[index][2] for index in shape.distributions_of(0)]])
        return growth

    @staticmethod
    def drawn_tree(growth: SampledGrowth, limits: Limits) -> DraftTree:
        """What has grown, within the limits of each row."""
        # A row without room for nodes has none at any depth.
        depths = [depth if nodes else 0 for nodes, depth in zip(limits.nodes, limits.depth, strict=True)]
        return growth.tree().limit_depth(depths).pack()

    def product_tree(self, tree: DraftTree, hidden: torch.Tensor, limits: Limits) -> DraftTree:
        """
        Grow roots by what K slots say that know nothing of each other's tokens: the paths whose product is largest.

        Args:
            tree ([`DraftTree`]): The roots.
            hidden (`torch.Tensor` of shape `[B, 1, K, d]`): States before the draft head.
            limits ([`Limits`]): Of the tree.
        """
        budget, depth = max(limits.nodes), min(hidden.shape[2], max(limits.depth))
        if budget == 0 or depth == 0:
            return tree
        width = min(self.config.tree_width, budget, self.config.draft_vocab_size)
        children = BlockOutputs(*self.best_tokens(hidden, width)).children(width)
        tree, _ = best_first(tree, Starts.root(tree), children, depth, budget, 0, most=budget)
        return limits.cut(tree)
