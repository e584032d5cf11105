# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Running estimates of what rounds cost and what they accept, from few and noisy samples. Whoever keeps them counts the
rounds, which is all that time means here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property


WINDOW = 15
"""Samples of a time that are kept. Their median counts: some ways take longer in some rounds by what they draft."""

FEW, OLD = 5, 400
"""Samples that a time needs to be known, and rounds after which it has to be taken anew."""

STEP, RENEWED = 0.01, 4
"""
By what share the machine's pace is followed in a round, and in which rounds a full window takes another sample: what
changes all times is laid to the machine, and what is known of rarer sizes holds at the pace of today.
"""

MULTIPLE = 4
"""
Nodes of a row, the root counted, by which trees grow and are cut: products of matrices are made for multiples. On two
AVX-512 cores 3 rows took a 135M target in float32 1.4 times as long as 4, and 9 rows as long as 12. With prepacked
weights 6 rows take no longer than 1.
"""

BANDS = (1, 3, 5, 7, 11, 15, 23, 31, 47, 63)
"""Drafted nodes of a row, by likelihood: what the nodes between two of these add is estimated together."""

RECENT = 48
"""Rounds after which what was accepted counts half: a text differs from the long run, and from the next one."""

STEADY = 256
"""The same in rounds that drafted, for what a drafter accepts on the whole, which recent rounds are weighed with."""

LEVEL_WEIGHT = 30.0
"""Accepted tokens that the long run counts for beside what the text at hand has accepted: those of some 20 rounds."""

WAY_WEIGHT, BAND_WEIGHT = 600.0, 150.0
"""
Accepted tokens that a way's likeness to the others counts for, and rounds that a band's likeness to its way's does, if
the figures were measured with the drafter. A round says little, as it accepts anything from none to all; from suite to
suite ways differ by 5 % and bands by 20 % from what the figures and the ease of the texts say.
"""

GUESSED = 0.2
"""How much those weights count where the figures are no more than a guess."""

CLAIMS = 10
"""Halvings of a path's probability that are told apart."""


def band_of(nodes: int) -> int:
    """The place in `BANDS` of the last band that a tree of so many nodes, or the node of this number, reaches into."""
    return min(bisect_left(BANDS, nodes), len(BANDS) - 1)


