# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The adaptation bandit against a simulated service, and each of its rules by itself."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specblock_hf.adaptation import AdaptationBandit


PATH = Path(__file__).parents[2] / "benchmarks" / "bandit_regret.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bandit_regret", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bandit_regret"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def eager(**constants) -> AdaptationBandit:
    """A bandit that may act after every second query and never explores."""
    defaults = {"warmup": 1, "interval": 1, "cooldown": 1, "epsilon": (0.0, 0.0), "cold_start": 0}
    return AdaptationBandit(**(defaults | constants))


@pytest.mark.parametrize("case", ["head pays more", "full pays more", "head pays, full costs", "nothing pays"])
def test_the_better_action_wins_in_nine_of_ten_late_decisions(bench, case):
    runs = bench.simulate(bench.CASES[case], seeds=20, queries=800)
    assert bench.late_share(runs) >= 0.9
    if case == "nothing pays":
        assert all(run.right.count(True) > run.right.count(False) for run in runs)


def test_late_regret_is_a_small_part_of_that_of_guessing(bench):
    gains = bench.CASES["head pays, full costs"]
    runs = bench.simulate(gains, seeds=10, queries=800)
    late = sum(run.regret[-1] - run.regret[400] for run in runs) / sum(len(run.right) // 2 for run in runs)
    mean_signal = 6
    guessing = (max(gains.values()) - sum(gains.values()) / 3) * mean_signal
    assert late < guessing / 4


def test_warm_up_only_measures():
    bandit = AdaptationBandit(warmup=5, epsilon=(1.0, 1.0))
    decisions = [bandit.step(5.0, 64, 2.0) for _ in range(5)]
    assert [d.reason for d in decisions] == ["warm-up"] * 4 + ["explored"]
    assert [d.throughput for d in decisions] == [None] * 4 + [32.0]


def test_an_update_blocks_the_next_queries():
    bandit = AdaptationBandit(warmup=1, epsilon=(1.0, 1.0), interval=2, cooldown=3)
    reasons = [bandit.step(5.0, 64, 2.0).reason for _ in range(9)]
    assert reasons == (["explored"] + ["cool-down"] * 3) * 2 + ["explored"]


def test_the_query_that_closes_a_measurement_may_trigger_the_next_update():
    bandit = AdaptationBandit(warmup=1, epsilon=(1.0, 1.0), interval=3, cooldown=0)
    decisions = [bandit.step(5.0, 64, 2.0) for _ in range(7)]
    assert [d.reason for d in decisions] == (["explored"] + ["cool-down"] * 2) * 2 + ["explored"]
    assert [d.reward for d in decisions] == [None, None, None, 0.0] + [None, None, 0.0]


def test_what_an_update_costs_is_not_in_the_throughput_before_the_next_one():
    bandit = AdaptationBandit(warmup=1, epsilon=(1.0, 1.0), interval=2, cooldown=3)
    assert bandit.step(5.0, 64, 2.0).throughput == 32.0
    slowed = [bandit.step(5.0, 64, 4.0, updating=True) for _ in range(2)]
    assert [d.throughput for d in slowed] == [32.0, 32.0]
    assert slowed[-1].reward == pytest.approx(-0.5)
    # The two since the update ended.
    assert [bandit.step(5.0, 64, 1.0).throughput for _ in range(2)] == [pytest.approx(128 / 3), 64.0]


def test_without_a_query_that_no_update_slowed_there_is_no_throughput():
    bandit = AdaptationBandit(warmup=1, epsilon=(1.0, 1.0))
    assert bandit.step(5.0, 64, 2.0, updating=True).reason == "warm-up"


def test_not_ready_skips():
    bandit = eager(epsilon=(1.0, 1.0))
    assert bandit.step(5.0, 64, 2.0, ready=False).reason == "not ready"
    assert bandit.step(5.0, 64, 2.0).action != "skip"


def test_reward_is_the_relative_change_for_each_unit_of_the_triggering_signal():
    bandit = eager(epsilon=(1.0, 0.0), cold_start=1)
    first = bandit.step(4.0, 64, 2.0)
    closing = bandit.step(9.0, 72, 2.0)
    assert closing.rewarded == first.action
    assert closing.reward == pytest.approx(72 / 64 - 1)
    assert bandit.values[first.action] == pytest.approx((72 / 64 - 1) / 4.0)


def test_first_rewards_are_averaged_and_later_ones_weigh_beta():
    bandit = eager(beta=0.4)
    rewards = [0.1, 0.3, -0.2, 0.5]
    for reward in rewards:
        bandit._open = {"action": "head", "signal": 1.0, "before": 32.0, "queries": 0, "tokens": 0, "seconds": 0.0}
        bandit._measure(64, 2.0 / (1 + reward))
    third = 0.6 * 0.2 + 0.4 * -0.2
    assert bandit.values["head"] == pytest.approx(0.6 * third + 0.4 * 0.5)


def test_weak_signals_teach_nothing():
    bandit = eager(epsilon=(1.0, 1.0), min_signal=0.5)
    bandit.step(0.4, 64, 2.0)
    assert bandit.step(9.0, 64, 1.0).reward == pytest.approx(1.0)
    assert bandit.values == {"head": 0.0, "full": 0.0}


def test_a_signal_of_nothing_teaches_nothing():
    bandit = eager(epsilon=(1.0, 1.0), min_signal=0.0)
    bandit.step(0.0, 64, 2.0)
    assert bandit.step(9.0, 64, 1.0).reward == pytest.approx(1.0)
    assert bandit.values == {"head": 0.0, "full": 0.0}


@given(st.floats(-1, 1), st.floats(-1, 1), st.floats(0, 50))
def test_without_exploration_the_largest_positive_gain_is_taken(head, full, signal):
    bandit = eager()
    bandit.values = {"head": head, "full": full}
    action = bandit.step(signal, 64, 2.0).action
    gains = {"skip": 0.0, "head": head * signal, "full": full * signal}
    assert gains[action] == max(gains.values())
    assert action == "skip" or gains[action] > 0


def test_exploration_decays_over_the_cold_start():
    bandit = AdaptationBandit(cold_start=4, epsilon=(0.6, 0.2))
    seen = []
    for bandit.events in range(6):
        seen.append(round(bandit.exploration, 3))
    assert seen == [0.6, 0.5, 0.4, 0.3, 0.2, 0.2]


def test_a_cold_start_seeds_both_values_and_goes_on_with_full_updates():
    bandit = eager(epsilon=(1.0, 1.0), cold_start=7)
    actions = [bandit.step(5.0, 64, 2.0).action for _ in range(24)]
    # After it, those that were tried less.
    assert actions[::2] == ["full", "head"] * 2 + ["full"] * 3 + ["head"] * 3 + ["full", "head"]


def test_reset_forgets_values_and_the_open_measurement():
    bandit = eager(epsilon=(1.0, 1.0))
    for _ in range(7):
        bandit.step(5.0, 64, 1.5)
    bandit.values["head"] = 3.0
    bandit.reset()
    assert bandit.values == {"head": 0.0, "full": 0.0}
    assert bandit.step(5.0, 64, 2.0).reward is None


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 60), st.integers(0, 5))
def test_a_restored_bandit_decides_alike(queries, seed):
    def serve(bandit, numbers):
        return [bandit.step(3.0 + number % 5, 64, 2.0 + number % 3 / 10) for number in numbers]

    first = AdaptationBandit(warmup=4, interval=3, cooldown=2, seed=seed)
    serve(first, range(queries))
    second = AdaptationBandit(warmup=4, interval=3, cooldown=2, seed=seed + 1)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert serve(first, range(40)) == serve(second, range(40))


@pytest.mark.parametrize(
    "constants", [{"beta": 0.0}, {"beta": 1.1}, {"epsilon": (0.5, -0.1)}, {"interval": 0}, {"warmup": -1}]
)
def test_constants_out_of_range_are_refused(constants):
    with pytest.raises(ValueError, match=next(iter(constants))):
        AdaptationBandit(**constants)


def test_decisions_are_plain_numbers():
    decision = AdaptationBandit().step(2.0, 64, 2.0)
    assert json.loads(json.dumps(decision.to_dict()))["signal"] == 2.0
