# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What a drafter can do, what is chosen of it for a round, and what the round then did."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from .estimates import BANDS


FOUND = (0.5, 1.3, 2.0)
"""Tokens that look-ups promise of a row: what follows differs below, between and above these."""

RIGHT = (0.0, 0.62, 0.7, 0.8)
"""How often each token of what was looked up is right if those before it are, for each of these."""


@dataclass(frozen=True)
class Way:
    """
    How to draft: forwards of the drafter in a round and rows of each after the first.

    Args:
        forwards (`int`): 0 for look-ups alone.
        starts (`int`, *optional*): `None` for as many as the drafter's rule asks.
    """

    forwards: int
    starts: int | None = None

    @property
    def name(self) -> str:
        return f"{self.forwards}/{self.starts or 0}"


LOOKUPS = Way(0)


@dataclass(frozen=True)
class Offer:
    """
    What a drafter can do in a setting.

    Args:
        ways (`dict[Way, list[tuple[int, float]]]`): (nodes, tau) of the plans that it has figures of.
        most (`int`): Nodes that no tree exceeds.
        trusted (`bool`): The figures were measured with this drafter; others are halved.
        finds (`bool`): It joins look-ups to its trees, and can leave its forwards out.
        cuts (`bool`): Trees may be cut by likelihood, for which the host must know it.
        sizes (`tuple[int, ...]`): The only numbers of nodes to choose from; all if empty.
        slope (`float`): As in [`VerifyTimes`].
    """

    ways: dict[Way, list[tuple[int, float]]]
    most: int
    trusted: bool = False
    finds: bool = False
    cuts: bool = True
    sizes: tuple[int, ...] = ()
    slope: float = 0.06
    _priors: dict[tuple[Way, int], list[float]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def prior(self, way: Way, found: int) -> list[float]:
        """Tokens that the nodes of each band add, where look-ups promise so much."""
        if (way, found) in self._priors:
            return self._priors[way, found]
        right = RIGHT[found]
        sums = [right * (1 - right**nodes) / (1 - right) for nodes in BANDS]
        if way.forwards:
            trust = 1.0 if self.trusted else 0.5
            drafts = [trust * max(self.drafts(part, nodes) for part in self._parts(way)) for nodes in BANDS]
            sums = [max(tokens, least) for tokens, least in zip(drafts, sums, strict=True)]
            sums = list(accumulate(sums, max))  # figures that were measured may say that more nodes accept less
        self._priors[way, found] = [here - before for here, before in zip(sums, [0.0, *sums], strict=False)]
        return self._priors[way, found]

    def _parts(self, way: Way) -> list[Way]:
        """Ways that draft a part of what this one does, whose likeliest nodes are no likelier than its own."""
        starts = way.starts or math.inf
        return [
            part
            for part in self.ways
            if part.forwards <= way.forwards and (part.forwards == 1 or (part.starts or math.inf) <= starts)
        ]

    def drafts(self, way: Way, nodes: int) -> float:
        """tau - 1 with so many nodes by the figures, between and beyond them by the logarithm of the nodes."""
        points = [(math.log(1 + size), max(tau - 1, 0.0)) for size, tau in self.ways[way] if size]
        at = math.log(1 + nodes)
        if len(points) == 1 or at <= points[0][0]:
            return points[0][1] * min(at / points[0][0], 1.5)
        right = min(bisect_right([x for x, _ in points], at), len(points) - 1)
        (x0, y0), (x1, y1) = points[right - 1], points[right]
        return y0 + (at - x0) * (y1 - y0) / (x1 - x0)

    def allowed(self, grown: int) -> list[int]:
        """Numbers of nodes to choose from after trees of `grown`: at most twice the rows, or the next given size."""
        within = [nodes for nodes in self.sizes or BANDS if nodes <= self.most]
        following = [nodes for nodes in self.sizes if nodes > grown][:1]
        return [nodes for nodes in within if nodes <= max([2 * grown + 1, *following, *within[:1]])]


@dataclass(frozen=True)
class Choice:
    """
    What to draft in the next round.

    Args:
        nodes (`int`): Most nodes of each row; 0 is a plain step.
        way (`Way`): How to draft them.
        min_probability (`float`): Path probability, by the drafter, below which a node does not pay.
        enough_found (`float`): Tokens promised by look-ups from which the drafter's forwards are left out.
        why (`str`): For people.
        learns (`bool`): It is not what pays most, but has to be known better.
    """

    nodes: int
    way: Way = LOOKUPS
    min_probability: float = 0.0
    enough_found: float = math.inf
    why: str = "nothing is known yet"
    learns: bool = False

    def __str__(self) -> str:
        if not self.nodes:
            return "plain steps"
        what = f"{self.way.forwards} forward(s)" if self.way.forwards else "look-ups only"
        least = f", of probability {self.min_probability:.2g} or more" if self.min_probability else ""
        return f"{self.nodes} nodes by {what}{least}"


@dataclass(frozen=True)
class Round:
    """
    What a round did.

    Args:
        choice (`Choice`): What it was to draft.
        rows (sequence of sequences of `tuple[float, bool]`):
            Of each row that could accept all that it drafted, its nodes: log2 of the path's probability by the
            drafter, and whether the target kept it.
        nodes (`int`): Verified ones of each row, padding and the root counted.
        emitted (`float`): Tokens of a row, on average.
        drafted (`bool`): The drafter ran.
        found (`float`): Tokens of a row that look-ups promised.
        draft (`float`): Seconds of drafting.
        rest (`float`): Seconds of everything else.
        usual (`bool`): The drafter took in what one round teaches, and not what had waited for it.
        settled (`bool`): Later rounds will take as long; those of fixed shapes do not before they are captured.
        columns (`int`, *optional*): What the target read of each row, if it read more than the nodes.
    """

    choice: Choice
    rows: Sequence[Sequence[tuple[float, bool]]]
    nodes: int
    emitted: float
    drafted: bool
    found: float
    draft: float
    rest: float
    usual: bool = True
    settled: bool = True
    columns: int | None = None
