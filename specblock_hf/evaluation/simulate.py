# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The accepted length that a drafter would reach, from stored target views alone: no target forward is run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..data.examples import Example
from ..drafting.drafter import TreeDrafter
from ..drafting.pairs import Pairs, TokenTable
from ..drafting.plan import DraftingPlan, round_limits
from ..generation.rounds.drafts import draft
from ..target.masks import likeliest_chain
from ..training.target_views import TargetView
from ..trees.verification import Select, sample_and_walk


SIMULATED_TOKENS = 96

TRIED_TOKENS = 16


@dataclass
class SimulatedAcceptance:
    """
    Rounds over texts that the target has written greedily.

    Args:
        accepted (`list[int]`): Accepted length A of every round that the end of the text did not cut.
    """

    accepted: list[int] = field(default_factory=list)

    @property
    def tau(self) -> float:
        """Tokens emitted per verification, the target's own one included; `nan` before the first round."""
        return 1 + sum(self.accepted) / len(self.accepted) if self.accepted else float("nan")

    def at_depth(self, depth: int) -> float:
        """Share of the rounds whose accepted length reached `depth`."""
        return sum(a >= depth for a in self.accepted) / max(1, len(self.accepted))

    def rates(self) -> list[float]:
        """For every depth that a round reached, the share of rounds at the depth before that went on to it."""
        reached = [self.at_depth(depth) for depth in range(max(self.accepted, default=0) + 1)]
        return [after / before for before, after in zip(reached, reached[1:], strict=False)]


@torch.no_grad()
def simulate_acceptance(
    drafter: TreeDrafter,
    table: TokenTable,
    examples: Sequence[Example],
    views: Sequence[TargetView],
    plan: DraftingPlan,
    max_new_tokens: int = SIMULATED_TOKENS,
    chains: bool = False,
) -> SimulatedAcceptance:
    """
    Draft along known texts as `generate()` would, every round with the drafter's real tree.

    Args:
        drafter ([`TreeDrafter`]): The drafter.
        table ([`TokenTable`]): The target's embedding and head.
        examples (`Sequence[Example]`): Greedy answers; sampled ones would measure another distribution.
        views (`Sequence[TargetView]`): The target's view of each.
        plan ([`DraftingPlan`]): How much a round drafts.
        max_new_tokens (`int`, *optional*, defaults to 96): Answer tokens that are walked.
        chains (`bool`, *optional*, defaults to `False`): The target verifies the likeliest path of a tree alone.
    """
    result = SimulatedAcceptance()
    for example, view in zip(examples, views, strict=True):
        text = example.input_ids[: example.answer_start + max_new_tokens]
        result.accepted += _walk_text(drafter, table, text, example.answer_start, view.features, plan, chains)
    return result


def expected_seconds(
    drafter: TreeDrafter,
    table: TokenTable,
    examples: Sequence[Example],
    views: Sequence[TargetView],
    plan: DraftingPlan,
) -> tuple[float, float]:
    """
    Seconds that [`simulate_acceptance`] would take over all examples if nothing was accepted, and the tau that it has
    so far, both from a few rounds over one of them.
    """
    started = time.perf_counter()
    tried = simulate_acceptance(drafter, table, examples[:1], views[:1], plan, TRIED_TOKENS)
    a_round = (time.perf_counter() - started) / max(1, len(tried.accepted))
    tokens = sum(min(SIMULATED_TOKENS, len(example.input_ids) - example.answer_start) for example in examples)
    return a_round * tokens, tried.tau if tried.accepted else 1.0


def _replay(text: list[int]) -> Select:
    coming = iter(text)
    return lambda row, node: next(coming)


def _walk_text(
    drafter: TreeDrafter,
    table: TokenTable,
    text: list[int],
    start: int,
    features: torch.Tensor,
    plan: DraftingPlan,
    chains: bool,
) -> list[int]:
    ids = torch.tensor([text], device=table.device)

    def pairs_between(first: int, last: int) -> Pairs:
        states = features[first:last].to(table.device)
        return Pairs(
            tokens=ids[:, first + 1 : last + 1],
            features=tuple(states[None, :, i] for i in range(states.shape[1])),
            positions=torch.arange(first, last, device=table.device)[None],
            lengths=torch.tensor([last - first], device=table.device),
            table=table,
        )

    state = drafter.begin(table, 1, len(text))
    done, end = 0, start  # pairs told, and the last token that both sides know
    accepted = []
    # As in `generate()`, no tree is deeper than what may still be emitted, the last of which is the target's own.
    while end + 2 < len(text):
        limits = round_limits(plan, [len(text) - end - 1])
        tree = draft(drafter, state, pairs_between(done, end), limits).keep_likely(plan.min_probability)
        tree = likeliest_chain(tree) if chains else tree
        walk = sample_and_walk(tree, [True], _replay(text[end + 1 :]), lambda row, token: False)
        emitted = int(walk.lengths[0])
        done, end = end, end + emitted
        if end + 1 < len(text):  # else the end of the text has cut this round
            accepted.append(emitted - 1)
    return accepted
