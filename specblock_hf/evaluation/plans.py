# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
The plan that each drafter is compared with: the best one for it alone, which trial answers decide.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..calibration.calibrate import calibrate
from ..drafting.plan import DraftingPlan
from .methods import Method


LOOKUP_PLAN = DraftingPlan(7, 1)
"""For look-ups alone, whose acceptance depends on the text so much that no figures are kept to choose by."""


def choose_plans(
    methods: Sequence[Method],
    target: PreTrainedModel,
    given: Mapping[str, DraftingPlan],
    trials: Sequence[torch.LongTensor],
    known: Container[str] = (),
    progress: bool = False,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Give every tree drafter its plan: the one that is given, or the one that answers the trial prompts fastest. One
    after the other, as they are asked for, because each takes minutes.

    Args:
        methods (sequence of [`Method`]): Their drafters are changed.
        target ([`~transformers.PreTrainedModel`]): Where and as it will run.
        given (mapping of `str` to [`DraftingPlan`]): Plans by the method's name.
        trials (sequence of `torch.LongTensor` of shape `[1, T]`): Prompts that are not among those to be measured.
        known (container of `str`, *optional*): Methods whose plans have been chosen before.
        progress (`bool`, *optional*, defaults to `False`): Show bars on the standard error stream.

    Yields:
        `tuple[str, dict]`: Of each other method with a drafter the name, and the `plan` (nodes, forwards, starts) with
        where it is from, ready for JSON.

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
    for name, method in drafting.items():
        if name in known:
            continue
        if name in given:
            plan, note = given[name], {"from": "given"}
        elif name == "lookup":
            plan, note = LOOKUP_PLAN, {"from": "default"}
        else:
            plan, note = _calibrated(target, method, trials, progress)
        method.drafter.drafting_plan = plan
        yield name, note | {"plan": _listed(plan)}


def apply_plans(methods: Sequence[Method], notes: Mapping[str, Mapping[str, Any]]) -> None:
    """Give the drafters the plans that [`choose_plans`] noted in an earlier run."""
    for method in methods:
        if method.drafter is not None:
            method.drafter.drafting_plan = DraftingPlan(*notes[method.name]["plan"])


def _calibrated(
    target: PreTrainedModel, method: Method, trials: Sequence[torch.LongTensor], progress: bool
) -> tuple[DraftingPlan, dict[str, Any]]:
    calibration = calibrate(target, method.drafter, prompts=trials, progress=progress)
    # Without figures of its own a drafter's plans are few, which whoever reads the result should know.
    measured = method.drafter.network.config.to_dict().get("acceptance") is not None
    return calibration.plan, {
        "from": "calibrated, measured acceptance" if measured else "calibrated, assumed acceptance",
        "expected_speedup": calibration.speedup,
        "tried": [[_listed(plan), speed] for plan, speed in calibration.tried],
        "spread": calibration.spread,
        "curves": calibration.curves.to_dict(),
    }


def _listed(plan: DraftingPlan) -> list[int | None]:
    return [plan.tree_budget, plan.num_forwards, plan.max_starts]
