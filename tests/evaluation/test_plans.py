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
"""The plan that each drafter is compared with."""

from __future__ import annotations

import pytest
import torch
from conftest import VOCAB, prompt_of, tiny_target
from drafters_for_tests import OracleDrafter
from models_for_tests import tiny_drafter

from specblock_hf import CostCurves, DraftingPlan, JoinedDrafter, LookupDrafter
from specblock_hf.evaluation import plans
from specblock_hf.evaluation.benchmark import Run
from specblock_hf.evaluation.methods import Method
from specblock_hf.evaluation.plans import apply_plans, choose_plans, shortlist, try_plans


TRIALS = [prompt_of(5), prompt_of(7)]


def method(name, drafter) -> Method:
    return Method(name, name, {"assistant_model": drafter}, drafter)


def chosen() -> dict[str, Method]:
    drafter, lookup = tiny_drafter(), LookupDrafter(tiny_target("llama").config)
    drafters = {"lookup": lookup, "specblock": drafter, "specblock+lookup": JoinedDrafter(drafter, lookup)}
    drafters["eagle3"] = tiny_drafter("eagle3")
    helper = Method("prompt_lookup", "transformers", {"prompt_lookup_num_tokens": 4})
    return {"prompt_lookup": helper} | {name: method(name, drafter) for name, drafter in drafters.items()}


def quick_calibration(monkeypatch) -> list[str]:
    calibrated, real = [], plans.calibrate

    def quick(target, drafter, apply):
        assert not apply
        calibrated.append(drafter.label)
        return real(target, drafter, context=16, repeats=1, apply=False)

    monkeypatch.setattr(plans, "calibrate", quick)
    return calibrated


def test_plans_are_given_defaults_or_calibrated(llama, monkeypatch):
    calibrated = quick_calibration(monkeypatch)
    monkeypatch.setattr(plans, "TRIAL_TOKENS", 4)
    methods = chosen()
    given = {"specblock": DraftingPlan(6, 2, 3), "eagle3": DraftingPlan(4, 2)}
    notes = choose_plans(list(methods.values()), llama, given, TRIALS)
    assert calibrated == ["SpecBlockDrafter + LookupDrafter"]
    assert notes["specblock"] == {"from": "given", "plan": [6, 2, 3]}
    assert notes["eagle3"] == {"from": "given", "plan": [4, 2, None]}
    assert notes["lookup"] == {"from": "default", "plan": [8, 1, None]}
    joined = notes["specblock+lookup"]
    assert joined["from"] == "calibrated, assumed acceptance" and joined["curves"]["plain"] > 0
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
    quick_calibration(monkeypatch)
    monkeypatch.setattr(plans, "try_plans", lambda target, method, plans, trials: [0.5, 2.5])
    drafter = tiny_drafter()
    drafter.config.acceptance = [[2, 1, 0, 1.5, 1.8], [6, 2, 4, 2.5, 2.8]]
    note = choose_plans([method("other", drafter)], llama, {}, TRIALS)["other"]
    assert note["from"] == "calibrated, measured acceptance" and note["expected_speedup"] == 2.5
    assert note["plan"] == [6, 2, 4] and note["tried"] == [[[2, 1, None], 0.5], [[6, 2, 4], 2.5]]


def test_where_no_trial_is_faster_than_plain_nothing_is_drafted(llama, monkeypatch):
    quick_calibration(monkeypatch)
    monkeypatch.setattr(plans, "try_plans", lambda target, method, plans, trials: [0.5] * len(plans))
    methods = chosen()
    note = choose_plans([methods["specblock"]], llama, {}, TRIALS)["specblock"]
    assert note["plan"] == [0, 1, None] and note["expected_speedup"] == 1.0


def test_the_shortlist_has_the_best_plan_for_every_number_of_forwards():
    drafter = tiny_drafter()
    # Verifying costs 1 and a node 0.1 more, drafting nothing: of these the plans with tau / time highest are wanted.
    curves = CostCurves(((1, 1.0), (11, 2.0)), ((1, 0.0), (33, 0.0)), 0.0, 1.0, "")
    drafter.config.acceptance = [
        [10, 2, 4, 3.0, 3.0],  # 3.0 / 2.0
        [5, 1, 0, 2.0, 2.0],  # 2.0 / 1.5
        [2, 1, 0, 1.8, 1.8],  # 1.8 / 1.2, the best of one forward
        [10, 1, 0, 2.4, 2.4],  # 2.4 / 2.0
        [30, 2, 4, 3.5, 3.5],  # 3.5 / 4.0
    ]
    assert shortlist(drafter, curves) == [DraftingPlan(2, 1), DraftingPlan(10, 2, 4)]


def test_trials_are_timed_side_by_side_after_one_that_is_not(llama, monkeypatch):
    seen = []

    def fake(target, prompt_ids, method, settings, seed):
        plan = method.drafter.drafting_plan if method.drafter is not None else None
        seen.append((prompt_ids.shape[1], plan))
        slow_start = 100.0 if len(seen) <= 3 else 1.0
        return Run([0] * (4 if plan is None else 4 * plan.tree_budget), 2.0 * slow_start)

    monkeypatch.setattr(plans, "answer", fake)
    candidates = [DraftingPlan(3, 1), DraftingPlan(5, 2)]
    oracle = method("oracle", OracleDrafter(VOCAB, []))
    assert try_plans(llama, oracle, candidates, TRIALS) == [3.0, 5.0]
    assert seen == [(length, plan) for length in (5, 5, 7) for plan in (None, *candidates)]


def test_trials_are_real_answers(llama, monkeypatch):
    monkeypatch.setattr(plans, "TRIAL_TOKENS", 6)
    text = llama.generate(TRIALS[0], attention_mask=torch.ones_like(TRIALS[0]), do_sample=False, max_new_tokens=6)
    oracle = OracleDrafter(VOCAB, text[0].tolist(), siblings=False)
    (speed,) = try_plans(llama, method("oracle", oracle), [DraftingPlan(4, 1)], TRIALS[:1])
    assert speed > 0 and len(oracle.states) == 2 and oracle.states[0].limits[0].nodes == (4,)


def test_a_plan_for_no_drafter_is_refused(llama):
    methods = chosen()
    with pytest.raises(ValueError, match=r"given to 'prompt_lookup', which is none of the methods .* \(lookup\)"):
        choose_plans(
            [methods["prompt_lookup"], methods["lookup"]], llama, {"prompt_lookup": DraftingPlan(4, 1)}, TRIALS
        )
