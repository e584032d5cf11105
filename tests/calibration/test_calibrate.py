# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Choosing how much to draft. Where costs are asserted, a clock of the test's own tells the time."""

from __future__ import annotations

import json
import math
import random
import warnings
from collections.abc import Callable
from copy import deepcopy
from types import SimpleNamespace

import accelerate
import pytest
import torch
from conftest import VOCAB, prompt_of, tiny_target
from drafters_for_tests import OracleDrafter, Rounds
from graphs_for_tests import recorders
from hybrids_for_tests import hybrid_target
from training_for_tests import tiny_drafter
from transformers import GenerationConfig

from specblock_hf import DraftingPlan, SpecBlockConfig, SpecBlockDrafter, calibrate, compile_rounds, devices
from specblock_hf.calibration import calibrate as calibration
from specblock_hf.calibration.calibrate import ATTEMPTS, NOISY, _rising
from specblock_hf.calibration.costs import (
    NODES,
    CostCurves,
)
from specblock_hf.generation import compilation
from specblock_hf.generation.compilation import CompiledRounds
from specblock_hf.target.model import TargetModel


CONTEXT = 16


class Machine:
    """
    A target whose forwards take 100 seconds and a second for each column, on a clock that nothing else moves.

    Args:
        slowed (`Callable[[int], float]`, *optional*): By how much, given the columns of the forward.
    """

    def __init__(self, monkeypatch, target, slowed: Callable[[int], float] = lambda columns: 1.0):
        self.now, self.prompts = 0.0, 0

        def forward(module, args, kwargs):
            columns = kwargs["input_ids"].shape[1]
            self.prompts += columns == CONTEXT + 1
            self.now += slowed(columns) * (100.0 + columns)

        self.handle = target.register_forward_pre_hook(forward, with_kwargs=True)
        clock = SimpleNamespace(perf_counter=lambda: self.now)
        monkeypatch.setattr(calibration, "time", clock)
        monkeypatch.setattr(devices, "time", clock)


class PricedDrafter(OracleDrafter):
    """A forward takes 20 seconds, and every later one 10 and a second for each start; `right` tokens are right."""

    def __init__(self, acceptance, text=(0,) * 999, right: int = 0):
        super().__init__(VOCAB, text, lambda number: right, siblings=False)
        self.points, self.machine = acceptance, None

    def acceptance(self, with_lookup=False):
        return self.points

    def extend(self, state, pairs):
        state.pairs.append(pairs)

    def propose(self, state, pairs, limits):
        self.machine.now += 20.0 + (limits.num_forwards - 1) * (10.0 + (limits.max_starts or 0))
        return super().propose(state, pairs, limits)


@pytest.fixture
def priced(monkeypatch):
    """Makes a priced drafter and the machine that it runs on."""
    machines = []

    def make(acceptance, slowed=lambda columns: 1.0, **kwargs) -> tuple[PricedDrafter, Machine]:
        drafter = PricedDrafter(acceptance, **kwargs)
        machines.append(Machine(monkeypatch, tiny_target("llama"), slowed))
        drafter.machine = machines[-1]
        return drafter, machines[-1]

    yield make
    for machine in machines:
        machine.handle.remove()


def measured(target, drafter, **kwargs):
    return calibrate(target, drafter, context=CONTEXT + 1, **kwargs)


def test_a_point_costs_no_more_than_a_larger_one():
    assert _rising([(1, 10.0), (4, 39.0), (8, 12.0), (12, 13.0)]) == ((1, 10.0), (4, 12.0), (8, 12.0), (12, 13.0))


def test_costs_are_those_of_the_plans_that_the_drafter_may_choose(priced, llama):
    plans = [DraftingPlan(nodes, 1) for nodes in (2, 8, 24)]
    plans += [DraftingPlan(8, 2, 4), DraftingPlan(16, 4, 4), DraftingPlan(60, 8, 10)]
    drafter, machine = priced([(plan, 2.0) for plan in plans])
    found = measured(llama, drafter, repeats=1)
    assert found.curves.verify == tuple((nodes, 100.0 + nodes) for nodes in NODES)
    assert found.curves.draft == 20.0 and found.curves.later == ((4, 14.0), (10, 20.0))
    assert found.curves.plain == 101.0 and found.curves.host == 0.0 and found.spread == 0.0
    assert machine.prompts == 2  # plain and drafted, once
    (told,) = drafter.states
    asked = {(limits.num_forwards, limits.max_starts, limits.nodes[0]) for limits in told.limits}
    assert asked == {(1, None, 8), (4, 4, 8), (8, 10, 60)} and len(told.limits) == 2 * len(NODES)
    # Eight forwards cost 160, which a model of rows alone would not see.
    assert found.curves.round_seconds(plans[-1]) == 161.0 + 20.0 + 7 * 20.0


