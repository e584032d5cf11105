# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
What a round costs on this machine, and how much drafting pays there. A verified node is almost free on a GPU, and a
dozen of them cost half a step on a CPU in float32, so no default is right for both.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel, StaticCache, StoppingCriteria, StoppingCriteriaList

from ..compat import CACHE
from ..devices import synchronize
from ..drafting.attachment import set_aside
from ..drafting.drafter import TreeDrafter
from ..drafting.pairs import Pairs, Scored, TokenTable
from ..drafting.pilot import offer_of, setting_of
from ..drafting.plan import DraftingPlan, Limits
from ..generation.compilation import lend_afresh
from ..generation.rounds.drafts import EagerDrafts
from ..generation.rounds.lending import Lent, Request
from ..target.model import TargetModel
from ..trees.tree import DraftTree
from ..trees.verification import sample_and_walk
from .costs import DEEPEST, MOST_STARTS, NODES, CostCurves, _fastest, choose_plan, shortlist
from .trial import try_plans


NOISY = 0.2
"""Spread above which a measurement is made again."""

ATTEMPTS = 3
"""Most measurements of a machine that does not get quiet."""


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


def calibrate(
    target: PreTrainedModel,
    drafter: TreeDrafter,
    *,
    context: int = 256,
    repeats: int = 5,
    apply: bool = True,
    batch_size: int = 1,
    prompts: Sequence[torch.LongTensor] | None = None,
    cache_implementation: str | None = None,
    progress: bool = False,
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
        apply (`bool`, *optional*, defaults to `True`):
            Let the drafter use the plan from now on, unless its `drafting_plan` is `"auto"`: then its controller takes
            the measured costs over and finds its plans by them and by what rounds accept.
        batch_size (`int`, *optional*, defaults to 1): Texts that are decoded together.
        prompts (sequence of `torch.LongTensor` of shape `[1, T]`, *optional*):
            Texts to try plans on, like those that will come, in batches of `batch_size`; what fills none is left out.
        cache_implementation (`str`, *optional*):
            What calls will pass as such, which decides whether they run captured rounds: those are measured then.
            Defaults to what the target's `generation_config` says.
        progress (`bool`, *optional*, defaults to `False`): Show bars on the standard error stream.

    Returns:
        [`Calibration`]: Keep it, or its `curves`, and pass the plan to another process as `drafter.drafting_plan`, or
        to calls with another batch size as their `generation_config.drafting_plan`.

    Raises:
        `ValueError`: The drafter is for another target, or the prompts fill no batch.
    """
    drafter.check_target(target)
    cache_implementation = cache_implementation or target.generation_config.cache_implementation
    probe = _Probe(target, drafter, context, batch_size, cache_implementation)
    with torch.no_grad(), set_aside(target):
        probe.measure(repeats, progress)
    curves, acceptance = probe.curves(), drafter.acceptance()
    tried: tuple[tuple[DraftingPlan, float], ...] = ()
    plan, speedup = choose_plan(curves, acceptance)
    if prompts is not None:
        plans = shortlist(curves, acceptance)
        speedups = try_plans(target, drafter, plans, prompts, batch_size, progress, cache_implementation)
        tried = tuple(zip(plans, speedups, strict=True))
        plan, speedup = _fastest(tried)
    if apply:
        _fill(target, drafter, curves, batch_size, probe.fixed)
        if drafter.drafting_plan != "auto":
            drafter.drafting_plan = plan
    return Calibration(curves, plan, speedup, probe.spread(), tried)


def _fill(
    target: PreTrainedModel, drafter: TreeDrafter, curves: CostCurves, batch_size: int, fixed: tuple[bool, bool]
) -> None:
    """
    Tell the drafter's controller what calls will cost; sampled and greedy ones cost the same, those with rounds of
    fixed shapes are another setting.
    """
    device = TokenTable.of(target).device
    offer = offer_of(drafter, device)
    for sampled in (False, True):
        setting = setting_of(target, device, batch_size, sampled, *fixed)
        drafter.controller.fill(setting, offer, *curves.for_controller(offer.ways))


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

    def __init__(
        self,
        target: PreTrainedModel,
        drafter: TreeDrafter,
        context: int,
        batch_size: int,
        cache_implementation: str | None = None,
    ):
        self.target, self.drafter, self.context, self.batch_size = target, drafter, context, batch_size
        self.cache_implementation = cache_implementation
        self.fixed = (False, False)  # verification and drafts of fixed shapes
        generator = torch.Generator().manual_seed(0)  # the global generator belongs to the user's sampling
        vocab_size = target.config.get_text_config().vocab_size
        self.device = TokenTable.of(target).device
        self.ids = torch.randint(vocab_size, (batch_size, context), generator=generator, device="cpu").to(self.device)
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
        self._chains: tuple[tuple[int, int], ...] = ()
        self._rereads = False

    def measure(self, repeats: int, progress: bool = False) -> None:
        """Measure until the figures agree, and warn if they never do."""
        count = (repeats + 1) * max(len(NODES), len(self.measured))
        for number in range(ATTEMPTS):
            what = f"measuring rounds of {self.drafter.label}{' again, as times differ' if number else ''}"
            with tqdm(total=count, desc=what, unit="round", disable=not progress) as bar:
                self._measure_once(count, bar)
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
            setting=f"{self.device.type}, {self.target.dtype}, batch {self.batch_size}, context {self.context}",
            batch_size=self.batch_size,
            chains=self._chains,
            rereads=self._rereads,
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

    def _measure_once(self, count: int, bar: tqdm) -> None:
        """Take steps of plain `generate()` and so many rounds, one between every two steps."""
        started: float | None = None

        def between() -> None:
            nonlocal started
            ended = self._now()
            if started is not None:  # the first call ends the prompt
                self._seconds["plain", 0].append(ended - started)
            if next(rounds, None):
                bar.update()
            started = self._now()

        settings: dict[str, Any] = {"do_sample": False, "num_beams": 1, "eos_token_id": None, "max_time": None}
        settings["cache_implementation"] = self.cache_implementation
        with closing(self._rounds(count)) as rounds:
            self.target.generate(
                self.ids,
                attention_mask=torch.ones_like(self.ids),
                max_new_tokens=count + 1,
                stopping_criteria=StoppingCriteriaList([_AfterEachStep(between)]),
                **settings,
            )

    def _rounds(self, count: int) -> Generator[int, None, None]:
        """So many rounds, counted from one, which note the seconds of their parts."""
        kwargs = {
            "attention_mask": None,
            "position_ids": torch.arange(self.context, device=self.device).expand_as(self.ids),
            CACHE: DynamicCache(config=self.target.config),
            "use_cache": True,
        }
        lent = self._lent(self.context + 2 * count + 1)
        measured = tuple(self.measured.items())
        scorers = next(iter(lent.values())).target_model
        inputs = (self.ids, kwargs, self.context, None, False, DEEPEST)
        with scorers(self.target, self.drafter, *inputs) as scorer:
            _, pairs = next(scorer.prefill())
            walk = sample_and_walk(
                DraftTree.root(self.ids[:, -1]), self._all(True), lambda row, node: 0, lambda row, token: False
            )
            pairs = scorer.close_prompt(pairs, walk)
            scorer.commit(walk)
            self._rereads = scorer.rereads
            if scorer.chains_only:
                counts = sorted({plan.num_forwards for plan, _ in self.drafter.acceptance()})
                self._chains = tuple((count, self.drafter.deepest(DraftingPlan(DEEPEST, count))) for count in counts)
            state = self.drafter.begin(scorer.table, self.batch_size, self.context + 2 * count + 1)
            eager = EagerDrafts(self.drafter, state)
            drafts = {starts: own.drafts.begin(keeps=True) if own.drafts else eager for starts, own in lent.items()}
            for number in range(count):
                (starts, (forwards, budget)), nodes = measured[number % len(measured)], NODES[number % len(NODES)]
                limits = Limits(self._all(budget), self._all(DEEPEST), forwards, starts or None)
                self._timed("draft", starts, drafts[starts].propose, pairs, limits)
                scorer.catch_up()  # so that as many tokens are read as are counted
                tree = self._tree(nodes, scorer.chains_only).first(scorer.room() or nodes)
                scored = self._timed("verify", nodes, scorer.score, tree)
                turn = number // len(NODES)
                pairs = self._timed("host", 0, self._finish_round, scorer, tree, scored, turn)
                yield number + 1

    def _lent(self, length: int) -> dict[int, Lent]:
        """For all that is measured what calls would run on, if anything; the target is the same for all of it."""
        lent: dict[int, Lent] = {}
        cache = None
        if self.cache_implementation == "static":
            cache = StaticCache(config=self.target.config, max_cache_len=length)  # takes no memory before its use
        for starts, (forwards, budget) in self.measured.items():
            plan = DraftingPlan(budget, forwards, starts or None)
            hindrance = "it was lent already" if lent else None
            request = Request(self.target, self.drafter, plan, self.batch_size, length, cache, hindrance=hindrance)
            lent[starts] = lend_afresh(request)
        # The target is lent to the first of them.
        self.fixed = any(own.target for own in lent.values()), any(own.drafts for own in lent.values())
        return lent

    def _all(self, value: Any) -> tuple[Any, ...]:
        """The same for every text."""
        return (value,) * self.batch_size

    def _finish_round(self, scorer: TargetModel, tree: DraftTree, scored: Scored, turn: int) -> Pairs:
        """Every other row keeps the tree's first node, in the next turn the others."""
        argmax, drafted = scored.logits.float().argmax(-1).tolist(), tree.tokens[:, -1].tolist()

        def select(row: int, node: int) -> int:
            return argmax[row][node] if node or (row + turn) % 2 == 0 else drafted[row]

        walk = sample_and_walk(tree, self._all(True), select, lambda row, token: False)
        return scorer.settle(tree, scored, walk)

    def _timed(self, part: str, size: int, call: Callable[..., Any], *args: Any) -> Any:
        start = self._now()
        result = call(*args)
        self._seconds[part, size].append(self._now() - start)
        return result

    def _now(self) -> float:
        """The time when the device has done all that it was given."""
        synchronize(self.device)
        return time.perf_counter()

    def _tree(self, nodes: int, chains: bool) -> DraftTree:
        """Stars of the given size, whose cost is that of any trees with as many nodes, or chains."""
        places = torch.arange(nodes, device=self.device).expand(self.batch_size, -1)
        parents = places - 1 if chains else places.clamp_max(1) - 1
        origin = torch.zeros(*parents.shape, 2, dtype=torch.long, device=self.device)
        tokens, log_probs = places.clamp_max(1) + 1, torch.zeros(parents.shape, device=self.device)
        return DraftTree(tokens, parents, log_probs, origin, height=nodes - 1 if chains else 1)


def _rising(points: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """
    A curve without dips: noise only adds, so that less work costs no more than what more work was measured to cost.
    """
    curve, most = [], float("inf")
    for size, seconds in reversed(points):
        most = min(most, seconds)
        curve.append((size, most))
    return tuple(reversed(curve))
