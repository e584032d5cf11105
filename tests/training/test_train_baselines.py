# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import VOCAB, prompt_of, tiny_target
from training_for_tests import Told, char_tokenizer

from specblock_hf import AutoDrafter, Eagle3Drafter, cli
from specblock_hf.drafters.falcon import FalconDrafter
from specblock_hf.drafters.medusa import MedusaDrafter
from specblock_hf.drafters.parallelspec import ParallelSpecDrafter


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """A folder of answers that repeat themselves and, in another, the tiny target with its tokenizer."""
    folder = tmp_path_factory.mktemp("answers")
    char_tokenizer().save_pretrained(folder / "target")
    tiny_target("llama").save_pretrained(folder / "target")
    (folder / "data").mkdir()
    with open(folder / "data" / "answers-0.jsonl", "w") as file:
        for number, tokens in enumerate(Told(24, 7).tokens.tolist()):
            file.write(json.dumps({"prompt": f"{number}ab", "answer_ids": tokens * 2, "temperature": 0.0}) + "\n")
    return folder


@pytest.mark.parametrize(
    ("name", "kind", "config", "objective", "shape"),
    [
        ("eagle3", Eagle3Drafter, ["num_blocks=3"], ["num_steps=3"], (3, 1)),
        ("medusa", MedusaDrafter, ["block_size=3"], ["head_decay=0.5"], (1, 3)),
        ("parallelspec", ParallelSpecDrafter, ["block_size=3"], ["slot_decay=0.5"], (1, 3)),
        ("falcon", FalconDrafter, ["block_size=2", "num_blocks=2"], ["glancing=0.3"], (1, 2)),
    ],
)
def test_the_command_trains_every_baseline(
    answers, tmp_path, capsys, monkeypatch, name, kind, config, objective, shape
):
    monkeypatch.setattr(kind, "plans_that_pay", ((2, 1, 0), (4, 1, 0), (8, 5, 0)))
    options = ["--target", answers / "target", "--data", answers / "data", "--output", tmp_path, "--drafter", name]
    options += ["--draft-vocab-size", 24, "--config", *config, "--objective", *objective]
    options += ["--epochs", 2, "--batch-tokens", 120, "--learning-rate", 0.01, "--held-out", 0.3, "--log-steps", 1]
    options += ["--eval-steps", 4, "--eval-budgets", 8, "--mixed-precision", "no", "--cpu"]
    assert cli.main(["train", *map(str, options)]) == 0, capsys.readouterr().err
    assert f"draft vocabulary: 24 of {VOCAB} tokens" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [row for row in rows if "loss" in row]
    assert all(math.isfinite(row["loss"]) for row in losses) and losses[-1]["loss"] < losses[0]["loss"]
    assert (len(losses[0]["agreement"]), len(losses[0]["agreement"][0])) == shape
    assert [row for row in rows if "tau_8" in row]
    drafter = AutoDrafter.from_pretrained(tmp_path / "final", target=tiny_target("llama")).eval()
    assert type(drafter) is kind
    assert [plan.tree_budget for plan, _ in drafter.acceptance()] == [2, 4]
    output = tiny_target("llama").generate(prompt_of(6), max_new_tokens=12, do_sample=False, assistant_model=drafter)
    assert torch.equal(output, tiny_target("llama").generate(prompt_of(6), max_new_tokens=12, do_sample=False))
