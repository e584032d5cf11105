# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/screen.py`: its commands are ones of `specblock train`, and what is done is not done again."""

from __future__ import annotations

import argparse
import importlib
import json
from dataclasses import fields
from pathlib import Path

import pytest

from specblock_hf import SpecBlockConfig
from specblock_hf.cli import train as command
from specblock_hf.cli.options import read_pairs
from specblock_hf.drafters.specblock.loss import SpecBlockObjective
from specblock_hf.training.arguments import DrafterTrainingArguments


FOLDER = Path(__file__).parents[2] / "benchmarks"
MEASURED = {"step": 9, "tokens": 90, "tau_8": 1.5, "held_out_agreement": [[0.5, 0.25]], "held_out_chain": 0.6}


@pytest.fixture(scope="module")
def screen():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("screen")


def test_every_arm_is_a_command(screen, tmp_path):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    for arm in screen.ARMS.values():
        args = screen.command(arm, tmp_path, 3, ["--data", "answers", "--epochs", "0.2"])
        read = parser.parse_args(args[1:])
        DrafterTrainingArguments("unused", optimizer=read.optimizer)
        assert args[0] == "train" and (read.seed, read.epochs, read.data) == (3, 0.2, "answers")
        SpecBlockObjective(**read_pairs(read.objective, [f.name for f in fields(SpecBlockObjective)], "--objective"))
        SpecBlockConfig(**read_pairs(read.config, [f.name for f in fields(SpecBlockConfig)], "--config"))


def test_runs_are_made_once_and_their_last_measurement_is_kept(screen, tmp_path, monkeypatch):
    made = []

    def run(arguments, check):
        folder = Path(arguments[arguments.index("--output") + 1])
        (folder / "final").mkdir(parents=True)
        (folder / "final" / "config.json").touch()
        rows = [MEASURED | {"step": 3}, MEASURED, {"step": 9, "loss": 1.0}]
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        made.append(folder.name)

    monkeypatch.setattr(screen.subprocess, "run", run)
    output = tmp_path / "screen.json"
    fixed = ["--work", str(tmp_path / "work"), "--output", str(output), "--seeds", "0", "1", "--arms"]
    screen.main([*fixed, "paper", "--", "--data", "answers"])
    screen.main([*fixed, "paper", "markov term", "--", "--data", "answers"])
    assert made == ["paper-0", "paper-1", "markov-term-0", "markov-term-1"]
    runs = json.loads(output.read_text())["runs"]
    assert [(run["arm"], run["seed"]) for run in runs] == [
        (name, seed) for seed in (0, 1) for name in ("paper", "markov term")
    ]
    assert all({name: run[name] for name in MEASURED} == MEASURED for run in runs)
