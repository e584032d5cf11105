# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The step before the first: what it says, and that it leaves no trace."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from baselines_for_tests import baseline
from conftest import tiny_target
from safetensors.torch import load_file
from test_trainer import tiny_trainer
from training_for_tests import tiny_drafter

from specblock_hf.drafters.eagle3.loss import Eagle3Objective
from specblock_hf.drafters.specblock.loss import SpecBlockObjective
from specblock_hf.training import estimate
from specblock_hf.training.estimate import Rehearsal, expected_tau, rehearse


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_rehearsed_run_ends_with_the_same_weights(tmp_path, optimizer):
    for name in ("rehearsed", "plain"):
        trainer = tiny_trainer(tmp_path / name, epochs=2, optimizer=optimizer)
        if name == "rehearsed":
            rehearsal = rehearse(trainer, tiny_target("llama"))
            assert trainer.step == trainer.tokens_seen == 0
            assert all(p.grad is None for p in trainer.module.parameters())
        trainer.train()
    ours, theirs = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("rehearsed", "plain"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    count = sum(p.numel() for p in tiny_drafter().parameters())
    assert rehearsal.states == 16 * count and rehearsal.steps == trainer.total_steps == 8
    assert rehearsal.target == 4 * sum(p.numel() for p in tiny_target("llama").parameters())
    assert rehearsal.peak > rehearsal.states + rehearsal.target
    assert rehearsal.tokens == 2 * 15 and rehearsal.shares.keys() == {"target", "forward", "backward", "update"}


def test_a_step_lasts_until_the_device_has_taken_it(tmp_path, monkeypatch):
    trainer, now = tiny_trainer(tmp_path), [0.0]
    shares = trainer.clock.shares

    def waiting() -> dict[str, float]:
        now[0] += 5
        return shares() if trainer.clock.laps else {}

    monkeypatch.setattr(trainer.clock, "shares", waiting)
    monkeypatch.setattr(estimate, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert rehearse(trainer, tiny_target("llama")).seconds == 5


def test_the_largest_step_has_the_most_places(tmp_path):
    trainer = tiny_trainer(tmp_path, gradient_accumulation=2)
    trainer.examples[3].input_ids.extend([1] * 40)
    largest = trainer.sized_step(0)
    assert len(largest) == 2 and largest[0] == [3] and len(largest[1]) == 2
    assert trainer.sized_step(0.5)[0] not in ([3], trainer.sized_step(1)[0])


def test_measurements_are_part_of_the_estimate(tmp_path):
    trainer = tiny_trainer(tmp_path, epochs=3, eval_steps=5)
    assert trainer.total_steps == 12
    rehearsal = rehearse(trainer, tiny_target("llama"), evaluation=10.0, finish=40.0, tau=2.0)
    assert rehearsal.evaluations == [5, 10, 12]
    assert rehearsal.run_seconds == 12 * rehearsal.seconds + 3 * 5 + 20
    trainer.args.max_seconds = 100 * rehearsal.seconds
    limited = rehearse(trainer, tiny_target("llama"))
    assert limited.evaluations == [] and limited.run_seconds == limited.steps * limited.seconds


def test_measuring_takes_less_time_the_more_is_accepted():
    rehearsal = Rehearsal(1, 1, 1, 1.0, 25, {}, 1000, eval_steps=10, evaluation=60.0, finish=300.0)
    taus = [expected_tau(tokens) for tokens in (10_000, 20_000, 25_000)]  # after steps 10, 20 and 25
    assert 1.3 < taus[0] < taus[1] < taus[2] < 1.55 and expected_tau(0) == 1 and 2.2 < expected_tau(1_600_000) < 2.4
    assert rehearsal.evaluation_seconds == pytest.approx(sum(60 / tau for tau in taus))
    assert rehearsal.finish_seconds == pytest.approx(300 / taus[-1])
    assert rehearsal.run_seconds == pytest.approx(25 + rehearsal.evaluation_seconds + rehearsal.finish_seconds)
    trained = replace(rehearsal, tau=3.0)  # which accepts more than what it is about to learn
    assert trained.run_seconds == 25 + 3 * 20 + 100


def test_of_a_run_that_goes_on_the_rest_is_estimated(tmp_path):
    first = tiny_trainer(tmp_path, epochs=3, eval_steps=5)
    first.step, first.seconds = 5, 7.0
    first.save()
    trainer = tiny_trainer(tmp_path, epochs=3, eval_steps=5)
    assert trainer.find() == tmp_path / "checkpoint-5"
    rehearsal = rehearse(trainer, tiny_target("llama"), evaluation=10.0, finish=40.0, tau=2.0)
    assert (rehearsal.steps, rehearsal.done, rehearsal.evaluations) == (12, 5, [10, 12])
    assert rehearsal.run_seconds == 7 * rehearsal.seconds + 2 * 5 + 20
    assert str(rehearsal).splitlines()[-1].startswith("the rest of the run: 7 of 12 steps in ")
    trainer.args.max_seconds = 7.0
    over = rehearse(trainer, tiny_target("llama"), evaluation=10.0, finish=40.0, tau=2.0)
    assert (over.steps, over.left, over.evaluations, over.run_seconds) == (5, 0, [], 20)
    assert str(over).splitlines()[-1] == (
        "the rest of the run: 0 of 5 steps in 0 s, 0 evaluation(s) of 0 s, every plan's acceptance in 20 s: about "
        "20 s in all"
    )


def test_what_the_targets_views_take_on_the_disk(tmp_path):
    trainer = tiny_trainer(tmp_path)
    # Three states a token, five ids and weights an answer's.
    assert rehearse(trainer, tiny_target("llama")).views == 8 * (18 * 3 * 32 * 4 + 15 * 5 * (4 + 4))
    assert rehearse(trainer, tiny_target("llama"), kept=True).views == 0


@pytest.mark.parametrize(
    ("objective", "easing"),
    [(SpecBlockObjective(), ["num_blocks", "starts_share"]), (Eagle3Objective(), [])],
)
def test_only_what_the_objective_has_is_advised(objective, easing, tmp_path):
    drafter = tiny_drafter() if easing else baseline("eagle3")
    trainer = tiny_trainer(tmp_path, objective=objective, drafter=drafter)
    assert rehearse(trainer, tiny_target("llama")).easing == easing


def test_a_system_that_counts_no_memory_says_nothing_of_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    rehearsal = rehearse(tiny_trainer(tmp_path), tiny_target("llama"))
    assert rehearsal.peak == 0
    assert str(rehearsal).splitlines()[0] == "memory: target 0.00 GB, drafter with gradients and moments 0.00 GB"


@pytest.mark.parametrize(
    ("phase", "known", "said"),
    [
        (
            "target",
            {"views": 4_300_000_000},
            "the target's forward; --views DIR computes it once for all epochs and takes 4.30 GB of disk",
        ),
        ("target", {}, "reading the target's views"),
        ("forward", {}, "the drafter's forward and its head"),
        (
            "backward",
            {"easing": ["num_blocks"]},
            "the drafter's backward pass; a smaller num_blocks in --objective costs less",
        ),
        ("backward", {}, "the drafter's backward pass"),
        ("update", {}, "the optimiser; a larger --batch-tokens makes fewer of these"),
    ],
)
def test_what_bounds_a_step(phase, known, said):
    assert Rehearsal(1, 1, 1, 1.0, 10, {"other": 0.4, phase: 0.6}, 100, **known).bound == said


def test_what_it_says():
    shares = {"target": 0.25, "forward": 0.25, "backward": 0.5}
    figures = (270_000_000, 440_000_000, 2_000_000_000, 1.8, 4000, shares, 1500, 400, 270.0, 1800.0, 3.0)
    said = str(Rehearsal(*figures, easing=["num_blocks", "starts_share"]))
    assert said.splitlines() == [
        "memory: target 0.27 GB, drafter with gradients and moments 0.44 GB, peak of the largest step 2.00 GB",
        "a step: 1.80 s for 1500 answer tokens (target 25%, forward 25%, backward 50%), bound by the drafter's "
        "backward pass; a smaller num_blocks or starts_share in --objective costs less",
        "the run: 4000 steps in 2.0 h, 10 evaluation(s) of 90 s, every plan's acceptance in 10 min: about 2.4 h "
        "in all",
    ]
    alone = str(Rehearsal(1, 1, 1, 1.8, 40, shares, 1500)).splitlines()[-1]
    assert alone == "the run: 40 steps in 72 s, nothing is held out to measure with: about 72 s in all"
