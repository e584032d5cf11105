# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Several processes, sharded weights, trackers: what accelerate brings to the trainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, tracking
from accelerate.commands.config import load_config_from_file
from accelerate.tracking import GeneralTracker
from accelerate.utils import FullyShardedDataParallelPlugin, LoggerType
from safetensors.torch import load_file
from test_trainer import arguments, log_of, tiny_trainer
from training_for_tests import tiny_drafter

from specblock_hf.training import processes
from specblock_hf.training.processes import ObjectiveModule, make_accelerator


ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize(("optimizer", "rounding"), [("adamw", 1e-4), ("muon", 5e-4)])  # Muon rounds to bfloat16
def test_two_processes_train_like_one_with_twice_the_accumulation(optimizer, rounding, tmp_path):
    script = Path(__file__).parent / "many_processes.py"
    paths = os.pathsep.join((str(script.parents[1]), os.environ.get("PYTHONPATH", "")))
    run = subprocess.run(
        [sys.executable, script, tmp_path, optimizer],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert [row["step"] for row in one] == [row["step"] for row in two] and len(one) == 15
    assert len({row["loss"] for row in one if "loss" in row}) == 12
    for ours, theirs in zip(one, two, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"seconds_per_step", "shares"}:
            if isinstance(ours[name], float):
                assert theirs[name] == pytest.approx(ours[name], rel=1e-3, abs=2e-4), (ours["step"], name)
            else:
                assert theirs[name] == ours[name], (ours["step"], name)
    ours, theirs = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("one", "two"))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-3, atol=rounding)
    before = tiny_drafter().state_dict()
    assert all((ours[name] - before[name]).abs().max() > 0.01 for name, _ in tiny_drafter().named_parameters())


def test_the_fsdp_configuration_shards_the_drafters_layers():
    config = load_config_from_file(str(ROOT / "examples" / "fsdp.yaml"))
    assert config.distributed_type == "FSDP" and config.mixed_precision == "bf16"
    fields = {name.removeprefix("fsdp_"): value for name, value in config.fsdp_config.items()}
    fields["fsdp_version"] = fields.pop("version")
    plugin = FullyShardedDataParallelPlugin(**fields)
    module = ObjectiveModule(tiny_drafter())
    plugin.set_auto_wrap_policy(module)
    wrapped = [name for name, part in module.named_modules() if plugin.auto_wrap_policy(part, False, 0)]
    assert wrapped == ["drafter.layers.0", "drafter.layers.1"]


class ListTracker(GeneralTracker):
    """Keeps what it is told."""

    name, requires_logging_directory, main_process_only = "list", False, True

    def __init__(self, project: str = ""):
        super().__init__()
        self.rows: list[dict] = []
        self.begun_with: list = [project]

    @property
    def tracker(self):
        return self.rows

    def store_init_configuration(self, values: dict) -> None:
        self.begun_with.append(values)

    def log(self, values: dict, step: int | None = None) -> None:
        self.rows.append({"at": step} | values)


def test_trackers_are_told_the_numbers_of_the_log(tmp_path):
    tracker = ListTracker()
    accelerator = Accelerator(cpu=True, log_with=tracker)
    accelerator.init_trackers("specblock")
    trainer = tiny_trainer(tmp_path, evaluate=lambda drafter: {"tau_8": 2.5}, eval_steps=6, accelerator=accelerator)
    trainer.train()
    rows = log_of(tmp_path)
    assert [row["at"] for row in tracker.rows] == [row["step"] for row in rows]
    for told, row in zip(tracker.rows, rows, strict=True):
        assert told.items() >= {k: v for k, v in row.items() if isinstance(v, float)}.items()
        assert all(isinstance(value, int | float) for value in told.values())
        for block, rates in enumerate(row.get("agreement", []), 1):
            assert [told[f"agreement/{block}/{slot}"] for slot in range(1, 5)] == rates
    assert sum("tau_8" in row for row in tracker.rows) == 2
    assert sum("agreement/1/1" in row for row in tracker.rows) == 6


def test_a_tracker_of_this_machine_is_named_by_its_value(tmp_path, monkeypatch):
    """accelerate lists members of an enumeration; here there is one."""
    for place in (tracking, processes):
        monkeypatch.setattr(place, "get_available_trackers", lambda: [LoggerType.WANDB])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", ListTracker)
    args = arguments(tmp_path, report_to=["wandb"])
    (tracker,) = make_accelerator(args, cpu=True).trackers
    assert tracker.begun_with == ["specblock", {"arguments": json.dumps(vars(args))}]


def test_a_tracker_that_is_not_installed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="report_to names 'nonesuch', which is not installed here"):
        make_accelerator(arguments(tmp_path, report_to=["nonesuch"]), cpu=True)


def test_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match="a step takes at least one batch"):
        arguments(tmp_path, gradient_accumulation=0)
    with pytest.raises(ValueError, match='"no", "bf16" or "fp16"'):
        arguments(tmp_path, mixed_precision="int8")


def test_every_batch_of_a_step_is_taken_once(tmp_path):
    """By whichever process, and with the randomness of its number."""
    trainer = tiny_trainer(tmp_path, gradient_accumulation=3)
    seen, forward = [], trainer.module.forward

    def spy(batch, progress, generator):
        seen.append((batch.tokens.tolist(), generator.initial_seed()))
        return forward(batch, progress, generator)

    trainer.module.forward = spy
    trainer.step = 1
    batches = next(trainer.batches_from(1))
    trainer.train_step(batches)
    assert len(batches) == 3 == len({seed for _, seed in seen})
    assert [tokens for tokens, _ in seen] == [[trainer.examples[i].input_ids for i in batch] for batch in batches]
    assert [seed for _, seed in seen] == [trainer.seed_of(number) for number in (3, 4, 5)]
    assert json.dumps(trainer.args.__dict__)  # what a tracker is told at the start
