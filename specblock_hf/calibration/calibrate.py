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
What a round costs on this machine, and how much drafting pays there. A verified node is almost free on a GPU, and a
dozen of them cost half a step on a CPU in float32, so no default is right for both.
"""

from __future__ import annotations

import statistics
import time
import warnings
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from ..compat import CACHE
from ..drafting.drafter import DraftingPlan, Limits, Pairs, TreeDrafter
from ..generation.loop import draft
from ..target.model import Scored, TargetModel
from ..trees.tree import DraftTree
from ..trees.verification import sample_and_walk
from .trial import try_plans


NODES = (1, 4, 8, 12, 16, 24, 32, 48, 64)
MOST_STARTS = 32  # what plans are charged that name no number
DEEPEST = 64  # no plan drafts deeper

NOISY = 0.2
"""Spread above which a measurement is made again."""

ATTEMPTS = 3
"""Most measurements of a machine that does not get quiet."""

TEXTS_DIFFER = 0.35
"""
Standard deviation of tau - 1 between texts, as a share of its mean. With SmolLM2-135M-Instruct and 48 prompts of three
suites it was 0.34 for the shipped drafter and 0.63 with look-ups (0.30 within HumanEval), 0.2 to 0.4 for others.
"""


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
    """

    verify: tuple[tuple[int, float], ...]
    draft: float
    later: tuple[tuple[int, float], ...]
    host: float
    plain: float
    setting: str
    batch_size: int = 1

    def round_seconds(self, plan: DraftingPlan) -> float:
        """Expected seconds of a round that drafts by `plan`: every forward has a cost of its own beside its rows."""
        draft = self.draft
        if plan.num_forwards > 1:
            later = interpolate(self.later or ((1, self.draft),), plan.max_starts or MOST_STARTS)
            draft += (plan.num_forwards - 1) * later
        return interpolate(self.verify, plan.tree_budget + 1) + draft + self.host

    def speedup(self, plan: DraftingPlan, tau: float) -> float:
        """
        Tokens per second by `plan` over those of plain `generate()` with the same batch. A batch takes as many rounds
        as its slowest text, which is behind the mean the more, the more texts there are.

        Args:
            plan ([`DraftingPlan`]): The plan.
            tau (`float`): Tokens that a round by it emits, on average over texts.
        """
        return slowest_tau(tau, self.batch_size) * self.plain / self.round_seconds(plan)

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
        return cls(**(values | pairs))


@dataclass(frozen=True)
class Calibration:
    """
    What [`calibrate`] found.

    Args:
        curves ([`CostCurves`]): The measured costs.
        plan ([`DraftingPlan`]): The fastest plan; budget 0 where none beats plain `generate()`.
        speedup (`float`): With that plan, expected or, after a trial, measured; 1 for budget 0.
        spread (`float`):
            How far medians of the measurements lie above their lower quartiles, which the costs are taken from, as a
            share. A few hundredths on a quiet machine.
        tried (`tuple[tuple[DraftingPlan, float], ...]`, *optional*, defaults to `()`):
            The plans of the trial and the speed-up that each had there.
    """

    curves: CostCurves
    plan: DraftingPlan
    speedup: float
    spread: float
    tried: tuple[tuple[DraftingPlan, float], ...] = ()


def interpolate(curve: Sequence[tuple[int, float]], at: float) -> float:
    """A curve's value between its points; beyond the last one along its last piece, before the first one flat."""
    places = [x for x, _ in curve]
    if len(curve) == 1 or at <= places[0]:
        return curve[0][1]
    right = min(bisect_left(places, at), len(curve) - 1)
    (x0, y0), (x1, y1) = curve[right - 1], curve[right]
    return y0 + (at - x0) * (y1 - y0) / (x1 - x0)


def slowest_tau(tau: float, batch_size: int) -> float:
    """
    The tau to expect of the slowest of so many texts whose mean is `tau`, if they differ as `TEXTS_DIFFER` says: the
    smallest of so many normal draws, by Blom's approximation.
    """
    behind = statistics.NormalDist().inv_cdf((batch_size - 0.375) / (batch_size + 0.25))
    return 1 + (tau - 1) * max(1 - TEXTS_DIFFER * behind, 0)


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


