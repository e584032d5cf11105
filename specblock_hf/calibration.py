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
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from .drafter import DraftingPlan, Limits, Pairs, TreeDrafter
from .target import Scored, TargetModel
from .tree import DraftTree
from .verification import sample_and_walk


NODES = (1, 4, 8, 12, 16, 24, 32, 48, 64)
STARTS = (1, 4, 8, 16, 32)
DEEPEST = 64  # no plan drafts deeper


@dataclass(frozen=True)
class CostCurves:
    """
    Measured seconds of the parts of a round, for all texts of a batch together.

    Args:
        verify (`tuple[tuple[int, float], ...]`): (nodes of each text's tree, the root counted; seconds).
        draft (`tuple[tuple[int, float], ...]`):
            (rows of the drafter's forwards in a round, of each text; seconds of `propose`).
        host (`float`): Seconds of everything between the two.
        plain (`float`): Seconds of one step of plain `generate()`, which adds a token to each text.
        setting (`str`): Device, dtype, batch size and context length of the measurement.
    """

    verify: tuple[tuple[int, float], ...]
    draft: tuple[tuple[int, float], ...]
    host: float
    plain: float
    setting: str

    def round_seconds(self, plan: DraftingPlan, tau: float) -> float:
        """
        Expected seconds of a round that drafts by `plan` and emits `tau` tokens; the pairs of the last round are
        rows.
        """
        later = (plan.num_forwards - 1) * (plan.max_starts or STARTS[-1])
        return interpolate(self.verify, plan.tree_budget + 1) + interpolate(self.draft, tau + later) + self.host

    def speedup(self, plan: DraftingPlan, tau: float) -> float:
        """Tokens per second by `plan` over those of plain `generate()` with the same batch."""
        return tau * self.plain / self.round_seconds(plan, tau)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CostCurves:
        pairs = {name: tuple((int(n), float(s)) for n, s in values[name]) for name in ("verify", "draft")}
        return cls(**(values | pairs))


@dataclass(frozen=True)
class Calibration:
    """
    What [`calibrate`] found.

    Args:
        curves ([`CostCurves`]): The measured costs.
        plan ([`DraftingPlan`]): The plan with the highest expected speed; budget 0 where none beats plain
        `generate()`.
        speedup (`float`): Expected with that plan; 1 for budget 0.
    """

    curves: CostCurves
    plan: DraftingPlan
    speedup: float


def interpolate(curve: Sequence[tuple[int, float]], at: float) -> float:
    """A curve's value between its points; beyond the last one along its last piece, before the first one flat."""
    places = [x for x, _ in curve]
    right = min(max(bisect_left(places, at), 1), len(curve) - 1)
    (x0, y0), (x1, y1) = curve[right - 1], curve[right]
    return y0 + (max(at, places[0]) - x0) * (y1 - y0) / (x1 - x0)


def choose_plan(curves: CostCurves, acceptance: Iterable[tuple[DraftingPlan, float]]) -> tuple[DraftingPlan, float]:
    """
    The plan that emits most tokens a second, and its expected speed-up over plain `generate()`.

    Args:
        curves ([`CostCurves`]): Of this machine.
        acceptance (iterable of ([`DraftingPlan`], `float`)): Plans and the tau that the drafter reaches with them.
    """
    plan, tau = max(acceptance, key=lambda point: curves.speedup(*point))
    speedup = curves.speedup(plan, tau)
    return (plan, speedup) if speedup > 1 else (DraftingPlan(0, 1), 1.0)


def calibrate(
    target: PreTrainedModel,
    drafter: TreeDrafter,
    *,
    context: int = 256,
    repeats: int = 5,
    apply: bool = True,
    batch_size: int = 1,
) -> Calibration:
    """
    Measure what verifying n nodes and drafting from r rows cost on this machine, and choose the plan that pays. In a
    large batch the rows of plain decoding fill the machine already, so that less is worth drafting, in the end
    nothing; calibrate for the size of the batches that will come.

    Args:
        target ([`~transformers.PreTrainedModel`]): The target, where and as it will run.
        drafter ([`TreeDrafter`]): A drafter whose configuration knows its acceptance (`specblock train` writes it).
        context (`int`, *optional*, defaults to 256): Tokens in the cache while measuring.
        repeats (`int`, *optional*, defaults to 5): Measurements of every point, interleaved; medians are kept.
        apply (`bool`, *optional*, defaults to `True`): Let the drafter use the plan from now on.
        batch_size (`int`, *optional*, defaults to 1): Texts that are decoded together.

    Returns:
        [`Calibration`]: Keep it, or its `curves`, and pass the plan to another process as `drafter.drafting_plan`, or
        to calls with another batch size as their `generation_config.drafting_plan`.

    Raises:
        `ValueError`: The drafter is for another target.
    """
    drafter.check_target(target)
    with torch.no_grad():
        curves = _Probe(target, drafter, context, batch_size).measure(repeats)
    plan, speedup = choose_plan(curves, drafter.acceptance())
    if apply:
        drafter.drafting_plan = plan
    return Calibration(curves, plan, speedup)


