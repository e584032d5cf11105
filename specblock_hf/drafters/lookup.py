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
"""
Drafts that cost nothing: continuations of the text's last tokens found earlier in the prompt or the output, and a
drafter that
adds them to the tree of another.

What a look-up is worth depends on the text, so the chance of each drafted token is learned while a call runs, from
how often
continuations of equally long matches were right so far; it decides how far a continuation enters the tree.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..callbacks import DraftingCallback
from ..drafter import DraftingPlan, DraftState, Limits, Pairs, TokenTable, TreeDrafter
from ..proposal import propose
from ..training.objective import TargetBatch
from ..tree import FOUND, DraftTree
from ..upload import on_device


SHORTEST_MATCH = 2
LONGEST_MATCH = 12
LATEST_PLACES = 8  # earlier places that are compared: a frequent bigram has hundreds
PRIOR_RIGHT, PRIOR_TRIED = 1.0, 2.0


@dataclass
class FoundText:
    """
    The text of one row, and where its pairs of tokens occurred.

    Args:
        tokens (`list[int]`): Prompt and output so far, without the prompt's first token, which no pair tells.
        places (`dict[tuple[int, int], list[int]]`): For every two tokens in a row, the indices of what followed.
        chains (`list[tuple[int, list[int]]]`): Length of match and drafted tokens of the last round.
        right (`dict[int, float]`): Drafted tokens that were right, by length of match; `tried` counts all that were
            judged.
        tried (`dict[int, float]`): See `right`.
    """

    tokens: list[int] = field(default_factory=list)
    places: dict[tuple[int, int], list[int]] = field(default_factory=lambda: defaultdict(list))
    chains: list[tuple[int, list[int]]] = field(default_factory=list)
    right: dict[int, float] = field(default_factory=lambda: defaultdict(lambda: PRIOR_RIGHT))
    tried: dict[int, float] = field(default_factory=lambda: defaultdict(lambda: PRIOR_TRIED))

    def append(self, new: list[int]) -> None:
        """Take in what was emitted, and judge the last round's drafts by it."""
        for match, chain in self.chains:
            for drafted, emitted in zip(chain, new, strict=False):
                self.tried[match] += 1
                self.right[match] += drafted == emitted
                if drafted != emitted:
                    break
        self.chains = []
        for token in new:
            self.tokens.append(token)
            if len(self.tokens) > SHORTEST_MATCH:
                self.places[self.tokens[-3], self.tokens[-2]].append(len(self.tokens) - 1)

    def chance(self, match: int) -> float:
        """How likely the next token of a continuation after a match of this length is right."""
        return self.right[match] / self.tried[match]

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


@dataclass
class LookupState(DraftState):
    """Adds the rows' texts to [`DraftState`]."""

    rows: list[FoundText] = field(default_factory=list)

    def keep_rows(self, places: Sequence[int]) -> None:
        super().keep_rows(places)
        self.rows = [self.rows[place] for place in places]


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

    def propose(self, state: LookupState, pairs: Pairs, limits: Limits) -> DraftTree:
        self.extend(state, pairs)
        rows = [
            self._row(text, min(self.depth, depth) if nodes else 0)
            for text, nodes, depth in zip(state.rows, limits.nodes, limits.depth, strict=True)
        ]
        width = max(len(tokens) for tokens, _, _ in rows)
        device = pairs.tokens.device

        def padded(part: int, value: float) -> list[list[float]]:
            return [row[part] + [value] * (width - len(row[part])) for row in rows]

        tokens, parents = on_device((padded(0, 0), padded(1, -2)), device)
        log_probs = on_device(padded(2, -math.inf), device)
        last = pairs.tokens.gather(1, (pairs.lengths - 1).clamp_min(0).unsqueeze(1))
        tokens[:, :1] = last
        origin = torch.stack([torch.full_like(tokens, FOUND), torch.zeros_like(tokens)], dim=-1)
        origin[:, 0] = -1
        tree = DraftTree(tokens, parents, log_probs, origin, height=min(self.depth, width - 1))
        return tree.merge_duplicates().prune(limits.nodes)

    def _row(self, text: FoundText, depth: int) -> tuple[list[int], list[int], list[float]]:
        """Tokens, parents and log-probs of one row, the root first."""
        tokens, parents, log_probs = [0], [-1], [0.0]
        for match, chain in text.draft(depth, self.branches):
            log_chance = math.log(text.chance(match))
            parent = 0
            for token in chain:
                tokens.append(token)
                parents.append(parent)
                log_probs.append(log_chance)
                parent = len(tokens) - 1
        return tokens, parents, log_probs


def _of_first(name: str) -> Any:
    """An attribute of the first part, as it is now, unless the joined drafter is given one of its own."""
    own = f"_own_{name}"

    def get(joined: JoinedDrafter) -> Any:
        return vars(joined).get(own, getattr(joined.parts[0], name))

    def give(joined: JoinedDrafter, value: Any) -> None:
        vars(joined)[own] = value

    return property(get, give)


@dataclass
class JoinedState(DraftState):
    """The state of every drafter, the first one's being the one that counts forwards."""

    parts: list[DraftState] = field(default_factory=list)

    def keep_rows(self, places: Sequence[int]) -> None:
        super().keep_rows(places)
        for part in self.parts:
            part.keep_rows(places)


