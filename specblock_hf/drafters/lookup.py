# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Drafts that cost nothing: continuations of the text's last tokens found earlier in the prompt or the output, and a
drafter that adds them to the tree of another.

What a look-up is worth depends on the text, so the chance of each drafted token is learned while a call runs, from how
often tokens after equally long matches were right so far; it decides how far a continuation enters the tree.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from operator import mul

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..devices import on_device
from ..drafting.drafter import DraftState, TreeDrafter
from ..drafting.pairs import Pairs, TokenTable
from ..drafting.plan import DraftingPlan, Limits
from ..trees.tree import FOUND, DraftTree


SHORTEST_MATCH = 2
LONGEST_MATCH = 12
LATEST_PLACES = 8  # earlier places that are compared: a frequent bigram has hundreds
OTHER = 0

RIGHT, RIGHT_PER_TOKEN, OTHER_RIGHT, TRIED = 0.5, 0.03, 0.15, 8.0
"""
How often a token is right after the shortest match, how much more often for each token that matches besides, and how
often the first token of a continuation that is not the best one; for how many tries that counts. Of the first 128
tokens of 1,000 answers of SmolLM2-135M-Instruct, greedy and drawn, 0.46 were right after two tokens, 0.65 after five
and 0.86 after twelve, whether these had matched or been drafted, and 0.13 of the first ones of a second continuation.
"""


@dataclass
class FoundText:
    """
    The text of one row, and where its pairs of tokens occurred.

    Args:
        tokens (`list[int]`): Prompt and output so far, without the prompt's first token, which no pair tells.
        places (`dict[tuple[int, int], list[int]]`): For every two tokens in a row, the indices of what followed.
        chains (`list[tuple[int, list[int]]]`): Length of match and drafted tokens of the last round, the best first.
        right (`dict[int, float]`): Drafted tokens that were right, by how many tokens before them had matched or been
            right; `OTHER` for the first one of any continuation but the best. `tried` counts all that were judged.
        tried (`dict[int, float]`): See `right`.
    """

    tokens: list[int] = field(default_factory=list)
    places: dict[tuple[int, int], list[int]] = field(default_factory=lambda: defaultdict(list))
    chains: list[tuple[int, list[int]]] = field(default_factory=list)
    right: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    tried: dict[int, float] = field(default_factory=lambda: defaultdict(float))

    def append(self, new: list[int]) -> None:
        """Take in what was emitted, and judge the last round's drafts by it."""
        for rank, (match, chain) in enumerate(self.chains):
            for before, drafted, emitted in zip(_before(rank, match, chain), chain, new, strict=False):
                self.tried[before] += 1
                self.right[before] += drafted == emitted
                if drafted != emitted:
                    break
        self.chains = []
        for token in new:
            self.tokens.append(token)
            if len(self.tokens) > SHORTEST_MATCH:
                self.places[self.tokens[-3], self.tokens[-2]].append(len(self.tokens) - 1)

    def chances(self) -> list[list[float]]:
        """How likely each of the last drafted tokens is right if those before it are."""
        return [
            [self._chance(before) for before in _before(rank, match, chain)]
            for rank, (match, chain) in enumerate(self.chains)
        ]

    def _chance(self, before: int) -> float:
        usual = OTHER_RIGHT if before == OTHER else RIGHT + RIGHT_PER_TOKEN * (before - SHORTEST_MATCH)
        return (self.right[before] + TRIED * usual) / (self.tried[before] + TRIED)

    def promise(self) -> float:
        """How many tokens the best of the last drafted continuations is expected to add."""
        return max((sum(accumulate(chances, mul)) for chances in self.chances()), default=0.0)

    def draft(self, depth: int, branches: int) -> list[tuple[int, list[int]]]:
        """The continuations after the longest matches, at most `branches` that begin differently."""
        if len(self.tokens) < SHORTEST_MATCH or depth < 1:
            return []
        found: dict[int, tuple[int, int]] = {}  # first drafted token -> (length of match, place)
        for place in self.places.get((self.tokens[-2], self.tokens[-1]), [])[-LATEST_PLACES:]:
            match = self._match(place)
            token = self.tokens[place]
            if token not in found or match >= found[token][0]:
                found[token] = (match, place)
        best = sorted(found.values(), reverse=True)[:branches]
        self.chains = [(match, self.tokens[place : place + depth]) for match, place in best]
        return self.chains

    def _match(self, place: int) -> int:
        """Tokens before `place` that equal the last ones of the text."""
        length = SHORTEST_MATCH
        while length < min(LONGEST_MATCH, place) and self.tokens[place - 1 - length] == self.tokens[-1 - length]:
            length += 1
        return length


def _before(rank: int, match: int, chain: Sequence[int]) -> list[int]:
    """What the chance of each token of a continuation depends on, as in `FoundText.right`."""
    before = [min(match + step, LONGEST_MATCH) for step in range(len(chain))]
    return [OTHER, *before[1:]] if rank else before


@dataclass
class LookupState(DraftState):
    """
    Adds the rows' texts to [`DraftState`] and, where the shapes are fixed, what the last look-up found, where the
    target is and as wide as it could get.
    """

    rows: list[FoundText] = field(default_factory=list)
    found: DraftTree | None = None

    def keep_rows(self, places: Sequence[int]) -> None:
        super().keep_rows(places)
        self.rows = [self.rows[place] for place in places]

    def reset(self) -> None:
        super().reset()
        self.rows = [FoundText() for _ in range(self.batch_size)]