class _Probe:
    """
    Rounds on a random text in which nothing is accepted, so that every one starts from the same state but one
    token.
    """

    def __init__(self, target: PreTrainedModel, drafter: TreeDrafter, context: int, batch_size: int):
        self.target, self.drafter, self.context, self.batch_size = target, drafter, context, batch_size
        generator = torch.Generator().manual_seed(0)  # the global generator belongs to the user's sampling
        vocab_size = target.config.get_text_config().vocab_size
        self.ids = torch.randint(vocab_size, (batch_size, context), generator=generator).to(target.device)

    def measure(self, repeats: int) -> CostCurves:
        kwargs = {
            "attention_mask": None,
            "position_ids": torch.arange(self.context, device=self.target.device).expand_as(self.ids),
            "past_key_values": DynamicCache(config=self.target.config),
            "use_cache": True,
        }
        layers = self.drafter.feature_layers_for(self.target)
        verify: dict[int, list[float]] = {n: [] for n in NODES}
        draft: dict[int, list[float]] = {n: [] for n in STARTS}
        host: list[float] = []
        with TargetModel(self.target, layers, self.ids, kwargs, mask_length=self.context) as scorer:
            scored, pairs = next(scorer.prefill())
            walk = sample_and_walk(
                DraftTree.root(self.ids[:, -1]), self._all(True), lambda row, node: 0, lambda row, token: False
            )
            pairs = scorer.close_prompt(pairs, walk)
            scorer.commit(walk)
            rounds = (repeats + 1) * max(len(NODES), len(STARTS))
            state = self.drafter.begin(scorer.table, self.batch_size, self.context + rounds + 1)
            for number in range(rounds):
                starts, nodes = STARTS[number % len(STARTS)], NODES[number % len(NODES)]
                limits = Limits(self._all(DEEPEST), self._all(DEEPEST), 1 if starts == 1 else 2, starts)
                seconds, _ = self._timed(self.drafter.propose, state, pairs, limits)
                draft[starts].append(seconds)
                tree = self._tree(nodes)
                seconds, scored = self._timed(scorer.score, tree)
                verify[nodes].append(seconds)
                seconds, pairs = self._timed(self._finish_round, scorer, tree, scored)
                host.append(seconds)
        return CostCurves(
            verify=_medians(verify),
            draft=_medians(draft),
            host=statistics.median(host),
            plain=self._plain_step(repeats),
            setting=f"{self.target.device.type}, {self.target.dtype}, batch {self.batch_size}, context {self.context}",
        )

    def _all(self, value: Any) -> tuple[Any, ...]:
        """The same for every text."""
        return (value,) * self.batch_size

    def _finish_round(self, scorer: TargetModel, tree: DraftTree, scored: Scored) -> Pairs:
        argmax = scored.logits.argmax(-1).tolist()
        walk = sample_and_walk(tree, self._all(True), lambda row, node: argmax[row][node], lambda row, token: True)
        pairs = Pairs.of(tree, scored.features, walk, scorer.base, scorer.table)
        scorer.commit(walk)
        return pairs

    def _timed(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[float, Any]:
        self._synchronize()
        start = time.perf_counter()
        result = call(*args, **kwargs)
        self._synchronize()
        return time.perf_counter() - start, result

    def _synchronize(self) -> None:
        if self.target.device.type == "cuda":
            torch.cuda.synchronize(self.target.device)

    def _tree(self, nodes: int) -> DraftTree:
        """Stars of the given size: their cost is that of any trees with as many nodes."""
        device = self.target.device
        parents = torch.zeros(self.batch_size, nodes, dtype=torch.long, device=device)
        parents[:, 0] = -1
        origin = torch.zeros(*parents.shape, 2, dtype=torch.long, device=device)
        return DraftTree(parents + 2, parents, torch.zeros(parents.shape, device=device), origin, height=1)

    def _plain_step(self, repeats: int) -> float:
        """Seconds of a step of plain `generate()`: the difference between longer and shorter answers."""
        settings = {"do_sample": False, "num_beams": 1, "eos_token_id": None}
        mask = torch.ones_like(self.ids)

        def run(tokens: int) -> float:
            return self._timed(self.target.generate, self.ids, attention_mask=mask, max_new_tokens=tokens, **settings)[
                0
            ]

        run(2)
        return max(statistics.median(run(8) - run(2) for _ in range(max(2, repeats // 2))) / 6, 1e-6)


def _medians(times: dict[int, list[float]]) -> tuple[tuple[int, float], ...]:
    """
    Medians without each point's first measurement, made monotone: noise must not make a larger tree look
    cheaper.
    """
    points, floor = [], 0.0
    for size, seconds in times.items():
        floor = max(floor, statistics.median(seconds[1:]))
        points.append((size, floor))
    return tuple(points)


__all__ = ["Calibration", "CostCurves", "calibrate", "choose_plan"]
