# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The draft tree of one round of a real call, and another drafter's tree at the same place of the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..drafting.drafter import DraftingCall, DraftingCallback, TreeDrafter
from ..drafting.pairs import Pairs, Scored
from ..trees.tree import DraftTree
from ..trees.verification import Walk


@dataclass(frozen=True)
class TracedRound:
    """
    One verified tree.

    Args:
        prefix (`torch.LongTensor` of shape `[1, T]`): All tokens before the tree's root.
        tree ([`DraftTree`]): The draft.
        walk ([`Walk`]): What the target kept of it, and emitted.
    """

    prefix: torch.LongTensor
    tree: DraftTree
    walk: Walk

    @property
    def accepted(self) -> list[int]:
        """The kept nodes, the root first."""
        return [node for node in self.walk.nodes[0].tolist() if node >= 0]


class _RoundCatcher(DraftingCallback):
    """Keeps one round of the one call that it listens to."""

    def __init__(self, number: int):
        self.number = number
        self.rounds = -1  # the prompt commits a token before the first round
        self.emitted: list[int] = []
        self.caught: tuple[list[int], DraftTree, Walk] | None = None

    def on_commit(self, call: DraftingCall, tree: DraftTree, scored: Scored, walk: Walk, pairs: Pairs) -> None:
        self.rounds += 1
        if self.rounds == self.number:
            self.caught = (list(self.emitted), tree, walk)
        self.emitted += walk.tokens[0].tolist()


def trace_round(
    target: PreTrainedModel,
    drafter: TreeDrafter,
    prompt_ids: torch.LongTensor,
    number: int = 1,
    **generate_kwargs: Any,
) -> TracedRound:
    """
    Generate, and keep one round.

    Args:
        target ([`~transformers.PreTrainedModel`]): The model.
        drafter ([`TreeDrafter`]): The drafter.
        prompt_ids (`torch.LongTensor` of shape `[1, T]`): One prompt.
        number (`int`, *optional*, defaults to 1): Which round; 1 is the first.
        **generate_kwargs: For `generate()`, such as `max_new_tokens`.

    Raises:
        ValueError: There is no such round.
    """
    if number < 1:
        raise ValueError(f"there is no round {number}; rounds are counted from 1.")
    catcher = _RoundCatcher(number)
    drafter.add_callback(catcher)
    try:
        defaults = {"attention_mask": torch.ones_like(prompt_ids)}
        target.generate(prompt_ids, assistant_model=drafter, **(defaults | generate_kwargs))
    finally:
        drafter.remove_callback(catcher)
    if catcher.caught is None:
        raise ValueError(
            f"the answer ended after {catcher.rounds} round(s), so that there is no round {number}; ask for an "
            "earlier one, or allow more new tokens."
        )
    emitted, tree, walk = catcher.caught
    # The last emitted token is the tree's root.
    before = torch.tensor([emitted[:-1]], dtype=prompt_ids.dtype, device=prompt_ids.device)
    return TracedRound(torch.cat((prompt_ids, before), dim=1), tree, walk)


def trace_there(
    target: PreTrainedModel, drafter: TreeDrafter, other: TracedRound, **generate_kwargs: Any
) -> TracedRound:
    """
    What another drafter proposes at the place of a traced round: its first tree after the same text, whose root the
    target emits anew from the prefix.

    Args:
        target ([`~transformers.PreTrainedModel`]): The model of both.
        drafter ([`TreeDrafter`]): The other drafter.
        other ([`TracedRound`]): From [`trace_round`], decoded greedily.
        **generate_kwargs: For `generate()`, such as `max_new_tokens`.
    """
    return trace_round(target, drafter, other.prefix, 1, **generate_kwargs)
