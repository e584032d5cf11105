# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Trains a tiny drafter once without a break and once killed by SIGKILL again and again, in processes forked from this
one. Run as `killed_training.py FOLDER KILLS`; a test compares what is left behind.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from conftest import tiny_target
from training_for_tests import Told, example_of, tiny_drafter

from specblock_hf import DraftingPlan
from specblock_hf.drafters.specblock.loss import SpecBlockObjective
from specblock_hf.drafting.pairs import TokenTable
from specblock_hf.evaluation.simulate import simulate_acceptance
from specblock_hf.training.arguments import DrafterTrainingArguments
from specblock_hf.training.target_views import view_target
from specblock_hf.training.trainer import DrafterTrainer


STEPS = 24  # four epochs of six batches


def train(folder: Path, step_taken) -> None:
    """Train to the end or the kill; `step_taken` is called when a step is about to be taken."""
    torch.set_num_threads(1)
    target = tiny_target("llama")
    drafter, table = tiny_drafter(), TokenTable.of(target)
    examples = [example_of(tokens, 3) for tokens in Told(12, 16).tokens.tolist()]
    views = view_target(target, examples, drafter.feature_layers, 5)

    def views_of(indices: list[int]):
        step_taken()
        return [views[i] for i in indices]

    def evaluate(trained) -> dict[str, float]:
        return {"tau": simulate_acceptance(trained, table, examples[:2], views[:2], DraftingPlan(8, 2)).tau}

    args = DrafterTrainingArguments(
        output_dir=str(folder),
        epochs=4,
        batch_tokens=32,
        learning_rate=1e-2,
        log_steps=1,
        save_steps=3,
        eval_steps=4,
        mixed_precision="no",
    )
    objective = SpecBlockObjective(starts_share=0.8)
    trainer = DrafterTrainer(drafter, table, examples, views_of, args, evaluate, objective)
    assert trainer.total_steps == STEPS
    trainer.train()


def run_child(folder: Path, steps_before_kill: int | None, delay: float) -> int:
    """Fork, train there, and kill the child `delay` seconds into the step after so many; returns its wait status."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            train(folder, lambda: os.write(writing, b"."))
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    os.close(writing)
    seen = 0
    while seen != steps_before_kill and os.read(reading, 1):
        seen += 1
    if seen == steps_before_kill:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    os.close(reading)
    return os.waitpid(child, 0)[1]


def main(folder: Path, kills: int) -> None:
    assert run_child(folder / "whole", None, 0) == 0
    rng = random.Random(5)
    for _ in range(kills):
        # At most five steps a life and a checkpoint every three: some lives end before they have saved anything.
        status = run_child(folder / "killed", rng.randint(1, 5), rng.random() * 0.05)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    assert run_child(folder / "killed", None, 0) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
