# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The plan that each drafter is compared with."""

from __future__ import annotations

import pytest
from conftest import prompt_of, tiny_target
from models_for_tests import tiny_drafter

from specblock_hf import DraftingPlan, JoinedDrafter, LookupDrafter
from specblock_hf.calibration import calibrate as calibration
from specblock_hf.calibration import trial
from specblock_hf.calibration.calibrate import Calibration
from specblock_hf.evaluation import plans
from specblock_hf.evaluation.methods import Method
from specblock_hf.evaluation.plans import apply_plans, choose_plans


TRIALS = [prompt_of(5), prompt_of(7)]


def method(name, drafter) -> Method:
    return Method(name, name, {"assistant_model": drafter}, drafter)


def chosen() -> dict[str, Method]:
    drafter, lookup = tiny_drafter(), LookupDrafter(tiny_target("llama").config)
    drafters = {"lookup": lookup, "specblock": drafter, "specblock+lookup": JoinedDrafter(drafter, lookup)}
    drafters["eagle3"] = tiny_drafter("eagle3")
    helper = Method("prompt_lookup", "transformers", {"prompt_lookup_num_tokens": 4})
    return {"prompt_lookup": helper} | {name: method(name, drafter) for name, drafter in drafters.items()}


def quick_calibration(monkeypatch, speeds=None) -> list[tuple[str, Calibration]]:
    """Little is measured, and the trials' speeds are given; the drafters that are calibrated, as they come."""
    calibrated, real = [], plans.calibrate

    def quick(target, drafter, prompts, progress):
        assert prompts is TRIALS
        calibrated.append((drafter.label, real(target, drafter, context=16, repeats=1, prompts=prompts)))
        return calibrated[-1][1]

    monkeypatch.setattr(plans, "calibrate", quick)
    monkeypatch.setattr(trial, "TRIAL_TOKENS", 4)
    if speeds is not None:
        monkeypatch.setattr(calibration, "try_plans", lambda *args: speeds)
    return calibrated


def test_plans_are_given_defaults_or_calibrated(llama, monkeypatch):
    calibrated = quick_calibration(monkeypatch)
    methods = chosen()
    given = {"specblock": DraftingPlan(6, 2, 3), "eagle3": DraftingPlan(4, 2)}
    notes = dict(choose_plans(list(methods.values()), llama, given, TRIALS))
    [(label, calibration)] = calibrated
    assert label == "SpecBlockDrafter + LookupDrafter"
    assert notes["specblock"] == {"from": "given", "plan": [6, 2, 3]}
    assert notes["eagle3"] == {"from": "given", "plan": [4, 2, None]}
    assert notes["lookup"] == {"from": "default", "plan": [7, 1, None]}
    joined = notes["specblock+lookup"]
    assert joined["from"] == "calibrated, assumed acceptance" and joined["curves"]["plain"] > 0
    assert joined["spread"] == calibration.spread and joined["curves"] == calibration.curves.to_dict()
    # One plan with one forward and one with two; the faster one, if it is faster than plain.
    assert [plan[1] for plan, _ in joined["tried"]] == [1, 2]
    fastest, speed = max(joined["tried"], key=lambda tried: tried[1])
    assert joined["plan"] == (fastest if speed > 1 else [0, 1, None])
    assert joined["expected_speedup"] == max(speed, 1)
    drafting = {name: one.drafter.drafting_plan for name, one in methods.items() if one.drafter is not None}
    assert {name: DraftingPlan(*note["plan"]) for name, note in notes.items()} == drafting
    fresh = chosen()
    apply_plans(list(fresh.values()), notes)
    assert {name: one.drafter.drafting_plan for name, one in fresh.items() if one.drafter is not None} == drafting


def test_measured_acceptance_is_told_from_assumed(llama, monkeypatch):
    quick_calibration(monkeypatch, [0.5, 2.5])
    drafter = tiny_drafter()
    drafter.config.acceptance = [[2, 1, 0, 1.5, 1.8], [6, 2, 4, 2.5, 2.8]]
    [(_, note)] = choose_plans([method("other", drafter)], llama, {}, TRIALS)
    assert note["from"] == "calibrated, measured acceptance" and note["expected_speedup"] == 2.5
    assert note["plan"] == [6, 2, 4] and note["tried"] == [[[2, 1, None], 0.5], [[6, 2, 4], 2.5]]


def test_where_no_trial_is_faster_than_plain_nothing_is_drafted(llama, monkeypatch):
    quick_calibration(monkeypatch, [0.5, 0.5])
    methods = chosen()
    [(_, note)] = choose_plans([methods["specblock"]], llama, {}, TRIALS)
    assert note["plan"] == [0, 1, None] and note["expected_speedup"] == 1.0


def test_a_plan_for_no_drafter_is_refused(llama):
    methods = chosen()
    with pytest.raises(ValueError, match=r"given to 'prompt_lookup', which is none of the methods .* \(lookup\)"):
        list(
            choose_plans(
                [methods["prompt_lookup"], methods["lookup"]], llama, {"prompt_lookup": DraftingPlan(4, 1)}, TRIALS
            )
        )


def test_what_is_known_is_not_chosen_again(llama, monkeypatch):
    calibrated = quick_calibration(monkeypatch)
    methods = chosen()
    choosing = choose_plans(list(methods.values()), llama, {}, TRIALS, known={"specblock", "eagle3"})
    assert next(choosing)[0] == "lookup" and calibrated == []
    assert next(choosing)[0] == "specblock+lookup" and len(calibrated) == 1
    assert list(choosing) == []