@dataclass
class Times:
    """
    Seconds of one part of a round.

    Args:
        samples (`list[float]`): Some of the latest ones, by the machine's pace.
        seen (`int`): The round of the last one.
    """

    samples: list[float] = field(default_factory=list)
    seen: int = 0

    def add(self, seconds: float, now: int) -> None:
        # What was measured long ago may have been on another machine, or with other libraries.
        old, self.seen = now - self.seen > OLD, now
        if len(self.samples) < WINDOW or old or now % RENEWED == 0:
            self.samples = [seconds] if old else [*self.samples[1 - WINDOW :], seconds]
            vars(self).pop("middle", None)

    def age(self, now: int) -> int:
        """Rounds since the last sample; many if there are too few."""
        return now - self.seen if len(self.samples) >= FEW else OLD

    @cached_property
    def middle(self) -> float:
        """The median; of two samples the smaller one."""
        return sorted(self.samples)[(len(self.samples) - 1) // 2]

    @property
    def spread(self) -> float:
        """How far the median lies above the lower quartile, as a share."""
        quartile = sorted(self.samples)[(len(self.samples) - 1) // 4]
        return self.middle / quartile - 1 if quartile else 0.0

    def paced(self, pace: float, seconds: float) -> float:
        """
        The machine's pace after one more time of this part. However long it is, it says no more than "slower".

        Args:
            pace (`float`): By what the samples were divided: 1.1 where all takes a tenth longer than at first.
            seconds (`float`): The time, divided by nothing.
        """
        if len(self.samples) < FEW:
            return pace
        return pace * (1 + STEP if seconds > pace * self.middle else 1 / (1 + STEP))


@dataclass
class VerifyTimes:
    """
    Seconds of everything but drafting in a round, by the nodes of each row's tree, the root counted; of a plain step
    for one node.

    Args:
        slope (`float`): Of a plain step's time that a node adds, for as long as only plain steps are known.
        sizes (`dict[int, Times]`): By the number of nodes, rounded up to a band with the root.
    """

    slope: float
    sizes: dict[int, Times] = field(default_factory=dict)

    def add(self, nodes: int, seconds: float, now: int) -> None:
        self.sizes.setdefault(self.size_of(nodes), Times()).add(seconds, now)
        vars(self).pop("points", None)

    def of(self, nodes: int) -> Times:
        """What is known of such a tree."""
        return self.sizes.get(self.size_of(nodes)) or Times()

    @staticmethod
    def size_of(nodes: int) -> int:
        return next((band + 1 for band in (0, *BANDS) if band + 1 >= nodes), nodes)

    @property
    def plain(self) -> float:
        """A plain step's, which is no longer than any other round's."""
        return self.points[0][1]

    @cached_property
    def points(self) -> list[tuple[int, float]]:
        """
        The measured points, without dips: less work costs no more than more work was measured to cost. A size that was
        measured once is none yet: that may have been at a bad moment. Beyond them the least is assumed that they
        allow, so that it is tried and measured.
        """
        points, most = [], float("inf")
        for size in sorted((s for s, times in self.sizes.items() if len(times.samples) > 1 or s == 1), reverse=True):
            most = min(most, self.sizes[size].middle)
            points.append((size, most))
        points.reverse()
        (last, highest), least = points[-1], self.slope * points[0][1]
        steep = least
        if len(points) > 1:
            before, lower = points[-2]
            steep = min((highest - lower) / (last - before), (highest - points[0][1]) / (last - points[0][0]))
            steep = min(max(steep, least / 4), least)
        return [*points, (10 * last, highest + 9 * last * steep)]

    def at(self, sizes: Sequence[float]) -> list[float]:
        """Seconds for these numbers of nodes, between the points."""
        points, seconds = self.points, []
        for size in sizes:
            right = bisect_left(points, (size, 0.0), 1, len(points) - 1)
            (x0, y0), (x1, y1) = points[right - 1], points[right]
            seconds.append(y0 + max(size - x0, 0) * (y1 - y0) / (x1 - x0))
        return seconds


@dataclass
class Level:
    """
    How the text at hand compares with the long run, whatever drafts it: texts differ far more than ways to draft do.

    Args:
        hits (`float`): Accepted nodes, fading by `RECENT`.
        expected (`float`): How many the long run of the ways that drafted them expected, fading alike.
        seen (`float`): When it was heard of last.
    """

    hits: float = 0.0
    expected: float = 0.0
    seen: float = 0.0

    def add(self, hits: float, expected: float, now: float, weight: float = 1.0) -> None:
        """Learn from a round that stands for so many."""
        fade = 0.5 ** ((now - self.seen) / RECENT)
        self.hits, self.expected = self.hits * fade + weight * hits, self.expected * fade + weight * expected
        self.seen = now

    def at(self, now: float) -> float:
        fade = 0.5 ** ((now - self.seen) / RECENT)
        return (self.hits * fade + LEVEL_WEIGHT) / (self.expected * fade + LEVEL_WEIGHT)


@dataclass
class Gains:
    """
    How many tokens the nodes of each band add, drafted one way, where a text is as easy as the prior says.

    How easy texts are is learned from all ways: what one way accepted of hard texts says nothing against it beside
    another that had easy ones, however long ago that was.

    A tree that was cut to its n likeliest nodes tells exactly what any smaller cut would have accepted, so every round
    teaches all bands up to its own size. Beyond them the prior is scaled by how the known bands compare with it.

    Args:
        hits (`list[float]`): Accepted nodes of each band, fading by `STEADY` in rounds that could have accepted some.
        trials (`list[float]`): Those rounds, each times how easy its text was, fading alike.
        way_hits (`float`): Accepted nodes of all bands, fading alike.
        way_prior (`float`): How many the prior would have had accepted of such texts.
        fill (`float`): Verified nodes, and tokens read again, as a share of the nodes that were allowed.
        rounds (`int`): All of them.
    """

    hits: list[float] = field(default_factory=lambda: [0.0] * len(BANDS))
    trials: list[float] = field(default_factory=lambda: [0.0] * len(BANDS))
    way_hits: float = 0.0
    way_prior: float = 0.0
    fill: float = 1.0
    rounds: int = 0

    def add(
        self,
        ranks: Sequence[int],
        asked: int,
        verified: int,
        prior: Sequence[float],
        ease: float = 1.0,
        rows: int = 1,
    ) -> None:
        """
        Args:
            ranks (sequence of `int`): Of the accepted nodes, by likelihood among those of their tree, from 0.
            asked (`int`): Nodes that were allowed.
            verified (`int`): How many of them there were that seemed worth it; others add nothing and cost nothing.
                With those that were read again.
            prior (sequence of `float`): Expected tokens of each band.
            ease (`float`, *optional*, defaults to 1.0): How much more is right of such a text than the prior says.
            rows (`int`, *optional*, defaults to 1): Of the batch; together they are a round.
        """
        fade, bands = 0.5 ** (1 / (STEADY * rows)), band_of(asked) + 1
        kept = [0] * len(BANDS)
        for rank in ranks:
            kept[band_of(rank + 1)] += 1
        for band in range(bands):  # what is known of larger trees does not fade because nobody draws them
            self.hits[band] = self.hits[band] * fade + kept[band]
            self.trials[band] = self.trials[band] * fade + ease
        self.way_hits = self.way_hits * fade + len(ranks)
        self.way_prior = self.way_prior * fade + ease * sum(prior[:bands])
        self.fill += (verified / asked - self.fill) * max(1 / 8, 1 / (self.rounds + 1))
        self.rounds += 1

    def expected(self, prior: Sequence[float], trust: float = 1.0) -> list[float]:
        """
        Tokens that trees of up to each band's nodes add where a text is as easy as the prior says.

        Args:
            prior (sequence of `float`): Expected tokens of each band.
            trust (`float`, *optional*, defaults to 1.0): Of the weights that hold for priors that were measured.
        """
        of_way, of_band = trust * WAY_WEIGHT, trust * BAND_WEIGHT
        own = (self.way_hits + of_way) / (self.way_prior + of_way)
        total, sums = 0.0, []
        for hits, trials, expected in zip(self.hits, self.trials, prior, strict=True):
            total += (hits + of_band * own * expected) / (trials + of_band)
            sums.append(total)
        return sums


@dataclass
class Claims:
    """
    How often nodes are accepted of which the drafter says how likely their path is.

    Args:
        hits (`list[float]`): Accepted ones, by halvings of the probability, fading.
        trials (`list[float]`): Verified ones.
        seen (`int`): The last round.
    """

    hits: list[float] = field(default_factory=lambda: [0.0] * CLAIMS)
    trials: list[float] = field(default_factory=lambda: [0.0] * CLAIMS)
    seen: int = 0

    def add(self, nodes: Sequence[tuple[float, bool]], now: int) -> None:
        """
        Args:
            nodes (sequence of `tuple[float, bool]`): Log2 of each path's probability; whether it was accepted.
            now (`int`): The round.
        """
        fade = 0.5 ** ((now - self.seen) / STEADY)
        self.hits = [hits * fade for hits in self.hits]
        self.trials = [trials * fade for trials in self.trials]
        for claim, accepted in nodes:
            place = int(min(max(-claim, 0), CLAIMS - 1))
            self.trials[place] += 1
            self.hits[place] += accepted
        self.seen = now

    def least(self, pays: float) -> float:
        """The path probability, by the drafter, from which nodes are accepted at least so often; 0 if all are."""
        for place in range(CLAIMS):
            claimed = 0.75 * 0.5**place
            chance = (self.hits[place] + 8 * claimed) / (self.trials[place] + 8)
            if chance < pays:
                return 0.5**place
        return 0.0
