# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Drafters without a network: one that knows the target's text, one that knows nothing. Both keep all that they were
told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig

from specblock_hf import DraftingPlan
from specblock_hf.drafting.drafter import DrafterLock, DraftingCallback, DraftState, TreeDrafter
from specblock_hf.drafting.pairs import Pairs
from specblock_hf.drafting.plan import Limits
from specblock_hf.trees.tree import DraftTree
from specblock_hf.trees.verification import Walk


def make_tree(tokens: Sequence[int], parents: Sequence[int]) -> DraftTree:
    """A tree of one row; node 0 is the root."""
    return DraftTree(
        tokens=torch.tensor([tokens]),
        parents=torch.tensor([parents]),
        log_probs=torch.zeros(1, len(tokens)),
        origin=torch.full((1, len(tokens), 2), -1),
    )


class Rounds(DraftingCallback):
    """The verified trees of a drafter's next calls, each with what was kept of it."""

    def __init__(self, drafter: TreeDrafter):
        self.seen: list[tuple[DraftTree, Walk]] = []
        drafter.add_callback(self)

    def on_commit(self, call, tree, scored, walk, pairs) -> None:
        if call.statistics.rounds:  # the prompt commits a token before the first one
            self.seen.append((tree, walk))


@dataclass
class Told(DraftState):
    """Everything that a drafter was told in one call."""

    pairs: list[Pairs] = field(default_factory=list)
    limits: list[Limits] = field(default_factory=list)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(5))

    def tokens(self) -> list[int]:
        """The tokens of all pairs so far, padding removed."""
        return [token for pairs in self.pairs for token in pairs.tokens[0, : int(pairs.lengths[0])].tolist()]

    def positions(self) -> list[int]:
        return [position for pairs in self.pairs for position in pairs.positions[0, : int(pairs.lengths[0])].tolist()]

    def features(self, layer: int) -> torch.Tensor:
        """The features of the drafter's feature layer number `layer`, `[T, d]`."""
        return torch.cat([pairs.features[layer][0, : int(pairs.lengths[0])] for pairs in self.pairs])


class WatchedLock(DrafterLock):
    """Knows how often it is held."""

    def __init__(self):
        super().__init__()
        self.held = 0

    def __enter__(self):
        super().__enter__()
        self.held += 1

    def __exit__(self, *exc_info):
        self.held -= 1
        super().__exit__(*exc_info)


class ToldDrafter(TreeDrafter):
    """
    Keeps every state in `states` and leaves the tree to `draft`.

    Args:
        vocab_size (`int`): The target's.
        feature_layers (`tuple[int, ...]`, *optional*): What to ask the target for.
        tree_budget (`int`, *optional*, defaults to 60): Most drafted nodes.
    """

    def __init__(self, vocab_size: int, feature_layers: tuple[int, ...] = (), tree_budget: int = 60):
        self.config = PreTrainedConfig(vocab_size=vocab_size)
        self.tree_budget = tree_budget
        self.feature_layers = feature_layers
        self.lock = WatchedLock()
        self.states: list[Told] = []

    def default_plan(self, device) -> DraftingPlan:
        return DraftingPlan(self.tree_budget, 1)

    def check_target(self, target) -> None:
        if target.config.get_text_config().vocab_size != self.config.vocab_size:
            raise ValueError("this drafter is for a target of another vocabulary; load the one for this target.")

    def begin(self, table, batch_size, max_length, *, first_position=0) -> Told:
        self.states.append(Told(table, batch_size, max_length, first_position))
        return self.states[-1]

    def extend(self, state, pairs) -> None:
        assert self.lock.held
        state.pairs.append(pairs)

    def propose(self, state, pairs, limits) -> DraftTree:
        state.calls += 1
        state.limits.append(limits)
        self.extend(state, pairs)
        return self.draft(state, limits)

    def draft(self, state: Told, limits: Limits) -> DraftTree:
        raise NotImplementedError

    def loss(self, batch):
        raise NotImplementedError

    def parameters_of(self, scope):
        return []


class GarbageDrafter(ToldDrafter):
    """Random trees of random size over a wrong root, beyond the limit of depth and with repeated siblings."""

    def draft(self, state, limits):
        def draw(high: int, count: int = 1) -> list[int]:
            return torch.randint(high, (count,), generator=state.generator).tolist()

        size = draw(min(limits.nodes[0], 12) + 1)[0]
        parents = [-1] + [draw(node)[0] for node in range(1, size + 1)]
        return make_tree(draw(self.config.vocab_size, size + 1), parents)


class OracleDrafter(ToldDrafter):
    """
    Drafts the text that the target will write, as deep as `plan` says, with a wrong sibling before and after each
    right token and the right continuation below the wrong one. Below the last right token everything is wrong.

    Args:
        vocab_size (`int`): The target's.
        text (sequence of `int`): Prompt and plain continuation.
        plan (`Callable[[int], int]`, *optional*):
            Tokens to get right in round 0, 1, ...; defaults to 0, 1, ..., 8, 0, 1, ...
        siblings (`bool`, *optional*, defaults to `True`): `False` drafts the right tokens only.
    """

    def __init__(
        self,
        vocab_size: int,
        text: Sequence[int],
        plan: Callable[[int], int] = lambda number: number % 9,
        siblings: bool = True,
        **kwargs,
    ):
        super().__init__(vocab_size, **kwargs)
        self.text = list(text)
        self.plan = plan
        self.siblings = siblings

    def draft(self, state, limits):
        root = state.positions()[-1] + 1
        right = min(self.plan(len(state.limits) - 1), limits.depth[0], len(self.text) - 1 - root)
        tokens, parents = [self.text[root]], [-1]
        spine = 0
        for depth in range(1, right + 1):
            token = self.text[root + depth]
            children = [self._wrong(token, 1), token, self._wrong(token, 2)] if self.siblings else [token]
            first = len(tokens)
            tokens += children
            parents += [spine] * len(children)
            if self.siblings and depth < right:
                tokens.append(self.text[root + depth + 1])
                parents.append(first)
            spine = first + children.index(token)
        if self.siblings and right < limits.depth[0] and root + right + 1 < len(self.text):
            tokens.append(self._wrong(self.text[root + right + 1], 1))
            parents.append(spine)
        return make_tree(tokens, parents)

    def _wrong(self, token: int, by: int) -> int:
        return (token + by) % self.config.vocab_size
