# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Everything that verifying a given sampled tree can lead to, with its probability: no coin is thrown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from ..trees.rejection_sampling import SampledVerifier, TargetDistributions
from ..trees.tree import DraftTree


@dataclass(frozen=True)
class Outcome:
    """
    One way for verification to end.

    Args:
        probability (`float`): Over the coins of the rule.
        nodes (`list[int]`): The accepted path, the root first.
        distribution (`torch.Tensor` of shape `[V]`): Of the token after it.
    """

    probability: float
    nodes: list[int]
    distribution: torch.Tensor


def outcomes(
    tree: DraftTree, target: TargetDistributions, rule: Literal["token", "block"], row: int = 0
) -> Iterator[Outcome]:
    """
    Every outcome for one row of a tree that has a draft, by deciding the rule's coins in every possible way.

    Args:
        tree ([`DraftTree`]): A batch of trees.
        target ([`TargetDistributions`]): The target's distributions, asked for again and again.
        rule (`str`): `"token"` or `"block"`.
        row (`int`, *optional*, defaults to 0): Which tree of the batch.
    """
    active = [number == row for number in range(len(tree.tokens))]
    pending: list[tuple[bool, ...]] = [()]
    while pending:
        coins = _DecidedCoins(pending.pop(), pending)
        walk = SampledVerifier(target, rule, coins)(tree, active, _no_select, _no_stop)
        yield Outcome(coins.probability, walk.nodes[row, : int(walk.lengths[row])].tolist(), coins.distribution)


class _DecidedCoins:
    """Coins that fall as decided and then on rejection, and note where they could have fallen otherwise."""

    def __init__(self, decided: tuple[bool, ...], pending: list[tuple[bool, ...]]):
        self._decided, self._pending = list(decided), pending
        self._fallen: list[bool] = []
        self.probability = 1.0
        self.distribution: torch.Tensor

    def accept(self, probability: float) -> bool:
        if probability <= 0 or probability >= 1:
            return probability >= 1
        if len(self._fallen) < len(self._decided):
            accepted = self._decided[len(self._fallen)]
        else:
            accepted = False
            self._pending.append((*self._fallen, True))
        self._fallen.append(accepted)
        self.probability *= probability if accepted else 1 - probability
        return accepted

    def draw(self, mass: torch.Tensor) -> int:
        self.distribution = mass / mass.sum()
        return int(mass.argmax())


def _no_select(row: int, node: int) -> int:
    raise ValueError("this row has no draft; its only outcome is a token of the target's own distribution.")


def _no_stop(row: int, token: int) -> bool:
    return False
