# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Drafters as a third party may write them: each breaks one promise of [`TreeDrafter`], of a batch of any size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from drafters_for_tests import Told, ToldDrafter

from specblock_hf.drafting.plan import Limits
from specblock_hf.trees.tree import DraftDistributions, DraftTree


class ThirdPartyDrafter(ToldDrafter):
    """
    Random trees of a whole batch, spoilt in one way.

    Args:
        vocab_size (`int`): The target's.
        fault (`str`): One of `FAULTS`.
        feature_layers (`tuple[int, ...]`, *optional*): What to ask the target for.
    """

    can_sample = True

    def __init__(self, vocab_size: int, fault: str, feature_layers: tuple[int, ...] = ()):
        super().__init__(vocab_size, feature_layers)
        self.fault = fault

    def propose(self, state, pairs, limits) -> DraftTree:
        if self.fault == "told in place":
            for told in (pairs.tokens, pairs.positions, pairs.lengths, *pairs.features):
                told.zero_()
        return super().propose(state, pairs, limits)

    def draft(self, state: Told, limits: Limits) -> DraftTree:
        size = max(limits.nodes)
        if self.fault in ("too many nodes", "too many and too deep"):
            size = 3 * size + 20
        tree = self._random_tree(state, size, chain="deep" in self.fault)
        return FAULTS[self.fault](tree)

    def _random_tree(self, state: Told, size: int, chain: bool) -> DraftTree:
        shape = (state.batch_size, size + 1)
        tokens = torch.randint(self.config.vocab_size, shape, generator=state.generator)
        numbers = torch.arange(size + 1).expand(shape)
        before = (torch.rand(shape, generator=state.generator) * numbers).long()
        parents = torch.where(numbers == 0, -1, numbers - 1 if chain else before)
        log_probs = -torch.rand(shape, generator=state.generator)
        return DraftTree(tokens, parents, log_probs, torch.zeros(*shape, 2, dtype=torch.long))


def _tokens(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[DraftTree], DraftTree]:
    return lambda tree: replace(tree, tokens=change(tree.tokens))


def _parents(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[DraftTree], DraftTree]:
    return lambda tree: replace(tree, parents=change(tree.parents))


def _log_probs(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[DraftTree], DraftTree]:
    return lambda tree: replace(tree, log_probs=change(tree.log_probs))


def _below_root(values: torch.Tensor, value: int) -> torch.Tensor:
    return torch.cat((values[:, :1], torch.full_like(values[:, 1:], value)), dim=1)


def _with_distributions(value: float) -> Callable[[DraftTree], DraftTree]:
    def drawn(tree: DraftTree) -> DraftTree:
        rows, nodes = tree.tokens.shape
        distributions = torch.full((rows, 1, 8), value)
        drawn_from = torch.zeros(rows, nodes, dtype=torch.long)
        drawn_from[:, 0] = -1
        return replace(tree, distributions=DraftDistributions(distributions, torch.arange(8), drawn_from))

    return drawn


def _each(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[DraftTree], DraftTree]:
    def changed(tree: DraftTree) -> DraftTree:
        parts = {name: change(getattr(tree, name)) for name in ("tokens", "parents", "log_probs", "origin")}
        return replace(tree, **parts)

    return changed


FAULTS: dict[str, Callable[[DraftTree], Any]] = {
    "none": lambda tree: tree,
    "too many nodes": lambda tree: tree,
    "too deep": lambda tree: tree,
    "too many and too deep": lambda tree: tree,
    "told in place": lambda tree: tree,
    "parents later": _parents(lambda parents: parents.flip(1)),
    "parents themselves": _parents(lambda parents: torch.arange(parents.shape[1]).expand_as(parents)),
    "parents in a circle": _parents(lambda parents: (torch.arange(parents.shape[1]) + 1).expand_as(parents)),
    "parents out of range": _parents(lambda parents: _below_root(parents, 10_000)),
    "parents below -2": _parents(lambda parents: _below_root(parents, -7)),
    "several roots": _parents(lambda parents: torch.full_like(parents, -1)),
    "root is padding": _parents(lambda parents: torch.full_like(parents, -2)),
    "root has a parent": _parents(lambda parents: parents.clamp_min(0)),
    "another root": _tokens(lambda tokens: torch.full_like(tokens, 3)),
    "int32 tokens": _tokens(lambda tokens: tokens.int()),
    "float tokens": _tokens(lambda tokens: tokens.float()),
    "int32 parents": _parents(lambda parents: parents.int()),
    "float parents": _parents(lambda parents: parents.float()),
    "float64 log-probs": _log_probs(lambda log_probs: log_probs.double()),
    "bfloat16 log-probs": _log_probs(lambda log_probs: log_probs.bfloat16()),
    "integer log-probs": _log_probs(lambda log_probs: log_probs.long()),
    "log-probs with a gradient": _log_probs(lambda log_probs: log_probs.requires_grad_()),
    "nan log-probs": _log_probs(lambda log_probs: torch.full_like(log_probs, torch.nan)),
    "inf log-probs": _log_probs(lambda log_probs: torch.full_like(log_probs, torch.inf)),
    "positive log-probs": _log_probs(lambda log_probs: -5 * log_probs),
    "ids beyond the vocabulary": _tokens(lambda tokens: _below_root(tokens, 1_000)),
    "huge ids": _tokens(lambda tokens: _below_root(tokens, 2**40)),
    "negative ids": _tokens(lambda tokens: _below_root(tokens, -1)),
    "one token everywhere": _tokens(lambda tokens: torch.full_like(tokens, 7)),
    "height too low": lambda tree: replace(tree, height=1),
    "deep, height too low": lambda tree: replace(tree, height=1),
    "height of 0": lambda tree: replace(tree, height=0),
    "height too high": lambda tree: replace(tree, height=500),
    "distributions of nan": _with_distributions(torch.nan),
    "distributions of -inf": _with_distributions(-torch.inf),
    "distributions of +inf": _with_distributions(torch.inf),
    "distributions of other tokens": _with_distributions(0.0),
    "another row": _each(lambda values: torch.cat((values, values[:1]))),
    "no row": _each(lambda values: values[:0]),
    "no axis of rows": _each(lambda values: values[0]),
    "no node": _each(lambda values: values[:, :0]),
    "no origin": lambda tree: replace(tree, origin=None),
    "no log-probs": lambda tree: replace(tree, log_probs=None),
    "fewer parents": _parents(lambda parents: parents[:, :1]),
    "nothing": lambda tree: None,
}
