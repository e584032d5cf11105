# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
A simulated service for the plan that finds itself: what rounds cost and accept is known, so that the regret of every
choice is. No model and no clock.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from specblock_hf.calibration.costs import CostCurves, interpolate
from specblock_hf.planning.controller import PlanController, Setting
from specblock_hf.planning.estimates import BANDS, MULTIPLE
from specblock_hf.planning.offers import FOUND, LOOKUPS, Choice, Offer, Round, Way


SETTING = Setting("a target", "a machine", "float32")
PROMISES = (0.0, 0.9, 1.6, 3.0)
"""Tokens that look-ups promise, below, between and above the values of `FOUND`."""

LOOKUP_SECONDS = 0.0005
"""What looking up takes."""


@dataclass(frozen=True)
class Nature:
    """
    What a text is like.

    Args:
        right (`float`): Tokens that drafts add, as a multiple of the recorded ones.
        found (sequence of `float`, *optional*): Shares of rounds in which look-ups promise as much as `FOUND` says.
        kept (`float`, *optional*, defaults to 1.0): What is accepted of a promise.
    """

    right: float
    found: Sequence[float] = (1.0, 0.0, 0.0, 0.0)
    kept: float = 1.0


@dataclass
class SimulatedService:
    """
    Rounds of one long text, by costs that were measured and acceptance that was recorded.

    Args:
        curves ([`CostCurves`]): What rounds cost.
        offer ([`Offer`]): What the drafter can do; its figures times the text's `right` are the truth.
        nature (`Callable`): From the number of tokens so far to what the text is like.
        noise (`float`, *optional*, defaults to 0.05): Standard deviation of the logarithm of a time.
        spikes (`float`, *optional*, defaults to 0.0): Share of times that are 20 times as long.
        seed (`int`, *optional*, defaults to 0): Of everything.

    Attributes:
        tokens (`float`): Expected tokens so far.
        seconds (`float`): Expected seconds, without noise.
        lost (`list[float]`): After each round, seconds by which the best way for each text would have been faster.
        choices (`list[Choice]`): What was asked.
        verified (`list[int]`): Nodes that were verified.
    """

    curves: CostCurves
    offer: Offer
    nature: Callable[[float], Nature]
    noise: float = 0.05
    spikes: float = 0.0
    seed: int = 0
    tokens: float = 0.0
    seconds: float = 0.0
    lost: list[float] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    verified: list[int] = field(default_factory=list)
    _best: dict[Nature, tuple[float, Choice]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def run(self, controller: PlanController, tokens: float) -> SimulatedService:
        """Serve until so many tokens more are expected to have been emitted."""
        end = self.tokens + tokens
        while self.tokens < end:
            choice = controller.next(SETTING, self.offer)
            controller.observe(SETTING, self.offer, self.play(choice))
        return self

    def play(self, choice: Choice) -> Round:
        """One round; what was expected of it is counted."""
        nature = self.nature(self.tokens)
        rate, _ = self.best(nature)
        tokens, seconds = self.expected(choice, nature)
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        self.lost.append((self.lost[-1] if self.lost else 0.0) + seconds - tokens / rate)
        self.choices.append(choice)
        found = self._random.choices(range(len(nature.found)), nature.found)[0] if self.offer.finds else 0
        way = LOOKUPS if PROMISES[found] >= choice.enough_found else choice.way
        chances = self.chances(way, found, nature, choice)
        # Sure rounds and doubtful ones, as texts have them.
        sure = self._random.choice((0.5, 1.5))
        row = [(math.log2(max(p, 1e-6)), self._random.random() < min(sure * p, 1.0)) for p in chances]
        self.verified.append(len(row))
        draft, rest = self._costs(way, len(row)) if choice.nodes else (0.0, self._costs(way, 0)[1])
        return Round(
            choice,
            [row] if choice.nodes else [],
            1 + len(row),
            1 + sum(kept for _, kept in row),
            drafted=way.forwards > 0,
            found=PROMISES[found],
            draft=self._noisy(draft),
            rest=self._noisy(rest),
        )

    def best(self, nature: Nature) -> tuple[float, Choice]:
        """Tokens a second of the best choice for such a text, and which it is."""
        if nature not in self._best:
            ways = [LOOKUPS] * self.offer.finds + list(self.offer.ways)
            enough = [math.inf, *FOUND] if self.offer.finds else [math.inf]
            choices = [Choice(0)] + [
                Choice(nodes, way, enough_found=0.0 if way == LOOKUPS else least)
                for way in ways
                for nodes in self.offer.allowed(self.offer.most)
                for least in enough
            ]
            speeds = [
                (tokens / seconds, choice) for choice in choices for tokens, seconds in [self.expected(choice, nature)]
            ]
            self._best[nature] = max(speeds, key=lambda speed: speed[0])
        return self._best[nature]

    def expected(self, choice: Choice, nature: Nature) -> tuple[float, float]:
        """Tokens and seconds of a round."""
        if not choice.nodes:
            return 1.0, sum(self._costs(LOOKUPS, 0)) - LOOKUP_SECONDS * self.offer.finds
        tokens = seconds = 0.0
        for found, share in enumerate(nature.found):
            way = LOOKUPS if PROMISES[found] >= choice.enough_found else choice.way
            chances = self.chances(way, found, nature, choice)
            tokens += share * (1 + sum(chances))
            seconds += share * sum(self._costs(way, len(chances)))
        return tokens, seconds

    def chances(self, way: Way, found: int, nature: Nature, choice: Choice) -> list[float]:
        """Of each node to be accepted, the likeliest first."""
        promised = PROMISES[found] * nature.kept
        sums = [min(promised, 0.9 * nodes) for nodes in BANDS]
        if way.forwards:
            drafted = [nature.right * self.offer.drafts(way, nodes) for nodes in BANDS]
            sums = [max(both) for both in zip(drafted, sums, strict=True)]
        chances: list[float] = []
        for (low, before), (high, here) in pairwise(zip((0, *BANDS), (0.0, *sums), strict=True)):
            chances += [min(max(here - before, 0.0) / (high - low), 0.95)] * (high - low)
        if not way.forwards:
            chances = [chance for chance in chances if chance]
        worth = sum(chance >= choice.min_probability for chance in chances[: choice.nodes])
        # Cut trees are filled up with the likeliest of the others.
        return chances[: min(-(-(worth + 1) // MULTIPLE) * MULTIPLE - 1, choice.nodes)]

    def _costs(self, way: Way, nodes: int) -> tuple[float, float]:
        """Seconds of drafting and of everything else."""
        curves, draft = self.curves, LOOKUP_SECONDS * self.offer.finds
        if way.forwards:
            later = interpolate(curves.later or ((1, curves.draft),), way.starts or 32)
            draft += curves.draft + (way.forwards - 1) * later
        return draft, curves.host + interpolate(curves.verify, nodes + 1)

    def _noisy(self, seconds: float) -> float:
        spike = 20 if self._random.random() < self.spikes else 1
        return seconds * spike * self._random.lognormvariate(0, self.noise)
