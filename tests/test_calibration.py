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
"""Choosing how much to draft. Times are measured for real but only their consequences are asserted."""

import pytest
import torch
from conftest import VOCAB, tiny_target
from transformers import GenerationConfig

from specblock_hf import CostCurves, DraftingPlan, SpecBlockConfig, SpecBlockDrafter, calibrate
from specblock_hf.calibration import choose_plan, interpolate


CURVES = CostCurves(
    verify=((1, 10.0), (9, 18.0), (17, 26.0)),
    draft=((1, 2.0), (5, 6.0), (33, 20.0)),
    host=1.0,
    plain=10.0,
    setting="cpu, torch.float32, context 256",
)


@pytest.mark.parametrize(
    ("at", "value"), [(0, 10.0), (1, 10.0), (5, 14.0), (9, 18.0), (13, 22.0), (17, 26.0), (33, 42.0)]
)
def test_interpolation_is_linear_and_goes_on_beyond_the_last_point(at, value):
    assert interpolate(CURVES.verify, at) == pytest.approx(value)


def test_a_round_pays_for_its_nodes_its_rows_and_the_host():
    # 9 nodes with the root: 18; 2 pairs and 4 starts are 6 rows: 6.5; host 1
    assert CURVES.round_seconds(DraftingPlan(8, 2, 4), tau=2.0) == pytest.approx(25.5)
    assert CURVES.speedup(DraftingPlan(8, 2, 4), tau=2.0) == pytest.approx(20 / 25.5)


def test_the_fastest_plan_wins_not_the_one_that_accepts_most():
    small, large = DraftingPlan(4, 1), DraftingPlan(60, 2, 32)
    assert choose_plan(CURVES, [(small, 2.6), (large, 4.0)])[0] == small
    # On a machine where nothing but the launch costs, the large one wins.
    flat = CostCurves(((1, 10.0), (61, 10.0)), ((1, 1.0), (33, 1.0)), 0.0, 10.0, "")
    assert choose_plan(flat, [(small, 2.6), (large, 4.0)]) == (large, pytest.approx(40 / 11))


def test_where_no_plan_pays_nothing_is_drafted():
    assert choose_plan(CURVES, [(DraftingPlan(4, 1), 1.2), (DraftingPlan(8, 1), 1.3)]) == (DraftingPlan(0, 1), 1.0)


def test_curves_survive_a_file():
    import json

    assert CostCurves.from_dict(json.loads(json.dumps(CURVES.to_dict()))) == CURVES


@pytest.mark.parametrize("values", [(-1, 1, None), (4, 0, None), (4, 1, 0)])
def test_an_impossible_plan_is_refused(values):
    with pytest.raises(ValueError, match="cannot be drafted"):
        DraftingPlan(*values)


@pytest.mark.parametrize("name", ["min_probability", "min_start_probability"])
@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_an_impossible_probability_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        DraftingPlan(4, 1, **{name: value})


def small_drafter(target) -> SpecBlockDrafter:
    torch.manual_seed(1)
    config = SpecBlockConfig.for_target(target.config, draft_vocab_size=24)
    return SpecBlockDrafter(config).eval()


def test_calibration_sets_a_plan_and_leaves_the_users_randomness_alone():
    target = tiny_target("llama")
    drafter = small_drafter(target)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    calibration = calibrate(target, drafter, context=16, repeats=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert drafter.drafting_plan == calibration.plan
    assert calibration.plan in [plan for plan, _ in drafter.acceptance()] + [DraftingPlan(0, 1)]
    assert [n for n, _ in calibration.curves.verify][:3] == [1, 4, 8]
    seconds = [s for _, s in calibration.curves.verify]
    assert all(0 < a <= b for a, b in zip(seconds, seconds[1:], strict=False))


def test_a_batch_is_calibrated_as_a_batch(monkeypatch):
    target = tiny_target("llama")
    drafter = small_drafter(target)
    forwards, propose = [], drafter.propose
    monkeypatch.setattr(drafter, "propose", lambda *args: forwards.append(propose(*args)) or forwards[-1])
    handle = target.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    shapes: list[tuple[int, ...]] = []
    calibration = calibrate(target, drafter, context=16, repeats=1, batch_size=3)
    handle.remove()
    assert {rows for rows, _ in shapes} == {3} and {tree.tokens.shape[0] for tree in forwards} == {3}
    assert {columns for _, columns in shapes} == {1, 4, 8, 12, 16, 24, 32, 48, 64}
    assert calibration.curves.setting == "cpu, torch.float32, batch 3, context 16"


def test_calibrating_without_applying_changes_nothing():
    target = tiny_target("llama")
    drafter = small_drafter(target)
    calibrate(target, drafter, context=16, repeats=1, apply=False)
    assert drafter.drafting_plan is None


@pytest.mark.parametrize(
    ("plan", "nodes", "forwards"),
    [(DraftingPlan(3, 1), 4, 1), (DraftingPlan(7, 2, 2), 8, 2), (DraftingPlan(0, 1), 1, 0)],
)
def test_a_calls_own_plan_goes_first(plan, nodes, forwards):
    target = tiny_target("llama")
    drafter = small_drafter(target)
    drafter.drafting_plan = DraftingPlan(16, 2, 8)
    prompt = torch.arange(6)[None] % VOCAB
    settings = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": 16}
    plain = target.generate(prompt, **settings)
    generation_config = GenerationConfig.from_model_config(target.config)
    generation_config.drafting_plan = plan
    drafted = target.generate(prompt, assistant_model=drafter, generation_config=generation_config, **settings)
    assert torch.equal(plain, drafted)
    tree, _ = drafter.last_statistics.first_round
    assert tree.tokens.shape[1] == nodes
    assert drafter.last_statistics.drafter_rows >= drafter.last_statistics.drafter_calls
    if not forwards:
        assert drafter.last_statistics.drafter_calls == 0


def test_unlikely_nodes_are_not_verified():
    target = tiny_target("llama")
    drafter = small_drafter(target)
    prompt = torch.arange(6)[None] % VOCAB
    settings = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": 16}
    plain = target.generate(prompt, **settings)
    verified = []
    for at_least in (0.0, 0.002, 1.0):
        drafter.drafting_plan = DraftingPlan(16, 1, min_probability=at_least)
        assert torch.equal(plain, target.generate(prompt, assistant_model=drafter, **settings))
        verified.append(drafter.last_statistics.nodes_verified / drafter.last_statistics.rounds)
    assert verified[0] > 15 and 1 < verified[1] < verified[0] and verified[2] == 1
