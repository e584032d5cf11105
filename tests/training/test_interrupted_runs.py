# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs that are ended at any moment, by any signal or a full disk, and taken up again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_saving import FULL, contents, room_for
from test_trainer import log_of, tiny_trainer

from specblock_hf.training.termination import Terminated


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_that_is_taken_up_ends_with_the_same_weights(optimizer, tmp_path):
    """Interrupted between two checkpoints, and begun anew with other weights and another draft vocabulary."""
    whole = tiny_trainer(tmp_path / "whole", optimizer=optimizer)
    whole.train()
    first = tiny_trainer(tmp_path / "parts", optimizer=optimizer)
    steps = first.train_step

    def interrupted(indices):
        if first.step == 7:
            raise KeyboardInterrupt
        return steps(indices)

    first.train_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = tiny_trainer(tmp_path / "parts", seed=2, optimizer=optimizer)
    second.train()
    ours, theirs = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "parts"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [row["step"] for row in log_of(tmp_path / "parts")] == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_after_its_step(number, tmp_path):
    whole = tiny_trainer(tmp_path / "whole")
    whole.train()
    first = tiny_trainer(tmp_path / "parts")
    steps, before = first.train_step, signal.getsignal(number)

    def terminated(batches):
        if first.step == 6:
            signal.raise_signal(number)
        return steps(batches)

    first.train_step = terminated
    message = f"^ended by {number.name} after step 7, which is saved; the same command goes on from there"
    with pytest.raises(Terminated, match=message) as ended:
        first.train()
    assert ended.value.by == number
    assert signal.getsignal(number) is before and not (tmp_path / "parts" / "final").exists()
    second = tiny_trainer(tmp_path / "parts", seed=2)
    second.resume()
    assert second.step == 7
    second.train()
    ours, theirs = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_second_interrupt_is_one_as_always(tmp_path):
    trainer, noted = tiny_trainer(tmp_path), []
    # As in a terminal; in the background of a shell nothing is done by it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupted(batches):
        signal.raise_signal(signal.SIGINT)  # in this thread, at once
        noted.append(trainer.step)
        signal.raise_signal(signal.SIGINT)

    trainer.train_step = interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert noted == [0] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("at", [4, 12])
def test_sigterm_during_an_evaluation_ends_a_run_that_is_saved(at, tmp_path):
    def evaluate(drafter):
        if first.step == at:
            signal.raise_signal(signal.SIGTERM)
        return {"tau_8": 2.5}

    first = tiny_trainer(tmp_path, evaluate=evaluate, save_steps=200, eval_steps=4)
    with pytest.raises(Terminated, match=f"after step {at}, which is saved"):
        first.train()
    second = tiny_trainer(tmp_path, evaluate=lambda drafter: {"tau_8": 2.5}, save_steps=200, eval_steps=4, seed=2)
    second.resume()
    assert second.step == at
    second.train()
    assert [row["step"] for row in log_of(tmp_path) if "loss" not in row] == [4, 8, 12]


@pytest.mark.parametrize("save_steps", [4, 200])
def test_a_run_that_ends_in_its_last_evaluation_has_nothing_to_train(tmp_path, save_steps):
    def evaluate(drafter):
        raise KeyboardInterrupt

    first = tiny_trainer(tmp_path, evaluate=evaluate, save_steps=save_steps)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = tiny_trainer(tmp_path, evaluate=lambda drafter: {"tau_8": 2.5}, save_steps=save_steps, seed=2)
    second.train_step = lambda batches: pytest.fail("a step was taken again")
    second.train()
    assert [row for row in log_of(tmp_path) if "loss" not in row] == [
        {"step": 12, "tokens": second.tokens_seen, "tau_8": 2.5}
    ]
    assert (tmp_path / "final" / "model.safetensors").is_file()


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path):
    """Also without any checkpoint, and where a kill has cut the last line off."""
    trainer = tiny_trainer(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 2}\n{"st')
    trainer.resume()
    assert trainer.step == 0 and (tmp_path / "log.jsonl").read_text() == ""
    trainer.step = 4
    trainer.save()
    (tmp_path / "log.jsonl").write_text('{"step": 2}\n{"step": 4}\n{"step": 4, "tau_8": 1}\n{"step": 6}\n{"step"')
    other = tiny_trainer(tmp_path)
    other.resume()
    assert other.step == 4
    assert log_of(tmp_path) == [{"step": 2}, {"step": 4}, {"step": 4, "tau_8": 1}]


@pytest.mark.parametrize("room", [0, 2000, 30_000])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, room):
    trainer = tiny_trainer(tmp_path)
    trainer.step = 4
    trainer.save()
    before = contents(tmp_path)
    for step in (4, 6):  # over one that is there, and beside it
        trainer.step = step
        with pytest.raises(FULL), room_for(room):
            trainer.save()
        assert contents(tmp_path) == before
    other = tiny_trainer(tmp_path)
    other.resume()
    assert other.step == 4


def test_a_half_written_checkpoint_is_not_taken_up(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.step = 4
    trainer.save()
    (tmp_path / "checkpoint.partial").mkdir()
    (tmp_path / "checkpoint.partial" / "model.safetensors").write_bytes(b"torn")
    other = tiny_trainer(tmp_path)
    other.resume()
    other.step = 8
    other.save()
    assert [p.name for p in other.checkpoints()] == ["checkpoint-4", "checkpoint-8"]
    assert not (tmp_path / "checkpoint.partial").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_sigkill_at_random_steps_changes_nothing(tmp_path):
    script = Path(__file__).parent / "killed_training.py"
    tests = str(script.parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((tests, os.environ.get("PYTHONPATH", "")))}
    run = subprocess.run(
        [sys.executable, script, tmp_path, "6"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    whole, killed = (tmp_path / name for name in ("whole", "killed"))
    weights = [(folder / "final" / "model.safetensors").read_bytes() for folder in (whole, killed)]
    assert weights[0] == weights[1]
    times = {"seconds_per_step", "shares"}
    logs = [[{k: v for k, v in row.items() if k not in times} for row in log_of(f)] for f in (whole, killed)]
    assert logs[0] == logs[1]
    assert [row["step"] for row in logs[1] if "loss" in row] == list(range(1, 25))
    assert [row["step"] for row in logs[1] if "tau" in row] == [4, 8, 12, 16, 20, 24]
    assert len({row["loss"] for row in logs[1] if "loss" in row}) > 20
    assert sorted(p.name for p in killed.glob("checkpoint*")) == ["checkpoint-21", "checkpoint-24"]