def calibrate(
    target: PreTrainedModel,
    drafter: TreeDrafter,
    *,
    context: int = 256,
    repeats: int = 5,
    apply: bool = True,
    batch_size: int = 1,
    prompts: Sequence[torch.LongTensor] | None = None,
) -> Calibration:
    """
    Measure what verifying n nodes and drafting cost on this machine, and choose the plan that pays. In a large batch
    the rows of plain decoding fill the machine already, so that less is worth drafting, in the end nothing; calibrate
    for the size of the batches that will come.

    What a plan accepts is an average over other texts. With `prompts` it is not relied on: the plans that are expected
    to be fastest, one for each number of forwards, answer them side by side with plain `generate()`, and none is taken
    if none is faster.

    Args:
        target ([`~transformers.PreTrainedModel`]): The target, where and as it will run.
        drafter ([`TreeDrafter`]): A drafter whose configuration knows its acceptance (`specblock train` writes it).
        context (`int`, *optional*, defaults to 256): Tokens in the cache while measuring.
        repeats (`int`, *optional*, defaults to 5):
            Measurements of every point, interleaved with each other and with steps of plain `generate()`; their lower
            quartile counts, because a busy machine adds time and never takes any. While they contradict each other
            (`NOISY`), as many are added, at most `ATTEMPTS` times in all; a warning says if they still do.
        apply (`bool`, *optional*, defaults to `True`): Let the drafter use the plan from now on.
        batch_size (`int`, *optional*, defaults to 1): Texts that are decoded together.
        prompts (sequence of `torch.LongTensor` of shape `[1, T]`, *optional*):
            Texts to try plans on, like those that will come, in batches of `batch_size`; what fills none is left out.

    Returns:
        [`Calibration`]: Keep it, or its `curves`, and pass the plan to another process as `drafter.drafting_plan`, or
        to calls with another batch size as their `generation_config.drafting_plan`.

    Raises:
        `ValueError`: The drafter is for another target, or the prompts fill no batch.
    """
    drafter.check_target(target)
    probe = _Probe(target, drafter, context, batch_size)
    with torch.no_grad():
        probe.measure(repeats)
    curves, acceptance = probe.curves(), drafter.acceptance()
    tried: tuple[tuple[DraftingPlan, float], ...] = ()
    plan, speedup = choose_plan(curves, acceptance)
    if prompts is not None:
        plans = shortlist(curves, acceptance)
        tried = tuple(zip(plans, try_plans(target, drafter, plans, prompts, batch_size), strict=True))
        plan, speedup = _fastest(tried)
    if apply:
        drafter.drafting_plan = plan
    return Calibration(curves, plan, speedup, probe.spread(), tried)


def _fastest(speeds: Iterable[tuple[DraftingPlan, float]]) -> tuple[DraftingPlan, float]:
    """The plan with the highest speed-up, and no drafts where that is none."""
    plan, speedup = max(speeds, key=lambda point: point[1])
    return (plan, speedup) if speedup > 1 else (DraftingPlan(0, 1), 1.0)


