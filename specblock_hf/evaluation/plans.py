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
The plan that each drafter is compared with: the best one for it alone. A cost model shortlists one plan for every
number of drafter forwards, where drafters differ most and the model knows least, and trial answers decide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..calibration import CostCurves, calibrate
from ..drafter import DraftingPlan, TreeDrafter
from .benchmark import answer, decoding_settings
from .methods import PLAIN, Method


LOOKUP_PLAN = DraftingPlan(8, 1)
"""For look-ups alone, whose acceptance depends on the text so much that no figures are kept to choose by."""

TRIAL_TOKENS = 32


def choose_plans(
    methods: Sequence[Method],
    target: PreTrainedModel,
    given: Mapping[str, DraftingPlan],
    trials: Sequence[torch.LongTensor],
) -> dict[str, dict[str, Any]]:
    """
    Give every tree drafter its plan: the one that is given, or the one that answers the trial prompts fastest.

    Args:
        methods (sequence of [`Method`]): Their drafters are changed.
        target ([`~transformers.PreTrainedModel`]): Where and as it will run.
        given (mapping of `str` to [`DraftingPlan`]): Plans by the method's name.
        trials (sequence of `torch.LongTensor` of shape `[1, T]`): Prompts that are not among those to be measured.

    Returns:
        `dict[str, dict]`: For each method with a drafter its `plan` (nodes, forwards, starts) and where it is from,
        ready for JSON.

    Raises:
        ValueError: A plan is given to a method that is not there or has no drafter.
    """
    drafting = {method.name: method for method in methods if method.drafter is not None}
    strangers = sorted(given.keys() - drafting.keys())
    if strangers:
        raise ValueError(
            f"a plan is given to {strangers[0]!r}, which is none of the methods with a tree drafter "
            f"({', '.join(drafting) or 'there are none'}); give it to one of them."
        )
    notes: dict[str, dict[str, Any]] = {}
    for name, method in drafting.items():
        if name in given:
            method.drafter.drafting_plan, notes[name] = given[name], {"from": "given"}
        elif name == "lookup":
            method.drafter.drafting_plan, notes[name] = LOOKUP_PLAN, {"from": "default"}
        else:
            notes[name] = _calibrated(target, method, trials)
        notes[name]["plan"] = _listed(method.drafter.drafting_plan)
    return notes


def apply_plans(methods: Sequence[Method], notes: Mapping[str, Mapping[str, Any]]) -> None:
    """Give the drafters the plans that [`choose_plans`] noted in an earlier run."""
    for method in methods:
        if method.drafter is not None:
            method.drafter.drafting_plan = DraftingPlan(*notes[method.name]["plan"])


def shortlist(drafter: TreeDrafter, curves: CostCurves) -> list[DraftingPlan]:
    """The plan with the highest expected speed for every number of forwards that the drafter knows the tau of."""
    best: dict[int, tuple[float, DraftingPlan]] = {}
    for plan, tau in drafter.acceptance():
        speed = curves.speedup(plan, tau)
        if plan.num_forwards not in best or speed > best[plan.num_forwards][0]:
            best[plan.num_forwards] = (speed, plan)
    return [plan for _, (_, plan) in sorted(best.items())]


def _calibrated(target: PreTrainedModel, method: Method, trials: Sequence[torch.LongTensor]) -> dict[str, Any]:
    drafter = method.drafter
    curves = calibrate(target, drafter, apply=False).curves
    plans = shortlist(drafter, curves)
    speeds = try_plans(target, method, plans, trials)
    fastest = max(range(len(plans)), key=speeds.__getitem__)
    # As `calibrate` does: a drafter that costs more than it brings is better left out.
    drafter.drafting_plan = plans[fastest] if speeds[fastest] > 1 else DraftingPlan(0, 1)
    # Without figures of its own a drafter's plans are few, which whoever reads the result should know.
    measured = drafter.network.config.to_dict().get("acceptance") is not None
    return {
        "from": "calibrated, measured acceptance" if measured else "calibrated, assumed acceptance",
        "expected_speedup": max(speeds[fastest], 1.0),
        "tried": [[_listed(plan), speed] for plan, speed in zip(plans, speeds, strict=True)],
        "curves": curves.to_dict(),
    }


def try_plans(
    target: PreTrainedModel, method: Method, plans: Sequence[DraftingPlan], trials: Sequence[torch.LongTensor]
) -> list[float]:
    """
    The speed of each plan over that of plain decoding on a few greedy answers, prompt by prompt.

    Args:
        target ([`~transformers.PreTrainedModel`]): The model.
        method ([`Method`]): Whose drafter's plan is changed.
        plans (sequence of [`DraftingPlan`]): What to try.
        trials (sequence of `torch.LongTensor` of shape `[1, T]`): Prompts; the first is also answered once untimed.
    """
    settings = decoding_settings(0, TRIAL_TOKENS)
    candidates: list[DraftingPlan | None] = [None, *plans]
    tokens, seconds = [0] * len(candidates), [0.0] * len(candidates)
    for number, prompt_ids in enumerate([trials[0], *trials]):
        for place, plan in enumerate(candidates):
            if plan is not None:
                method.drafter.drafting_plan = plan
            run = answer(target, prompt_ids, Method(PLAIN, "plain") if plan is None else method, settings, seed=0)
            if number:
                tokens[place] += len(run.ids)
                seconds[place] += run.seconds
    plain, *speeds = (made / took for made, took in zip(tokens, seconds, strict=True))
    return [speed / plain for speed in speeds]


def _listed(plan: DraftingPlan) -> list[int | None]:
    return [plan.tree_budget, plan.num_forwards, plan.max_starts]


__all__ = ["apply_plans", "choose_plans", "shortlist", "try_plans"]
