# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
What was learned of one setting, and what to draft next by it: the tree that emits most tokens a second, or none.

Let a round cost s seconds and emit t tokens, and let r be the best rate that is known. Then every way to draft is
worth t - r s, and the best way is the one that is worth most; its own rate is the next r (Dinkelbach's method for a
ratio).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from statistics import NormalDist
from typing import Any

from .estimates import GUESSED, OLD, STEADY, WINDOW, Claims, Gains, Level, Times, VerifyTimes, band_of
from .offers import FOUND, LOOKUPS, Choice, Offer, Round, Way


FIRST_SHARE, SHARE = 5.0, 0.01
"""What may be spent on rounds that only teach: in plain steps, and as a share of the time."""

SETTLED_SHARE = 0.25
"""Of that share, where something pays already: the next best is less to find than whether anything pays at all."""

LONGEST = 8.0
"""Plain steps that a round counts for at most, in what was spent and in what may be: more is not of its making."""

PATIENCE = 6
"""Fewest rounds between two of those."""

TRUST = 30.0
"""
Accepted tokens that figures count for which were measured with the drafter, those of two or three texts; others count
for one.
"""

MOST_SELECTIVE = 0.2
"""Chance to be accepted from which a node is verified however dear it seems."""

SLOWER, LESSON_WEIGHT = 1 / 8, 8.0
"""
What a text has accepted fades so much slower in rounds that could not tell, and the next one that can stands for up to
so many: nothing is drafted again only because nobody looked.
"""

FIRST_NODES = 3
"""Of the first trees. Later ones have at most twice the rows of any before, the root counted."""

TEXTS_DIFFER = 0.2
"""
Standard deviation of tau - 1 between texts, as a share of its mean. With SmolLM2-135M-Instruct, the shipped drafter,
look-ups and 5 nodes it was 0.15 over 20 prompts of GSM8K, 0.28 of HumanEval and 0.34 of MT-Bench, and the slowest of
any four in a row had 0.84, 0.74 and 0.73 of their mean; rounds that only wait for it cost less than others.
"""


@cache
def share_of_slowest(batch_size: int) -> float:
    """
    Of the tokens that drafts add on average, what they add to the slowest of so many texts, which the others wait for,
    if they differ as `TEXTS_DIFFER` says: the smallest of so many normal draws, by Blom's approximation.
    """
    behind = NormalDist().inv_cdf((batch_size - 0.375) / (batch_size + 0.25))
    return max(1 - TEXTS_DIFFER * behind, 0)


Parts = tuple[tuple[float, float, float], ...]
"""For all that look-ups may promise: the share of rounds, tokens, seconds."""

UNTRIED = Gains()


@dataclass(frozen=True)
class Prospect:
    """
    One way with so many nodes, and what is to be expected of it.

    Args:
        nodes (`int`): 0 for a plain step.
        way (`Way`): How they are drafted.
        parts (`Parts`): Of rounds that draft this way.
        alone (`Parts`): Of rounds that leave the drafter's forwards out; empty where there are no look-ups.
    """

    nodes: int
    way: Way
    parts: Parts
    alone: Parts

    def totals(self, rate: float) -> tuple[float, float, float]:
        """
        Tokens and seconds of a round at the best rate, and how much look-ups must promise for it to do without the
        drafter.
        """
        enough = 0.0 if self.way == LOOKUPS else math.inf
        tokens = seconds = total = 0.0
        for found in reversed(range(len(self.parts))):
            share, here, took = self.parts[found]
            if found and self.alone and enough == (FOUND[found] if found < len(FOUND) else math.inf):
                _, other, other_took = self.alone[found]
                if other - rate * other_took > here - rate * took:
                    enough, here, took = FOUND[found - 1], other, other_took
            tokens, seconds, total = tokens + share * here, seconds + share * took, total + share
        return tokens / total, seconds / total, enough

    def worth(self, rate: float) -> float:
        """Tokens of a round beyond those that its seconds would bring at `rate` tokens a second."""
        tokens, seconds, _ = self.totals(rate)
        return tokens - rate * seconds

    def rate(self, rate: float) -> float:
        """Tokens a second, if look-ups alone are taken where they are worth more at `rate` tokens a second."""
        tokens, seconds, _ = self.totals(rate)
        return tokens / seconds


