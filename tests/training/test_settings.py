# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints are taken up by runs of the settings that made them, and by no others."""

from __future__ import annotations

import re

import pytest
import torch
from baselines_for_tests import baseline
from block_drafters_for_tests import block_drafter
from test_trainer import tiny_trainer
from training_for_tests import tiny_drafter

from specblock_hf.drafters.specblock.loss import SpecBlockObjective


def saved(folder, **settings):
    trainer = tiny_trainer(folder, **settings)
    trainer.step = 4
    trainer.save()
    return trainer


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.02}, "--learning-rate 0.01 and this run has 0.02"),
        ({"epochs": 4}, "--epochs 3 and this run has 4"),
        ({"betas": [0.9, 0.99]}, "--betas [0.9, 0.95] and this run has [0.9, 0.99]"),
        ({"optimizer": "muon"}, "--optimizer adamw and this run has muon"),
        ({"rows": 7}, "--data 8 conversations of 144 tokens and this run has 7 conversations of 126 tokens"),
        ({"objective": SpecBlockObjective(num_blocks=1)}, "--objective num_blocks=3 and this run has 1"),
        ({"drafter": tiny_drafter(num_hidden_layers=1)}, "--config num_hidden_layers=2 and this run has 1"),
        ({"drafter": tiny_drafter(layer_shift=False)}, "--config layer_shift=true and this run has false"),
        ({"drafter": tiny_drafter(draft_vocab_size=20)}, "--draft-vocab-size 24 and this run has 20"),
        ({"drafter": baseline("eagle3")}, "--drafter specblock and this run has eagle3"),
        ({"drafter": block_drafter(causal=True)}, "--drafter specblock and this run has jetspec"),
    ],
)
def test_a_run_of_other_settings_takes_nothing_up(settings, message, tmp_path):
    saved(tmp_path, objective=SpecBlockObjective())
    other = tiny_trainer(tmp_path, **({"objective": SpecBlockObjective()} | settings))
    before = {name: weight.clone() for name, weight in other.drafter.state_dict().items()}
    whole = f"{tmp_path / 'checkpoint-4'} was made with {message}; give the old value, or begin in another --output."
    with pytest.raises(ValueError, match=f"^{re.escape(whole)}$"):
        other.resume()
    assert other.step == 0 and all(torch.equal(before[name], w) for name, w in other.drafter.state_dict().items())


def test_what_the_caller_adds_is_a_setting(tmp_path):
    first = saved(tmp_path)
    assert first.settings == tiny_trainer(tmp_path).settings and "--target" not in first.settings
    first.settings["--target"] = "base"
    first.save()
    other = tiny_trainer(tmp_path)
    other.settings["--target"] = "tuned"
    with pytest.raises(ValueError, match="was made with --target base and this run has tuned;"):
        other.find()


def test_steps_of_another_number_of_batches_are_refused(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint-4 was made with 1 batches a step and this run has 2"):
        tiny_trainer(tmp_path, gradient_accumulation=2).resume()


def test_how_long_and_where_a_run_reports_may_change_on_the_way(tmp_path):
    saved(tmp_path)
    free = {"max_seconds": 60.0, "log_steps": 7, "save_steps": 5, "eval_steps": 3, "eval_budgets": [4]}
    other = tiny_trainer(tmp_path, betas=[0.9, 0.95], **free)
    other.resume()
    assert other.step == 4


@pytest.mark.parametrize("made_by", [{}, {"made_by": "adamw"}])
def test_of_an_older_checkpoint_the_optimizer_is_known(made_by, tmp_path):
    saved(tmp_path)
    path = tmp_path / "checkpoint-4" / "trainer.pt"
    state = torch.load(path)
    del state["settings"]
    torch.save(state | made_by, path)
    other = tiny_trainer(tmp_path, learning_rate=0.02)
    other.resume()
    assert other.step == 4
    with pytest.raises(ValueError, match="was made with --optimizer adamw and this run has muon"):
        tiny_trainer(tmp_path, optimizer="muon").resume()
