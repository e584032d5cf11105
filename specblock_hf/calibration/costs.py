# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What forwards cost on this machine, and the plan that pays by these costs."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..drafting.plan import DraftingPlan
from ..planning.offers import Way
from ..planning.record import share_of_slowest


NODES = (1, 4, 8, 12, 16, 24, 32, 48, 64)


MOST_STARTS = 32  # what plans are charged that name no number


DEEPEST = 64  # no plan drafts deeper


@dataclass(frozen=True)
class CostCurves:
    """
    Measured seconds of the parts of a round, for all texts of a batch together.

    Args:
        verify (`tuple[tuple[int, float], ...]`): (nodes of each text's tree, the root counted; seconds).
        draft (`float`): Seconds of `propose` with one forward of the drafter.
        later (`tuple[tuple[int, float], ...]`):
            (starts of each text; seconds that a further forward from so many adds, on average over those of the
            measured plan with most forwards). If none was measured, it is taken to cost what the first one does.
        host (`float`): Seconds of everything between the two.
        plain (`float`): Seconds of one step of plain `generate()`, which adds a token to each text.
        setting (`str`): Device, dtype, batch size and context length of the measurement.
        batch_size (`int`, *optional*, defaults to 1): Texts in the batch.
        chains (`tuple[tuple[int, int], ...]`, *optional*, defaults to `()`):
            (forwards of the drafter; most tokens of a path that so many draft), where only a tree's likeliest path is
            verified.
        rereads (`bool`, *optional*, defaults to `False`):
            The target has recurrent states and reads again what was committed behind them; see [`Lag`].
    """

    verify: tuple[tuple[int, float], ...]
    draft: float
    later: tuple[tuple[int, float], ...]
    host: float
    plain: float
    setting: str
    batch_size: int = 1
    chains: tuple[tuple[int, int], ...] = ()
    rereads: bool = False

    def verified(self, plan: DraftingPlan) -> int:
        """Most drafted tokens of a row that the target scores in a round."""
        return min(plan.tree_budget, dict(self.chains).get(plan.num_forwards, plan.tree_budget))

    def round_seconds(self, plan: DraftingPlan) -> float:
        """
        Expected seconds of a round that drafts by `plan` and reads nothing again: every forward has a cost of its own
        beside its rows.
        """
        draft = self._draft_seconds(plan.num_forwards, plan.max_starts)
        return interpolate(self.verify, self.verified(plan) + 1) + draft + self.host

    def expected(self, plan: DraftingPlan, tau: float) -> tuple[float, float]:
        """Tokens and seconds of a round on average, over those between two that are kept as a whole."""
        nodes = self.verified(plan)
        if not self.rereads or not nodes:
            return tau, self.round_seconds(plan)
        draft = self._draft_seconds(plan.num_forwards, plan.max_starts)
        whole = share_of_whole_chains(nodes, tau)
        *rounds, (share, last) = rereading(nodes, tau, whole, plan.tree_budget)
        tokens, total = share, sum(weight for weight, _ in rounds) + share
        seconds = share * (self.host + interpolate(self.verify, last))
        for weight, columns in rounds:
            tokens += weight * tau
            seconds += weight * (draft + self.host + interpolate(self.verify, columns))
        return tokens / total, seconds / total

    def speedup(self, plan: DraftingPlan, tau: float) -> float:
        """
        Tokens per second by `plan` over those of plain `generate()` with the same batch. A batch takes as many rounds
        as its slowest text, which is behind the mean the more, the more texts there are.

        Args:
            plan ([`DraftingPlan`]): The plan.
            tau (`float`): Tokens that a round by it emits, on average over texts.
        """
        tokens, seconds = self.expected(plan, slowest_tau(tau, self.batch_size))
        return tokens * self.plain / seconds

    def for_controller(self, ways: Iterable[Way]) -> tuple[list[tuple[int, float]], list[tuple[Way, float]]]:
        """Seconds of everything but drafting by nodes, a plain step's for a root; and of drafting these ways."""
        # With prepacked weights a round without drafts is sooner than a step of plain `generate()`.
        plain = min(self.plain, interpolate(self.verify, 1) + self.host)
        rest = [(1, plain), *((nodes, seconds + self.host) for nodes, seconds in self.verify if nodes > 1)]
        return rest, [(way, self._draft_seconds(way.forwards, way.starts)) for way in ways]

    def _draft_seconds(self, forwards: int, starts: int | None) -> float:
        later = interpolate(self.later or ((1, self.draft),), starts or MOST_STARTS)
        return self.draft + (forwards - 1) * later

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CostCurves:
        """
        From what [`~CostCurves.to_dict`] gave. Files of earlier versions have one curve for drafting, whose first
        point is a round of one forward and whose others are rounds of two, and no batch size, which is taken to be 1.
        """
        if "later" not in values:
            (_, first), *others = values["draft"]
            values = values | {"draft": first, "later": [(starts, s - first) for starts, s in others]}
        pairs = {name: tuple((int(n), float(s)) for n, s in values[name]) for name in ("verify", "later")}
        chains = {"chains": tuple((int(forwards), int(tokens)) for forwards, tokens in values.get("chains", ()))}
        return cls(**(values | pairs | chains))