class JoinedDrafter(TreeDrafter):
    """
    Several drafters as one: their trees are merged and the likeliest nodes kept. Whatever a drafter has that is not
    given to the joined one, such as a plan or a lock, is the first drafter's; callbacks are those of all.

    Args:
        drafter ([`TreeDrafter`]): The one that reads the target's states and decides what is drafted where.
        *others ([`TreeDrafter`]): Drafters that read none, such as [`LookupDrafter`].
    """

    def __init__(self, drafter: TreeDrafter, *others: TreeDrafter):
        readers = [type(other).__name__ for other in others if other.feature_layers]
        if readers:
            raise ValueError(
                f"{readers[0]} reads the target's states, which only the first drafter may; put it first."
            )
        self.parts = (drafter, *others)
        self._added: tuple[DraftingCallback, ...] = ()

    config = _of_first("config")
    lock = _of_first("lock")
    feature_layers = _of_first("feature_layers")
    objective_class = _of_first("objective_class")
    can_sample = _of_first("can_sample")
    drafting_plan = _of_first("drafting_plan")
    compiled_rounds = _of_first("compiled_rounds")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.label})"

    @property
    def label(self) -> str:
        return " + ".join(part.label for part in self.parts)

    @property
    def network(self) -> TreeDrafter:
        return self.parts[0].network

    @property
    def callbacks(self) -> tuple[DraftingCallback, ...]:
        """Those of the parts, and those that were added to the joined drafter."""
        return (*self._heard_by_parts(), *self._added)

    @callbacks.setter
    def callbacks(self, callbacks: tuple[DraftingCallback, ...]) -> None:
        heard = self._heard_by_parts()
        self._added = tuple(callback for callback in callbacks if callback not in heard)

    def _heard_by_parts(self) -> tuple[DraftingCallback, ...]:
        return tuple(dict.fromkeys(callback for part in self.parts for callback in part.callbacks))

    def remove_callback(self, callback: DraftingCallback) -> None:
        """As [`~TreeDrafter.remove_callback`]; one of a part is taken off the part."""
        for part in self.parts:
            if callback in part.callbacks:
                return part.remove_callback(callback)
        super().remove_callback(callback)

    def default_plan(self, device: torch.device) -> DraftingPlan:
        return self.parts[0].default_plan(device)

    def acceptance(self, with_lookup: bool = False) -> list[tuple[DraftingPlan, float]]:
        looks_up = any(isinstance(part, LookupDrafter) for part in self.parts[1:])
        return self.parts[0].acceptance(with_lookup or looks_up)

    def feature_layers_for(self, target: PreTrainedModel) -> tuple[int, ...]:
        return self.parts[0].feature_layers_for(target)

    def check_target(self, target: PreTrainedModel) -> None:
        for part in self.parts:
            part.check_target(target)

    def begin(self, table: TokenTable, batch_size: int, max_length: int, *, first_position: int = 0) -> JoinedState:
        parts = [part.begin(table, batch_size, max_length, first_position=first_position) for part in self.parts]
        return JoinedState(table, batch_size, max_length, first_position=first_position, parts=parts)

    def extend(self, state: JoinedState, pairs: Pairs) -> None:
        for part, part_state in zip(self.parts, state.parts, strict=True):
            with part.lock:
                part.extend(part_state, pairs)
        self._count(state)

    def propose(self, state: JoinedState, pairs: Pairs, limits: Limits) -> DraftTree:
        if limits.draft_sampling != "topk":
            return self._draw(state, pairs, limits)
        trees = [propose(part, s, pairs, limits) for part, s in zip(self.parts, state.parts, strict=True)]
        self._count(state)
        tree = trees[0]
        for other in trees[1:]:
            if other.tokens.shape[1] > 1:
                tree = tree.merge(other.to(tree.tokens.device))
        return tree.prune(limits.nodes)

    def _draw(self, state: JoinedState, pairs: Pairs, limits: Limits) -> DraftTree:
        """A drawn tree beside the likeliest of what the others find, which gets at most half of the nodes."""
        half = tuple(nodes // 2 for nodes in limits.nodes)
        fixed = replace(limits, nodes=half, draft_sampling="topk")
        trees = [propose(part, s, pairs, fixed) for part, s in zip(self.parts[1:], state.parts[1:], strict=True)]
        found = trees[0] if trees else None
        for other in trees[1:]:
            found = found.merge(other).prune(half)
        taken = found.tokens.shape[1] - 1 if trees else 0
        left = replace(limits, nodes=tuple(nodes and nodes - taken for nodes in limits.nodes))
        state.parts[0].warp = state.warp
        drawn = propose(self.parts[0], state.parts[0], pairs, left)
        self._count(state)
        return drawn.beside(found.to(drawn.tokens.device)) if taken else drawn

    @staticmethod
    def _count(state: JoinedState) -> None:
        state.calls, state.forward_rows = state.parts[0].calls, state.parts[0].forward_rows

    def loss(
        self,
        batch: TargetBatch,
        objective: Any = None,
        *,
        progress: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> dict[str, torch.Tensor]:
        return self.parts[0].loss(batch, objective, progress=progress, generator=generator)

    def parameters_of(self, scope: Literal["head", "full"]) -> list[nn.Parameter]:
        return self.parts[0].parameters_of(scope)


__all__ = ["JoinedDrafter", "LookupDrafter"]