@dataclass
class Record:
    """
    What was learned of one setting. Everything in it is plain, so that it can be written down.

    Args:
        slope (`float`): As in [`Offer`].
        batch_size (`int`): Rows of a batch.
        now (`int`): Rounds so far.
        seconds (`float`): Of all of them, those that drafted counting `SETTLED_SHARE`.
        spent (`float`): Seconds by which rounds that only teach were slower than the best way.
        learned (`int`): The last such round.
        grown (`int`): Nodes of the largest tree so far.
        verify (`VerifyTimes`): What nodes cost.
        draft (`dict[str, Times]`): What drafting costs, by the way.
        gains (`dict[str, Gains]`): What is accepted, by the way and what look-ups promise.
        share (`list[float]`): Of rounds in which look-ups promise so much, by the text at hand.
        usual_share (`list[float]`): The same in the long run, which a text begins with.
        claims (`Claims`): What the drafter's probabilities are worth.
        hits (`float`): Accepted nodes of all ways that the drafter ran in, where they are its merit, fading.
        prior (`float`): How many were expected of their ways where texts are as easy as the prior says.
        rate (`float`): Tokens a second of the way that pays most.
        times (`list[float]`): How long look-ups alone, and drafter, have been in use: in rounds, others counting less.
        latest (`list[int]`): Their last rounds.
        levels (`list[Level]`): How the text at hand compares with the long run, for them.
        pace (`float`): How slow the machine is, by which all times here were divided.
    """

    slope: float = 0.06
    batch_size: int = 1
    now: int = 0
    seconds: float = 0.0
    spent: float = 0.0
    learned: int = -PATIENCE
    grown: int = FIRST_NODES // 2
    verify: VerifyTimes | None = None
    draft: dict[str, Times] = field(default_factory=dict)
    gains: dict[str, Gains] = field(default_factory=dict)
    share: list[float] = field(default_factory=lambda: [1.0, 0.0, 0.0, 0.0])
    usual_share: list[float] = field(default_factory=lambda: [1.0, 0.0, 0.0, 0.0])
    claims: Claims = field(default_factory=Claims)
    hits: float = 0.0
    prior: float = 0.0
    rate: float = 0.0
    times: list[float] = field(default_factory=lambda: [0.0, 0.0])
    latest: list[int] = field(default_factory=lambda: [0, 0])
    levels: list[Level] = field(default_factory=lambda: [Level(), Level()])
    pace: float = 1.0

    def __post_init__(self) -> None:
        self.verify = self.verify or VerifyTimes(self.slope)

    def forget_text(self) -> None:
        """Another text begins: of it the long run is known alone."""
        self.levels, self.share = [Level(), Level()], list(self.usual_share)
        self.latest = [self.now, self.now]

    def of_any_text(self) -> Record:
        """The same, but for what the text at hand says."""
        return replace(self, levels=[Level(), Level()], share=list(self.usual_share))

    def observe(self, offer: Offer, seen: Round) -> None:
        """Learn from a round."""
        self.now += 1
        columns = seen.nodes if seen.columns is None else seen.columns
        if seen.settled:
            self.pace = self.verify.of(columns).paced(self.pace, seen.rest)
        draft, rest = seen.draft / self.pace, seen.rest / self.pace
        if seen.settled:
            self.verify.add(columns, rest, self.now)
        plain = self.verify.sizes.get(1)
        took = min(draft + rest, LONGEST * plain.middle) if plain else 0.0
        self.seconds += took * (SETTLED_SHARE if seen.choice.nodes else 1.0)
        if seen.choice.learns and self.rate and seen.settled:
            tokens = 1 + share_of_slowest(self.batch_size) * (seen.emitted - 1)
            self.spent = max(self.spent + took - tokens / self.rate, 0.0)
            self.learned = self.now
        if not seen.choice.nodes:
            self.times = [time + SLOWER for time in self.times]
            return
        way = seen.choice.way if seen.drafted else LOOKUPS
        found = bisect_right(FOUND, seen.found) if offer.finds else 0
        drafts = _is_drafters(way, found)
        if seen.usual and seen.settled:
            self.draft.setdefault(way.name, Times()).add(draft, self.now)
        self.times = [time + (1 if kind == drafts else SLOWER) for kind, time in enumerate(self.times)]
        self.share = _towards(self.share, found, 32)
        self.usual_share = _towards(self.usual_share, found, min(32 + self.now, STEADY))
        self.grown = max(self.grown, seen.nodes - 1)
        if seen.rows:
            self._accept(offer, seen, way, found)

    def _accept(self, offer: Offer, seen: Round, way: Way, found: int) -> None:
        kind = _is_drafters(way, found)
        weight = min(max(self.now - self.latest[kind], 1), LESSON_WEIGHT) / len(seen.rows)
        self.latest[kind] = self.now
        prior, gains = offer.prior(way, found), self.gains.setdefault(f"{way.name} {found}", Gains())
        expected = gains.expected(prior, _trust(offer, found))[band_of(seen.choice.nodes)]
        scale = self._scale(offer, kind)
        ease = scale * self.levels[kind].at(self.times[kind])
        for row in seen.rows:
            order = sorted(range(len(row)), key=lambda node: -row[node][0])
            ranks = [rank for rank, node in enumerate(order) if row[node][1]]
            read = len(row) if seen.columns is None else seen.columns - 1
            gains.add(ranks, seen.choice.nodes, read, prior, ease, len(seen.rows))
            self.levels[kind].add(len(ranks), scale * expected, self.times[kind], weight)
            self.claims.add(row, self.now)
            if kind:
                fade = 0.5 ** (1 / (STEADY * len(seen.rows)))
                self.hits, self.prior = self.hits * fade + len(ranks), self.prior * fade + expected

    def decide(self, offer: Offer) -> tuple[Choice, Choice | None]:
        """
        The way to draft that pays most by what is known, and what to do once instead, to know more.

        Args:
            offer (`Offer`): What the drafter can do.
        """
        plain = self.verify.sizes.get(1)
        # One that is measured again after a long time begins its samples anew, which is no reason to stop drafting.
        if plain is None or (len(plain.samples) < 2 and not self.rate):
            return Choice(0), Choice(0, why="a plain step is measured first")
        prospects = self._prospects(offer)
        rate = self.rate or 1 / self.verify.plain
        for _ in range(3):
            before, best = rate, max(prospects, key=lambda prospect: prospect.worth(rate))
            rate = best.rate(rate)
            if abs(rate - before) < 0.01 * before:  # the best at a rate is the best at one so near
                break
        self.rate = rate
        choice = self._choice(offer, best)
        return choice, self._lesson(offer, prospects, choice)

    def _prospects(self, offer: Offer) -> list[Prospect]:
        """Every way with every number of nodes, a plain step first."""
        plain = self.verify.plain
        prospects = [Prospect(0, LOOKUPS, ((1.0, 1.0, plain),), ((1.0, 1.0, plain),))]
        sizes = offer.allowed(self.grown)
        shares = self.share if offer.finds else [1.0]
        alone = self._parts(offer, LOOKUPS, shares, sizes) if offer.finds else None
        if alone:
            prospects += [Prospect(nodes, LOOKUPS, part, part) for nodes, part in zip(sizes, alone, strict=True)]
        for way in offer.ways:
            parts = self._parts(offer, way, shares, sizes)
            prospects += [
                Prospect(nodes, way, part, other)
                for nodes, part, other in zip(sizes, parts, alone or [()] * len(sizes), strict=True)
            ]
        return prospects

    def _parts(self, offer: Offer, way: Way, shares: Sequence[float], sizes: Sequence[int]) -> list[Parts]:
        """For each number of nodes, and for all that look-ups may promise: its share, tokens and seconds."""
        columns, draft, slowest = [], self.draft_seconds(way), share_of_slowest(self.batch_size)
        for found, share in enumerate(shares):
            kind = _is_drafters(way, found)
            ease = self._scale(offer, kind) * self.levels[kind].at(self.times[kind])
            gains = self.gains.get(f"{way.name} {found}", UNTRIED)
            added = gains.expected(offer.prior(way, found), _trust(offer, found))
            fill = gains.fill if gains.rounds or way.forwards or found else 0.0
            seconds = self.verify.at([1 + fill * nodes for nodes in sizes])
            tokens = [1 + slowest * ease * added[band_of(nodes)] for nodes in sizes]
            columns.append([(share, here, draft + rest) for here, rest in zip(tokens, seconds, strict=True)])
        return list(zip(*columns, strict=True))

    def _scale(self, offer: Offer, drafts: bool) -> float:
        """How easy texts are in the long run for what the drafter drafts, one way or another."""
        doubt = TRUST if offer.trusted else 1.0
        return (self.hits + doubt) / (self.prior + doubt) if drafts else 1.0

    def _choice(self, offer: Offer, best: Prospect) -> Choice:
        plain = _ms(self.pace * self.verify.plain)
        if not best.nodes:
            return Choice(0, why=f"nothing pays: a plain step takes {plain}")
        tokens, seconds, enough = best.totals(self.rate)
        why = f"{tokens:.2f} tokens in {_ms(self.pace * seconds)}, a plain step takes {plain}"
        return Choice(best.nodes, best.way, self._least(offer, best.nodes), enough, why)

    def draft_seconds(self, way: Way) -> float:
        """What drafting costs this way, or a guess from another way or from a plain step."""
        known = self.draft.get(way.name)
        if known and len(known.samples) > 1:
            return known.middle
        once = self.draft.get("1/0")
        guess = way.forwards * (once.middle if once and len(once.samples) > 1 else 0.25 * self.verify.plain)
        return min(guess, known.middle) if known else guess

    def _least(self, offer: Offer, nodes: int) -> float:
        """The probability from which a node pays for what it adds to the target's forward."""
        if not offer.cuts:
            return 0.0
        none, less, more = self.verify.at([1, 1 + nodes / 2, 1 + nodes])
        each = min((more - less) / (nodes / 2), (more - none) / nodes)
        return self.claims.least(min(self.rate * each, MOST_SELECTIVE))

    def _lesson(self, offer: Offer, prospects: Sequence[Prospect], best: Choice) -> Choice | None:
        """
        Something that is not known well enough, if there is time for it: what costs least for how long ago it was.
        """
        plain, rate = self.verify.plain, self.rate
        allowed = FIRST_SHARE * plain + SHARE * self.seconds - self.spent
        if not rate or allowed <= 0 or self.now - self.learned < PATIENCE:
            return None
        if best.nodes and self.verify.of(1).age(self.now) >= OLD:
            return Choice(0, why="a plain step is measured again", learns=True)
        lessons, sizes = [], offer.allowed(max(best.nodes, FIRST_NODES))
        for prospect in prospects[1:]:
            loss, age = -prospect.worth(rate) / rate, self._age(prospect, best)
            if age and loss <= allowed and prospect.nodes in sizes:
                lessons.append((max(loss, plain / 5) / age, loss, prospect))
        if not lessons:
            return None
        prospect = min(lessons, key=lambda lesson: lesson[:2])[2]
        choice = Choice(prospect.nodes, prospect.way, 0.0, prospect.totals(rate)[2], learns=True)
        return replace(choice, why=f"seeing whether {choice} pay")

    def _age(self, prospect: Prospect, best: Choice) -> int:
        """
        Rounds for which nothing was heard of a way or size, 0 if it is known well enough. Where its like does not pay,
        one may always look again.
        """
        of_way = self.draft.get(prospect.way.name, Times()).age(self.now)
        # What look-ups find has a size of its own.
        age = max(of_way, self.verify.of(prospect.nodes + 1).age(self.now) * bool(prospect.way.forwards))
        resting = not best.nodes or (best.way == LOOKUPS and prospect.way != LOOKUPS)
        return max(age * (age >= OLD), (of_way + 1) * resting)

    def take(self, verify: Sequence[tuple[int, float]], draft: Sequence[tuple[Way, float]]) -> None:
        """Measured seconds, each of which counts as much as all that is ever kept."""
        self.pace = 1.0
        self.verify = VerifyTimes(self.slope)
        for nodes, seconds in verify:
            for _ in range(WINDOW):
                self.verify.add(nodes, seconds, self.now)
        self.draft |= {way.name: Times([seconds] * WINDOW, self.now) for way, seconds in draft}
        self.grown = max(self.grown, max(nodes for nodes, _ in verify) - 1)

    def sureness(self) -> str:
        """How much the estimates rest on."""
        plain, drafted = self.verify.sizes.get(1), sum(gains.rounds for gains in self.gains.values())
        if plain is None:
            return "nothing was measured yet"
        return f"{self.now} rounds, {drafted} drafted rows, plain steps spread by {plain.spread:.0%}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Record:
        """From what [`~Record.to_dict`] gave, read as JSON or not."""
        verify = values["verify"]
        sizes = {int(size): Times(**times) for size, times in verify["sizes"].items()}
        parts = {
            "verify": VerifyTimes(verify["slope"], sizes),
            "draft": {name: Times(**times) for name, times in values["draft"].items()},
            "gains": {name: Gains(**gains) for name, gains in values["gains"].items()},
            "claims": Claims(**values["claims"]),
            "levels": [Level(**level) for level in values["levels"]],
        }
        # Files of before texts began with the long run have one share, of both.
        return cls(**({"usual_share": list(values["share"])} | values | parts))


def _trust(offer: Offer, found: int) -> float:
    """In a prior: what look-ups find is guessed for any drafter."""
    return 1.0 if offer.trusted and not found else GUESSED


def _is_drafters(way: Way, found: int) -> bool:
    """Whether what is accepted is the drafter's merit: in joined trees it is the look-ups' where they promise most."""
    return way.forwards > 0 and found < len(FOUND)


def _towards(shares: Sequence[float], found: int, rounds: int) -> list[float]:
    """Shares after one more round, of which so many are remembered."""
    return [share + ((place == found) - share) / rounds for place, share in enumerate(shares)]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"