class LookupDrafter(TreeDrafter):
    """
    Drafts continuations of the last tokens that occurred before (prompt lookup, as a tree). Without weights, for any
    target.

    Args:
        config ([`~transformers.PreTrainedConfig`]): The target's, for its vocabulary and special tokens.
        branches (`int`, *optional*, defaults to 2): Continuations a round.
        depth (`int`, *optional*, defaults to 8): Longest continuation in tokens.

    Example:

    ```python
    >>> drafter = JoinedDrafter(SpecBlockDrafter.from_pretrained(...), LookupDrafter(target.config))
    >>> output = target.generate(**inputs, assistant_model=drafter)
    ```
    """

    look_ups = "alone"
    has_fixed_rounds = True

    def __init__(self, config: PreTrainedConfig, branches: int = 2, depth: int = 8):
        if branches < 1 or depth < 1:
            raise ValueError(f"branches is {branches} and depth {depth}; a look-up needs at least one of each.")
        self.config = config
        self.branches = branches
        self.depth = depth

    def __repr__(self) -> str:
        return f"{type(self).__name__}(branches={self.branches}, depth={self.depth})"

    def default_plan(self, device: torch.device) -> DraftingPlan:
        return DraftingPlan(self.branches * self.depth, 1)

    def check_target(self, target: PreTrainedModel) -> None:
        ours, theirs = self.config.get_text_config().vocab_size, target.config.get_text_config().vocab_size
        if ours != theirs:
            raise ValueError(
                f"This look-up was made for a vocabulary of {ours} tokens and the target's has {theirs}; make one "
                "with LookupDrafter(target.config)."
            )

    def begin(self, table: TokenTable, batch_size: int, max_length: int, *, first_position: int = 0) -> LookupState:
        rows = [FoundText() for _ in range(batch_size)]
        return LookupState(table, batch_size, max_length, first_position=first_position, rows=rows)

    def extend(self, state: LookupState, pairs: Pairs) -> None:
        for text, tokens in zip(state.rows, pairs.host_tokens(), strict=True):
            text.append(tokens)

    def begin_fixed(self, table: TokenTable, batch_size: int, max_length: int, width: int) -> LookupState:
        roots = DraftTree.root(torch.zeros(batch_size, dtype=torch.long, device=table.device))
        found = replace(roots.pad(1 + self.branches * self.depth), height=self.depth)
        found.origin[:, 1:] = on_device((FOUND, 0), table.device)
        return LookupState(table, batch_size, max_length, found=found)

    def deepest(self, plan: DraftingPlan) -> int:
        return self.depth

    def find(self, state: LookupState, pairs: Pairs, limits: Limits) -> None:
        tokens, parents, log_probs = self._look_up(state, pairs, limits, state.found.tokens.shape[1])
        device = state.found.tokens.device
        numbers = on_device((tokens, parents), device)
        state.found.tokens.copy_(numbers[0])
        state.found.parents.copy_(numbers[1])
        state.found.log_probs.copy_(on_device(log_probs, device))

    def propose(self, state: LookupState, pairs: Pairs, limits: Limits) -> DraftTree:
        tree = self._found(state, pairs, limits) if state.found is None else state.found
        last = pairs.tokens.gather(1, (pairs.lengths - 1).clamp_min(0).unsqueeze(1)).clamp_min(0)
        tree = replace(tree, tokens=torch.cat((last, tree.tokens[:, 1:]), dim=1))
        return limits.cut(tree.merge_duplicates())

    def _found(self, state: LookupState, pairs: Pairs, limits: Limits) -> DraftTree:
        device = pairs.tokens.device
        *numbers, log_probs = self._look_up(state, pairs, limits)
        tokens, parents = on_device(numbers, device)
        origin = torch.stack([torch.full_like(tokens, FOUND), torch.zeros_like(tokens)], dim=-1)
        origin[:, 0] = -1
        height = min(self.depth, tokens.shape[1] - 1)
        return DraftTree(tokens, parents, on_device(log_probs, device), origin, height=height)

    def _look_up(
        self, state: LookupState, pairs: Pairs, limits: Limits, width: int | None = None
    ) -> tuple[list[list[float]], list[list[float]], list[list[float]]]:
        """Tokens, parents and log-probs of all rows, padded to a width or to the widest."""
        self.extend(state, pairs)
        rows = [
            self._row(text, min(self.depth, depth) if nodes else 0)
            for text, nodes, depth in zip(state.rows, limits.nodes, limits.depth, strict=True)
        ]
        width = width or max(len(tokens) for tokens, _, _ in rows)
        state.promised = sum(text.promise() for text in state.rows) / len(state.rows)

        def padded(part: int, value: float) -> list[list[float]]:
            return [row[part] + [value] * (width - len(row[part])) for row in rows]

        return padded(0, 0), padded(1, -2), padded(2, -math.inf)

    def _row(self, text: FoundText, depth: int) -> tuple[list[int], list[int], list[float]]:
        """Tokens, parents and log-probs of one row, the root first."""
        tokens, parents, log_probs = [0], [-1], [0.0]
        chains = text.draft(depth, self.branches)
        for (_, chain), chances in zip(chains, text.chances(), strict=True):
            parent = 0
            for token, chance in zip(chain, chances, strict=True):
                tokens.append(token)
                parents.append(parent)
                log_probs.append(math.log(chance))
                parent = len(tokens) - 1
        return tokens, parents, log_probs