class _AfterEachStep(StoppingCriteria):
    """Calls something after each step of plain `generate()` and stops nothing."""

    def __init__(self, call: Callable[[], None]):
        self._call = call

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        self._call()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _Probe:
    """
    Rounds on a random text between the steps of plain `generate()` on the same text, so that a slow minute is slow for
    both. Rows of the batch keep a drafted node in turns, as real ones keep different numbers.
    """

    def __init__(self, target: PreTrainedModel, drafter: TreeDrafter, context: int, batch_size: int):
        self.target, self.drafter, self.context, self.batch_size = target, drafter, context, batch_size
        generator = torch.Generator().manual_seed(0)  # the global generator belongs to the user's sampling
        vocab_size = target.config.get_text_config().vocab_size
        self.ids = torch.randint(vocab_size, (batch_size, context), generator=generator).to(target.device)
        alike: dict[int, list[DraftingPlan]] = {0: []}
        for plan, _ in drafter.acceptance():
            alike.setdefault(0 if plan.num_forwards == 1 else plan.max_starts or MOST_STARTS, []).append(plan)
        # Plans alike in their starts (0: those of one forward) are measured as one, with most forwards of them and a
        # usual budget: the largest would charge the small ones too much for growing a tree.
        self.measured = {
            starts: (
                max((plan.num_forwards for plan in plans), default=1),
                statistics.median_low([plan.tree_budget for plan in plans] or NODES),
            )
            for starts, plans in sorted(alike.items())
        }
        self._seconds: dict[tuple[str, int], list[float]] = defaultdict(list)

    def measure(self, repeats: int) -> None:
        """Measure until the figures agree, and warn if they never do."""
        for _ in range(ATTEMPTS):
            self._measure_once((repeats + 1) * max(len(NODES), len(self.measured)))
            if self.spread() <= NOISY:
                return
        warnings.warn(
            f"the times that calibration measured differ by {self.spread():.0%} after {ATTEMPTS} attempts, as they do "
            "while something else uses the machine, so that another plan may be faster than the chosen one; calibrate "
            "again when it is quiet.",
            stacklevel=3,
        )

    def curves(self) -> CostCurves:
        draft = self._quiet("draft", 0)
        later = [
            (starts, max(self._quiet("draft", starts) - draft, 0.0) / (forwards - 1))
            for starts, (forwards, _) in self.measured.items()
            if starts
        ]
        return CostCurves(
            verify=_rising([(nodes, self._quiet("verify", nodes)) for nodes in NODES]),
            draft=draft,
            later=_rising(later),
            host=self._quiet("host", 0),
            plain=self._quiet("plain", 0),
            setting=f"{self.target.device.type}, {self.target.dtype}, batch {self.batch_size}, context {self.context}",
            batch_size=self.batch_size,
        )

    def spread(self) -> float:
        """As in [`Calibration`]: of the plain step or of all parts of rounds together, whichever is larger."""
        plain, rounds = ("plain", 0), [point for point in self._seconds if point[0] != "plain"]
        return max(self._spread([plain]), self._spread(rounds))

    def _spread(self, points: Sequence[tuple[str, int]]) -> float:
        medians = sum(statistics.median(self._seconds[point][1:]) for point in points)
        return medians / sum(self._quiet(*point) for point in points) - 1

    def _quiet(self, part: str, size: int) -> float:
        """The lower quartile of a point's measurements without the first one, which warms up."""
        seconds = sorted(self._seconds[part, size][1:])
        return seconds[len(seconds) // 4]

    def _measure_once(self, count: int) -> None:
        """Take steps of plain `generate()` and so many rounds, one between every two steps."""
        started: float | None = None

        def between() -> None:
            nonlocal started
            ended = self._now()
            if started is not None:  # the first call ends the prompt
                self._seconds["plain", 0].append(ended - started)
            next(rounds, None)
            started = self._now()

        settings = {"do_sample": False, "num_beams": 1, "eos_token_id": None, "max_time": None}
        with closing(self._rounds(count)) as rounds:
            self.target.generate(
                self.ids,
                attention_mask=torch.ones_like(self.ids),
                max_new_tokens=count + 1,
                stopping_criteria=StoppingCriteriaList([_AfterEachStep(between)]),
                **settings,
            )

    def _rounds(self, count: int) -> Generator[None, None, None]:
        """So many rounds, which note the seconds of their parts."""
        kwargs = {
            "attention_mask": None,
            "position_ids": torch.arange(self.context, device=self.target.device).expand_as(self.ids),
            CACHE: DynamicCache(config=self.target.config),
            "use_cache": True,
        }
        layers, drafts = self.drafter.feature_layers_for(self.target), tuple(self.measured.items())
        with TargetModel(self.target, layers, self.ids, kwargs, mask_length=self.context) as scorer:
            _, pairs = next(scorer.prefill())
            walk = sample_and_walk(
                DraftTree.root(self.ids[:, -1]), self._all(True), lambda row, node: 0, lambda row, token: False
            )
            pairs = scorer.close_prompt(pairs, walk)
            scorer.commit(walk)
            state = self.drafter.begin(scorer.table, self.batch_size, self.context + 2 * count + 1)
            for number in range(count):
                (starts, (forwards, budget)), nodes = drafts[number % len(drafts)], NODES[number % len(NODES)]
                limits = Limits(self._all(budget), self._all(DEEPEST), forwards, starts or None)
                self._timed("draft", starts, draft, self.drafter, state, pairs, limits)
                tree = self._tree(nodes)
                scored = self._timed("verify", nodes, scorer.score, tree)
                turn = number // len(NODES)
                pairs = self._timed("host", 0, self._finish_round, scorer, tree, scored, turn)
                yield

    def _all(self, value: Any) -> tuple[Any, ...]:
        """The same for every text."""
        return (value,) * self.batch_size

    def _finish_round(self, scorer: TargetModel, tree: DraftTree, scored: Scored, turn: int) -> Pairs:
        """Every other row keeps the tree's first node, in the next turn the others."""
        argmax, drafted = scored.logits.argmax(-1).tolist(), tree.tokens[:, -1].tolist()

        def select(row: int, node: int) -> int:
            return argmax[row][node] if node or (row + turn) % 2 == 0 else drafted[row]

        walk = sample_and_walk(tree, self._all(True), select, lambda row, token: False)
        pairs = Pairs.of(tree, scored.features, walk, scorer.base, scorer.table)
        scorer.commit(walk)
        return pairs

    def _timed(self, part: str, size: int, call: Callable[..., Any], *args: Any) -> Any:
        start = self._now()
        result = call(*args)
        self._seconds[part, size].append(self._now() - start)
        return result

    def _now(self) -> float:
        """The time when the device has done all that it was given."""
        if self.target.device.type == "cuda":
            torch.cuda.synchronize(self.target.device)
        return time.perf_counter()

    def _tree(self, nodes: int) -> DraftTree:
        """Stars of the given size: their cost is that of any trees with as many nodes."""
        device = self.target.device
        parents = torch.zeros(self.batch_size, nodes, dtype=torch.long, device=device)
        parents[:, 0] = -1
        origin = torch.zeros(*parents.shape, 2, dtype=torch.long, device=device)
        return DraftTree(parents + 2, parents, torch.zeros(parents.shape, device=device), origin, height=1)


def _rising(points: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """
    A curve without dips: noise only adds, so that less work costs no more than what more work was measured to cost.
    """
    curve, most = [], float("inf")
    for size, seconds in reversed(points):
        most = min(most, seconds)
        curve.append((size, most))
    return tuple(reversed(curve))


__all__ = ["Calibration", "CostCurves", "calibrate", "choose_plan", "shortlist"]
