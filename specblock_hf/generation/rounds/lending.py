# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What a call asks of rounds of fixed shapes, and what it is lent of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from ...compat import CACHE
from ...drafting.drafter import TreeDrafter
from ...drafting.plan import DraftingPlan
from ...target.fixed import FixedTarget, TargetRounds
from ...target.inputs import OF_TOKENS
from ...target.model import TargetModel
from .drafts import DraftRounds


@dataclass(frozen=True)
class Request:
    """
    A call that could have rounds of fixed shapes.

    Args:
        target ([`~transformers.PreTrainedModel`]): The call's target.
        drafter ([`TreeDrafter`]): The call's drafter.
        plan ([`DraftingPlan`]): How much a round drafts.
        batch_size (`int`): Rows of the batch.
        length (`int`): Most tokens that a row may get, prompt included.
        cache (`Any`, *optional*): What `generate()` prepared.
        returns_cache (`bool`, *optional*, defaults to `False`): Somebody goes on with the cache.
        hindrance (`str`, *optional*): Why the target's forwards over trees have no fixed inputs.
    """

    target: PreTrainedModel
    drafter: TreeDrafter
    plan: DraftingPlan
    batch_size: int
    length: int
    cache: Any = None
    returns_cache: bool = False
    hindrance: str | None = None

    @classmethod
    def of_call(
        cls,
        target: PreTrainedModel,
        drafter: TreeDrafter,
        plan: DraftingPlan,
        input_ids: torch.LongTensor,
        model_kwargs: Mapping[str, Any],
        remaining: int,
        returns_cache: bool,
    ) -> Request:
        """What a call asks for that may emit so many tokens more."""
        embeds, positions = model_kwargs.get("inputs_embeds"), model_kwargs.get("position_ids")
        prompt = input_ids.shape[1] if embeds is None else embeds.shape[1]
        hindrance = None
        if positions is None or positions.ndim != 2:
            hindrance = "a token's position is not one number that generate() prepares"
        elif any(model_kwargs.get(name) is not None for name in OF_TOKENS):
            hindrance = "the target is told a type of every token"
        batch_size, cache = len(input_ids), model_kwargs[CACHE]
        return cls(target, drafter, plan, batch_size, prompt + remaining, cache, returns_cache, hindrance)


@dataclass
class Lent:
    """
    What a call is lent of [`CompiledRounds`]: buffers of the target, of the drafter, both or none, and why not.
    """

    target: TargetRounds | None = None
    drafts: DraftRounds | None = None
    reason: str | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """What the trees of the call are padded to, the root counted; empty if any size will do."""
        return () if self.target is None else tuple(self.target.sizes)

    @property
    def plan(self) -> DraftingPlan | None:
        """What every round drafts, of which a round may verify less; `None` if that can be chosen."""
        return None if self.drafts is None else self.drafts.plan

    def target_model(
        self,
        target: PreTrainedModel,
        drafter: TreeDrafter,
        input_ids: torch.LongTensor,
        model_kwargs: dict[str, Any],
        *args: Any,
    ) -> TargetModel:
        """The target during the call; the arguments after `drafter` are those of [`TargetModel`]."""
        layers = drafter.feature_layers_for(target)
        if self.target is None:
            return TargetModel(target, layers, input_ids, model_kwargs, *args, prepacked=drafter.prepacked_weights)
        # A cache for the prompt, whose rounds have buffers of their own.
        own = {CACHE: DynamicCache(config=target.config.get_text_config(decoder=True))}
        keeps = bool(drafter.callbacks) or self.drafts is None
        return FixedTarget(self.target, keeps, target, layers, input_ids, model_kwargs | own, *args)