def interpolate(curve: Sequence[tuple[int, float]], at: float) -> float:
    """A curve's value between its points; beyond the last one along its last piece, before the first one flat."""
    places = [x for x, _ in curve]
    if len(curve) == 1 or at <= places[0]:
        return curve[0][1]
    right = min(bisect_left(places, at), len(curve) - 1)
    (x0, y0), (x1, y1) = curve[right - 1], curve[right]
    return y0 + (at - x0) * (y1 - y0) / (x1 - x0)


def share_of_whole_chains(nodes: int, tau: float) -> float:
    """
    How often a chain is accepted to its end, if each of its tokens is as likely as the others to be right.

    Args:
        nodes (`int`): Drafted tokens.
        tau (`float`): Tokens that a round emits on average, the target's own one included.
    """
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        fewer = sum(middle**depth for depth in range(1, nodes + 1)) < tau - 1
        low, high = (middle, high) if fewer else (low, middle)
    return high**nodes


def rereading(nodes: int, tau: float, whole: float, budget: int) -> list[tuple[float, float]]:
    """
    The rounds from one after which recurrent states lie at the last committed token to the next such round, as
    [`Lag`] has them.

    Args:
        nodes (`int`): Drafted tokens of a chain.
        tau (`float`): Tokens that a round emits on average.
        whole (`float`): How often a chain is accepted to its end, after which nothing is to be read again.
        budget (`int`): Tokens read again from which a round does without drafts.

    Returns:
        `list[tuple[float, float]]`: How likely it is to come to each round, and how many tokens that reads; the last
        one is the one without drafts.
    """
    others = (tau - whole * (nodes + 1)) / (1 - whole) if whole < 1 else 0.0  # of a chain that is not
    share, behind, again, rounds = 1.0, 0.0, 0.0, []
    while again + behind <= budget and share > 1e-6:
        rounds.append((share, behind + nodes + 1))
        share *= 1 - whole
        again, behind = again + behind, behind + others
    return [*rounds, (share, behind + 1)]


def slowest_tau(tau: float, batch_size: int) -> float:
    """
    The tau to expect of the slowest of so many texts whose mean is `tau`; see [`share_of_slowest`].
    """
    return 1 + (tau - 1) * share_of_slowest(batch_size)


def choose_plan(curves: CostCurves, acceptance: Iterable[tuple[DraftingPlan, float]]) -> tuple[DraftingPlan, float]:
    """
    The plan that emits most tokens a second, and its expected speed-up over plain `generate()`.

    Args:
        curves ([`CostCurves`]): Of this machine.
        acceptance (iterable of ([`DraftingPlan`], `float`)): Plans and the tau that the drafter reaches with them.
    """
    return _fastest((plan, curves.speedup(plan, tau)) for plan, tau in acceptance)


def shortlist(curves: CostCurves, acceptance: Iterable[tuple[DraftingPlan, float]]) -> list[DraftingPlan]:
    """
    The plan with the highest expected speed for every number of forwards, where drafters differ most and the expected
    costs are least certain. The arguments are those of [`choose_plan`].
    """
    best: dict[int, tuple[float, DraftingPlan]] = {}
    for plan, tau in acceptance:
        speed = curves.speedup(plan, tau)
        if plan.num_forwards not in best or speed > best[plan.num_forwards][0]:
            best[plan.num_forwards] = (speed, plan)
    return [plan for _, (_, plan) in sorted(best.items())]


def _fastest(speeds: Iterable[tuple[DraftingPlan, float]]) -> tuple[DraftingPlan, float]:
    """The plan with the highest speed-up, and no drafts where that is none."""
    plan, speedup = max(speeds, key=lambda point: point[1])
    return (plan, speedup) if speedup > 1 else (DraftingPlan(0, 1), 1.0)