@pytest.mark.parametrize("family", ["qwen3_5", "nemotron_h", "lfm2"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_recurrent_target_is_measured_by_what_it_reads(monkeypatch, family, batch_size):
    read, score = [], TargetModel.score

    def scored(self, tree):
        assert (tree.parents == torch.arange(tree.parents.shape[1]) - 1).all()  # a chain
        result = score(self, tree)
        read.append(self.columns)
        return result

    monkeypatch.setattr(TargetModel, "score", scored)
    target = hybrid_target(family)
    drafter = PricedDrafter([(DraftingPlan(8, 1), 2.0), (DraftingPlan(24, 2, 4), 3.0)])
    drafter.machine = machine = Machine(monkeypatch, target)
    try:
        found = measured(target, drafter, repeats=1, batch_size=batch_size)
    finally:
        machine.handle.remove()
    assert read == 2 * list(NODES)
    assert found.curves.verify == tuple((nodes, 100.0 + nodes) for nodes in NODES)
    assert (found.curves.plain, found.curves.host, found.curves.draft) == (101.0, 0.0, 20.0)
    assert found.curves.chains == ((1, 64), (2, 64)) and found.curves.rereads == (family != "lfm2")
    assert CostCurves.from_dict(json.loads(json.dumps(found.curves.to_dict()))) == found.curves


def test_one_forward_is_all_that_a_drafter_of_one_forward_is_measured_with(priced, llama):
    drafter, _ = priced([(DraftingPlan(8, 1), 2.0)])
    found = measured(llama, drafter, repeats=1)
    assert found.curves.draft == 20.0 and found.curves.later == ()
    assert found.plan == DraftingPlan(8, 1) and found.speedup == pytest.approx(2 * 101 / (109 + 20))


def test_a_step_that_is_slow_now_and_then_does_not_count(priced, llama):
    draw = random.Random(0)
    drafter, machine = priced(
        [(DraftingPlan(8, 1), 2.0)], lambda columns: 13 if columns == 1 and draw.random() < 0.3 else 1
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = measured(llama, drafter, repeats=5)
    assert found.curves.plain == 101.0 and machine.prompts == 2


def noise(seed: int, until: Callable[[], bool] = lambda: False) -> Callable[[int], float]:
    """Two forwards of three take up to thirteen times as long, until the machine is quiet."""
    draw = random.Random(seed)
    return lambda columns: 1.0 if until() or draw.random() < 1 / 3 else draw.uniform(2, 13)


def test_a_noisy_measurement_is_made_again(priced, llama):
    plans = [(DraftingPlan(8, 1), 2.0), (DraftingPlan(16, 2, 4), 2.2)]
    drafter, machine = priced(plans, noise(0, until=lambda: machine.prompts > 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = measured(llama, drafter, repeats=5)
    assert 2 < machine.prompts <= 2 * ATTEMPTS and found.spread <= NOISY
    assert found.curves.plain == 101.0 and found.curves.verify == tuple((nodes, 100.0 + nodes) for nodes in NODES)
    assert found.plan == DraftingPlan(8, 1) and found.speedup == pytest.approx(2 * 101 / 129)


def test_a_machine_that_stays_noisy_is_warned_of(priced, llama):
    drafter, machine = priced([(DraftingPlan(8, 1), 2.0)], noise(1))
    with pytest.warns(UserWarning, match=r"differ by \d+% after 3 attempts.* calibrate again when it is quiet"):
        found = measured(llama, drafter, repeats=3)
    assert found.spread > NOISY and machine.prompts == 2 * ATTEMPTS


def test_a_slow_machine_is_not_a_noisy_one(priced, llama):
    drafter, machine = priced([(DraftingPlan(8, 1), 2.0)], lambda columns: 5.0)
    found = measured(llama, drafter, repeats=1)
    assert found.spread == 0.0 and machine.prompts == 2


def text_of(target, prompt) -> list[int]:
    """The prompt and its greedy continuation, longer than a trial."""
    return target.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=60)[
        0
    ].tolist()


def test_a_trial_turns_down_a_plan_that_only_promises(priced, llama):
    prompt, plan = prompt_of(6), DraftingPlan(4, 1)
    # It is said to emit four tokens a round and gets nothing right.
    drafter, _ = priced([(plan, 4.0)], text=text_of(llama, prompt))
    hoped = measured(llama, drafter, repeats=1)
    assert hoped.plan == plan and hoped.speedup == pytest.approx(4 * 101 / 125) and hoped.tried == ()
    found = measured(llama, drafter, repeats=1, prompts=[prompt])
    ((tried, speedup),) = found.tried
    # The prompt's forward, then 47 steps; the drafter's rounds have a root alone, and 20 seconds for nothing.
    assert tried == plan and speedup == pytest.approx((106 + 47 * 101) / (106 + 46 * 121 + 101))
    assert found.plan == drafter.drafting_plan == DraftingPlan(0, 1) and found.speedup == 1.0


def test_a_trial_finds_the_plan_that_is_faster_than_expected(priced, llama):
    prompt, plans = prompt_of(6), [DraftingPlan(4, 1), DraftingPlan(4, 2, 2)]
    drafter, _ = priced([(plan, 1.1) for plan in plans], text=text_of(llama, prompt), right=4)
    assert measured(llama, drafter, repeats=1).plan == DraftingPlan(0, 1)
    found = measured(llama, drafter, repeats=1, prompts=[prompt], apply=False)
    # 9 rounds of 5 tokens and one of 2, whose draft is as deep as there are tokens left to draft
    drafted = 106 + 9 * (105 + 20) + (102 + 20)
    assert found.tried[0] == (plans[0], pytest.approx((106 + 47 * 101) / drafted))
    assert found.tried[1] == (plans[1], pytest.approx((106 + 47 * 101) / (drafted + 10 * 12)))
    assert (found.plan, found.speedup) == found.tried[0]
    assert drafter.drafting_plan == DraftingPlan(0, 1)  # of the first calibration, which was applied


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
    found = calibrate(target, drafter, context=16, repeats=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert drafter.drafting_plan == found.plan
    assert found.plan in [plan for plan, _ in drafter.acceptance()] + [DraftingPlan(0, 1)]
    assert [n for n, _ in found.curves.verify][:3] == [1, 4, 8]
    seconds = [s for _, s in found.curves.verify]
    assert all(0 < a <= b for a, b in zip(seconds, seconds[1:], strict=False))


def test_a_target_whose_weights_are_kept_elsewhere():
    target = accelerate.cpu_offload(deepcopy(tiny_target("llama")), execution_device="cpu")
    drafter = small_drafter(target)
    found = calibrate(target, drafter, context=16, repeats=1, prompts=[prompt_of(6)])
    assert target.device.type == "meta" and found.curves.setting.startswith("cpu, ")


def test_a_batch_is_calibrated_as_a_batch(monkeypatch):
    target = tiny_target("llama")
    drafter = small_drafter(target)
    forwards, propose = [], drafter.propose
    monkeypatch.setattr(drafter, "propose", lambda *args: forwards.append(propose(*args)) or forwards[-1])
    handle = target.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    shapes: list[tuple[int, ...]] = []
    found = calibrate(target, drafter, context=16, repeats=1, batch_size=3)
    handle.remove()
    assert {rows for rows, _ in shapes} == {3} and {tree.tokens.shape[0] for tree in forwards} == {3}
    assert {columns for _, columns in shapes} == {1, 4, 8, 12, 16, 24, 32, 48, 64}
    assert found.curves.setting == "cpu, torch.float32, batch 3, context 16" and found.curves.batch_size == 3


def test_rounds_are_measured_as_calls_will_run_them(monkeypatch, llama):
    made = []

    monkeypatch.setattr(compilation, "recorder_for", recorders(made))
    monkeypatch.setattr(calibration, "NOISY", math.inf)
    drafter = tiny_drafter()
    compile_rounds(llama, drafter, max_length=64)
    prepared = drafter.compiled_rounds
    calibrate(llama, drafter, context=CONTEXT, repeats=1)
    assert drafter.compiled_rounds is prepared and [graphs.captured for graphs in made[:2]] == [0, 0]
    # With the first the target's and a plan's drafts, with others those of further plans.
    used = [graphs for graphs in made[2:] if graphs.captured]
    assert all(graphs.replays for graphs in used) and used[0].captured > 1 == used[1].captured == used[2].captured


@pytest.mark.parametrize("where", ["argument", "generation_config", None])
def test_a_static_cache_measures_captured_rounds_of_the_target_too(where, monkeypatch):
    made, caches, target = [], [], deepcopy(tiny_target("llama"))

    monkeypatch.setattr(compilation, "recorder_for", recorders(made))
    monkeypatch.setattr(calibration, "NOISY", math.inf)
    prepare = target._prepare_cache_for_generation

    def noting(generation_config, *args, **kwargs):
        caches.append(generation_config.cache_implementation)
        return prepare(generation_config, *args, **kwargs)

    monkeypatch.setattr(target, "_prepare_cache_for_generation", noting)
    drafter = tiny_drafter()
    drafter.drafting_plan = "auto"
    drafter.compiled_rounds = CompiledRounds(target.device)  # as the first call on CUDA leaves it
    asked = {"cache_implementation": "static", "prompts": [prompt_of(6)]} if where == "argument" else {}
    if where == "generation_config":
        target.generation_config.cache_implementation = "static"
    calibrate(target, drafter, context=CONTEXT, repeats=1, **asked)
    # Only a target has several steps.
    used = [graphs for graphs in made if graphs.captured]
    assert any(graphs.captured > 1 for graphs in used) == (where is not None)
    assert len(used) > 1 and all(graphs.replays for graphs in used)
    assert set(caches) == {"static" if where else None} and (len(caches) > 1) == ("prompts" in asked)
    settings = [record["setting"] for record in drafter.controller.to_dict()["records"]]
    assert len(settings) == 2
    assert all(setting["compiled"] == (where is not None) and setting["compiled_drafts"] for setting in settings)


def test_calibrating_without_applying_changes_nothing():
    target = tiny_target("llama")
    drafter = small_drafter(target)
    calibrate(target, drafter, context=16, repeats=1, apply=False)
    assert drafter.drafting_plan == drafter.default_plan(target.device)


@pytest.mark.auto_plan
@pytest.mark.parametrize("sampled", [False, True])
def test_a_plan_that_finds_itself_starts_with_what_was_measured(sampled):
    target = tiny_target("llama")
    drafter = small_drafter(target)
    found = calibrate(target, drafter, context=16, repeats=1, batch_size=2)
    assert drafter.drafting_plan == "auto"
    (record,) = [
        record
        for record in drafter.controller.to_dict()["records"]
        if record["setting"]["batch_size"] == 2 and record["setting"]["sampled"] == sampled
    ]
    known = {int(size): times["samples"][0] for size, times in record["verify"]["sizes"].items()}
    expected = {nodes: seconds + found.curves.host for nodes, seconds in found.curves.verify if nodes > 1}
    assert known == expected | {1: found.curves.plain} and {8, 12} <= known.keys()
    assert record["draft"]["1/0"]["samples"][0] == found.curves.draft
    fresh = small_drafter(target)
    calibrate(target, fresh, context=16, repeats=1, apply=False)
    assert fresh.controller.to_dict()["records"] == []


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
    rounds = Rounds(drafter)
    drafted = target.generate(prompt, assistant_model=drafter, generation_config=generation_config, **settings)
    assert torch.equal(plain, drafted)
    assert rounds.seen[0][0].tokens.shape[1] == nodes
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


def test_an_attached_drafter_does_not_serve_what_it_is_compared_with():
    target = deepcopy(tiny_target("llama"))
    drafter = small_drafter(target)
    with drafter.attach(target) as attachment:
        calibrate(target, drafter, context=16, repeats=1, prompts=[prompt_of(6)])
        assert attachment.statistics.calls == 0
        target.generate(prompt_of(6), max_new_tokens=4)
        assert attachment.statistics.served == 1
