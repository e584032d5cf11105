# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""`specblock train --drafter dflash` and `--drafter jetspec`: from answers to a drafter that loads and drafts."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import prompt_of, tiny_target
from training_for_tests import write_answers

from specblock_hf import AutoDrafter, BlockDiffusionDrafter, cli


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """A folder of answers and the tiny target with its tokenizer in another."""
    folder = tmp_path_factory.mktemp("answers")
    write_answers(folder)
    return folder


@pytest.mark.parametrize(("name", "causal"), [("dflash", None), ("jetspec", True)])
def test_the_command_trains_both_forms(answers, tmp_path, capsys, monkeypatch, name, causal):
    monkeypatch.setattr(BlockDiffusionDrafter, "plans_that_pay", ((2, 1, 0), (4, 1, 0), (8, 2, 0)))
    options = ["--target", answers / "target", "--data", answers / "data", "--output", tmp_path, "--drafter", name]
    options += ["--config", "num_hidden_layers=1", "block_size=4", "--objective", "num_anchors=5"]
    options += ["--epochs", 2, "--batch-tokens", 120, "--learning-rate", 0.01, "--held-out", 0.3, "--log-steps", 1]
    options += ["--eval-steps", 4, "--eval-budgets", 8, "--mixed-precision", "no", "--cpu"]
    assert cli.main(["train", *map(str, options)]) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(row["loss"]) and len(row["agreement"][0]) == 3 for row in rows if "loss" in row)
    assert [row for row in rows if "tau_8" in row]
    drafter = AutoDrafter.from_pretrained(tmp_path / "final", target=tiny_target("llama")).eval()
    assert type(drafter) is BlockDiffusionDrafter
    assert (drafter.config.causal, drafter.config.block_size, drafter.config.num_hidden_layers) == (causal, 4, 1)
    assert [plan.tree_budget for plan, _ in drafter.acceptance()] == [2, 4]
    output = tiny_target("llama").generate(prompt_of(6), max_new_tokens=12, do_sample=False, assistant_model=drafter)
    assert torch.equal(output, tiny_target("llama").generate(prompt_of(6), max_new_tokens=12, do_sample=False))
