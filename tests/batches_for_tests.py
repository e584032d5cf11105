# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Batches for tests: padded prompts, and a drafter that gives every row a drafter of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from conftest import VOCAB, prompt_of
from drafters_for_tests import GarbageDrafter, OracleDrafter, ToldDrafter
from transformers import PreTrainedConfig

from specblock_hf import DraftingPlan
from specblock_hf.drafting.drafter import DraftState, TreeDrafter
from specblock_hf.drafting.pairs import Pairs
from specblock_hf.drafting.plan import Limits
from specblock_hf.trees.tree import DraftTree


@dataclass
class RowStates(DraftState):
    """The state of each row's own drafter."""

    rows: list[DraftState] = field(default_factory=list)

    def keep_rows(self, places) -> None:
        super().keep_rows(places)
        self.rows = [self.rows[place] for place in places]


class RowWiseDrafter(TreeDrafter):
    """
    Gives row r of a batch to the r-th drafter.

    Args:
        drafters (sequence of [`TreeDrafter`]): Of batches of one; all read the same feature layers.
    """

    def __init__(self, drafters: Sequence[ToldDrafter]):
        self.drafters = list(drafters)
        self.config = PreTrainedConfig(vocab_size=drafters[0].config.vocab_size)
        self.feature_layers = drafters[0].feature_layers

    def default_plan(self, device) -> DraftingPlan:
        return self.drafters[0].default_plan(device)

    def check_target(self, target) -> None:
        self.drafters[0].check_target(target)

    def begin(self, table, batch_size, max_length, *, first_position=0) -> RowStates:
        assert batch_size == len(self.drafters)
        state = RowStates(table, batch_size, max_length, first_position)
        state.rows = [drafter.begin(table, 1, max_length, first_position=first_position) for drafter in self.drafters]
        return state

    def extend(self, state, pairs) -> None:
        for drafter, row, own in self._rows(state, pairs):
            with drafter.lock:
                drafter.extend(row, own)

    def propose(self, state, pairs, limits) -> DraftTree:
        state.calls += 1
        trees = []
        for index, (drafter, row, own) in enumerate(self._rows(state, pairs)):
            limit = Limits((limits.nodes[index],), (limits.depth[index],))
            assert limit.nodes[0] and own.lengths[0], "only rows that may draft are asked for"
            with drafter.lock:
                tree = drafter.propose(row, own, limit)
            # An oracle minds the limit of depth only.
            trees.append(tree if tree.tokens.shape[1] <= limit.nodes[0] + 1 else tree.prune(limit.nodes))
        return stacked(trees)

    def _rows(self, state, pairs):
        drafters = [self.drafters[row] for row in state.drafting]
        return zip(drafters, state.rows, [row_of(pairs, row) for row in range(state.batch_size)], strict=True)

    def loss(self, batch):
        raise NotImplementedError

    def parameters_of(self, scope):
        return []


def row_of(pairs: Pairs, row: int) -> Pairs:
    """One row's pairs, without padding."""
    length = int(pairs.lengths[row])
    here = slice(row, row + 1), slice(0, length)
    return Pairs(
        tokens=pairs.tokens[here],
        features=tuple(feature[here] for feature in pairs.features),
        positions=pairs.positions[here],
        lengths=pairs.lengths[row : row + 1],
        table=pairs.table,
        given_embeds=None if pairs.given_embeds is None else pairs.given_embeds[here],
    )


def stacked(trees: Sequence[DraftTree]) -> DraftTree:
    """Trees of one row each as one batch."""
    width = max(tree.tokens.shape[1] for tree in trees)

    def padded(name: str, value: float) -> torch.Tensor:
        rows = []
        for tree in trees:
            values = getattr(tree, name)
            missing = width - values.shape[1]
            shape = (0, 0, 0, missing) if values.ndim == 3 else (0, missing)
            rows.append(torch.nn.functional.pad(values, shape, value=value))
        return torch.cat(rows)

    return DraftTree(padded("tokens", 0), padded("parents", -2), padded("log_probs", -torch.inf), padded("origin", -1))


def padded_batch(lengths: Sequence[int], seed: int = 0) -> dict[str, torch.LongTensor]:
    """Random prompts of these lengths, padded on the left with token 0."""
    widest = max(lengths)
    prompts = [prompt_of(length, seed + index) for index, length in enumerate(lengths)]
    pad = torch.nn.functional.pad
    return {
        "input_ids": torch.cat([pad(prompt, (widest - prompt.shape[1], 0)) for prompt in prompts]),
        "attention_mask": torch.cat(
            [pad(torch.ones_like(prompt), (widest - prompt.shape[1], 0)) for prompt in prompts]
        ),
    }


def oracles(
    outputs: torch.LongTensor,
    attention_mask: torch.LongTensor,
    plans=None,
    feature_layers: tuple[int, ...] = (),
    vocab_size: int = VOCAB,
) -> RowWiseDrafter:
    """
    An oracle for each row of what plain `generate()` returned; row r gets r, r + 1, ... tokens right unless `plans`
    says otherwise.
    """
    drafters = []
    for row, text in enumerate(outputs):
        hidden = int((attention_mask[row] == 0).sum())
        plan = plans[row] if plans else lambda number, row=row: (number * 3 + row * 5) % 9
        drafters.append(OracleDrafter(vocab_size, text[hidden:].tolist(), plan, feature_layers=feature_layers))
    return RowWiseDrafter(drafters)


def garbage(rows: int, feature_layers: tuple[int, ...] = (), vocab_size: int = VOCAB) -> RowWiseDrafter:
    drafters = [GarbageDrafter(vocab_size, feature_layers) for _ in range(rows)]
    return RowWiseDrafter(drafters)
