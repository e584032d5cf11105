# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The training loop: batches that follow from the step alone, runs that survive any kill, a log without repetition."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from attention_for_tests import only_ours, watched_attention
from baselines_for_tests import baseline
from block_drafters_for_tests import block_drafter
from conftest import VOCAB, tiny_target
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from training_for_tests import DRAFT_VOCAB, Told, char_tokenizer, example_of, tiny_drafter

from specblock_hf import SpecBlockDrafter, cli
from specblock_hf.drafters.specblock.loss import SpecBlockObjective
from specblock_hf.drafting.pairs import TokenTable
from specblock_hf.drafting.target_batch import TargetBatch
from specblock_hf.training.arguments import DrafterTrainingArguments
from specblock_hf.training.batches import batches_of_epoch, collate, draft_ids_of, draft_vocabulary
from specblock_hf.training.processes import make_accelerator
from specblock_hf.training.target_views import view_target
from specblock_hf.training.trainer import DrafterTrainer


def examples_of(lengths):
    return [example_of([1] * length, 1) for length in lengths]


def arguments(folder, **overrides) -> DrafterTrainingArguments:
    fields = {
        "epochs": 3,
        "batch_tokens": 40,
        "learning_rate": 1e-2,
        "mixed_precision": "no",
        "log_steps": 2,
        "save_steps": 4,
    }
    return DrafterTrainingArguments(output_dir=str(folder), **(fields | overrides))


def tiny_trainer(
    folder, rows: int = 8, evaluate=None, seed: int = 1, objective=None, accelerator=None, drafter=None, **overrides
):
    target = tiny_target("llama")
    drafter, table = drafter or tiny_drafter(seed), TokenTable.of(target)
    examples = [example_of(tokens, 3) for tokens in Told(rows, 18).tokens.tolist()]
    views = view_target(target, examples, drafter.feature_layers, 5)
    args = arguments(folder, **overrides)
    return DrafterTrainer(
        drafter, table, examples, lambda indices: [views[i] for i in indices], args, evaluate, objective, accelerator
    )


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@settings(deadline=None)
@given(st.lists(st.integers(2, 60), min_size=1, max_size=600), st.integers(2, 200), st.integers(0, 3))
def test_an_epoch_holds_every_example_once_within_the_budget(lengths, batch_tokens, seed):
    examples = examples_of(lengths)
    batches = batches_of_epoch(examples, batch_tokens, seed, 0)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= batch_tokens
    assert batches == batches_of_epoch(examples, batch_tokens, seed, 0)


def test_epochs_and_seeds_differ():
    examples = examples_of(range(2, 60))
    orders = [batches_of_epoch(examples, 100, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({json.dumps(order) for order in orders}) == 4


def test_neighbours_in_length_share_a_batch():
    lengths = [10, 200] * 600
    batches = batches_of_epoch(examples_of(lengths), 800, 0, 0)
    mixed = [batch for batch in batches if len({lengths[i] for i in batch}) > 1]
    # Short and long ones meet only in the one window that holds both.
    assert mixed and sum(len(batch) for batch in mixed) <= 256


def test_draft_vocabulary_takes_the_answers_tokens_by_frequency():
    examples = [example_of([9, 9, 9, 9, 5, 5, 5, 7, 7, 2], 4), example_of([8, 5, 7], 1)]
    ids, coverage = draft_vocabulary(examples, 2, VOCAB)
    assert ids.tolist() == [5, 7] and coverage == pytest.approx(7 / 8)
    ids, coverage = draft_vocabulary(examples, 5, VOCAB)
    assert ids.tolist() == [0, 1, 2, 5, 7] and coverage == 1
    ids, coverage = draft_vocabulary(examples, 5, VOCAB, [example_of([5, 5, 3, 7, 9], 1)])
    assert ids.tolist() == [0, 1, 2, 5, 7] and coverage == 2 / 4


def test_collate_pads_and_marks_the_answers():
    target, drafter = tiny_target("llama"), tiny_drafter()
    examples = [example_of([4, 5, 6, 7, 8], 3), example_of([9, 10, 11], 1)]
    views = view_target(target, examples, drafter.feature_layers, 4)
    draft_ids = torch.full((VOCAB,), -1)
    draft_ids[drafter.draft_to_target] = torch.arange(DRAFT_VOCAB)
    batch = collate(examples, views, TokenTable.of(target), draft_ids)
    assert batch.tokens.tolist() == [[4, 5, 6, 7, 8], [9, 10, 11, 0, 0]]
    assert batch.lengths.tolist() == [5, 3]
    assert batch.scored.tolist() == [[False, False, False, True, True], [False, True, True, False, False]]
    torch.testing.assert_close(batch.embeds, target.get_input_embeddings()(batch.tokens))
    torch.testing.assert_close(batch.features[1, :3], views[1].features.flatten(1))
    for row, view in enumerate(views):
        start = examples[row].answer_start
        for place, ids in enumerate(view.top_ids.tolist()):
            translated = [draft_ids[i].item() for i in ids]
            assert batch.top_ids[row, start + place].tolist() == translated
        assert torch.equal(batch.top_probs[row, start : len(examples[row].input_ids)], view.top_probs)
    assert (batch.top_ids[~batch.scored] == -1).all()
    assert (batch.top_ids[batch.scored] == -1).any() and (batch.top_ids[batch.scored] >= 0).any()


def test_a_batch_is_where_the_drafter_is_and_not_where_the_targets_embedding_is():
    class Elsewhere(TokenTable):
        device = torch.device("meta")

        def embed(self, ids, raw=False):
            return self.embedding(ids)

    target, drafter = tiny_target("llama"), tiny_drafter()
    examples = [example_of([4, 5, 6, 7, 8], 3), example_of([9, 10, 11], 1)]
    views, ids = view_target(target, examples, drafter.feature_layers, 4), draft_ids_of(drafter, VOCAB)
    table = TokenTable.of(target)
    here = collate(examples, views, table, ids)
    there = collate(examples, views, Elsewhere(table.embedding, table.output_head, VOCAB), ids)
    for name in {field.name for field in dataclasses.fields(TargetBatch)} - {"table"}:
        torch.testing.assert_close(getattr(there, name), getattr(here, name))


@pytest.mark.parametrize("name", ["specblock", "eagle3", "parallelspec", "falcon_drafter", "dflash"])
def test_no_step_reaches_cudnn(name, tmp_path):
    own = {"specblock": tiny_drafter, "dflash": block_drafter}
    drafter = own[name]() if name in own else baseline(name)
    trainer = tiny_trainer(tmp_path, drafter=drafter)
    with watched_attention() as seen:
        trainer.train_step(next(trainer.batches_from(0)))
    assert only_ours(seen)


def test_transformers_knows_that_layers_cannot_be_run_again_in_the_backward_pass():
    # Later blocks read the keys of earlier ones, and transformers runs such layers without a cache.
    assert not tiny_drafter().supports_gradient_checkpointing


def test_learning_rate_warms_up_and_falls_to_zero(tmp_path):
    trainer = tiny_trainer(tmp_path, epochs=100, learning_rate=0.5, warmup_ratio=0.1)
    steps = trainer.total_steps
    assert steps == 400
    rates = [trainer.learning_rate(step) for step in range(steps + 1)]
    assert rates[0] == pytest.approx(0.5 / 40) and rates[39] == pytest.approx(0.5) and max(rates) == 0.5
    assert rates[220] == pytest.approx(0.25) and rates[-1] == pytest.approx(0)
    assert rates[:40] == sorted(rates[:40]) and rates[40:] == sorted(rates[40:], reverse=True)


def test_the_clock_never_takes_the_rate_above_its_peak(tmp_path):
    trainer = tiny_trainer(tmp_path, epochs=15, max_seconds=60.0, learning_rate=0.5, warmup_ratio=0.03)
    rates = [trainer.learning_rate(trainer.total_steps * share / 500) for share in range(501)]
    assert max(rates) == 0.5


def test_batches_follow_from_the_step(tmp_path):
    trainer = tiny_trainer(tmp_path, epochs=2.5)
    whole = list(trainer.batches_from(0))
    assert len(whole) == trainer.total_steps == 10
    for step in range(11):
        assert list(trainer.batches_from(step)) == whole[step:]


def test_training_learns_and_leaves_a_drafter_behind(tmp_path):
    numbers = []

    def evaluate(drafter):
        assert not drafter.training
        numbers.append(len(numbers))
        return {"tau_8": float(len(numbers))}

    trainer = tiny_trainer(
        tmp_path, evaluate=evaluate, epochs=15, eval_steps=20, objective=SpecBlockObjective(join_at=0.2)
    )
    trainer.train()
    rows = log_of(tmp_path)
    assert [row["step"] for row in rows if "loss" in row] == list(range(2, 61, 2))
    assert [(row["step"], row["tau_8"]) for row in rows if "tau_8" in row] == [(20, 1.0), (40, 2.0), (60, 3.0)]
    rows = [row for row in rows if "loss" in row]
    assert rows[-1]["draft_loss"] / 3 < 0.8 * rows[0]["draft_loss"]
    # The rank head and later blocks join after a fifth of the steps.
    assert [len(row["agreement"]) for row in rows[:7]] == [1] * 6 + [3]
    assert rows[5]["rank_loss"] == 0 and rows[6]["rank_loss"] > 0
    assert rows[-1]["tokens"] == 15 * 8 * 15
    assert sorted(p.name for p in trainer.checkpoints()) == ["checkpoint-56", "checkpoint-60"]
    final = SpecBlockDrafter.from_pretrained(tmp_path / "final")
    assert final.config._attn_implementation == "sdpa"
    for name, weight in final.state_dict().items():
        assert torch.equal(weight, trainer.drafter.state_dict()[name])
    assert not trainer.drafter.training


def test_a_run_of_limited_time_follows_the_clock(tmp_path, monkeypatch):
    """Every step lasts 4 s of a clock that this test winds: 5 of them fill 20 s, whatever `epochs` says."""
    now = itertools.count(0, 4.0)
    monkeypatch.setattr("specblock_hf.training.trainer.time.perf_counter", lambda: next(now))
    options = {"epochs": 100, "max_seconds": 20.0, "warmup_ratio": 0.01, "log_steps": 1, "save_steps": 2}
    trainer = tiny_trainer(tmp_path / "whole", **options)
    monkeypatch.setattr(trainer, "_agreed", lambda seconds: 4.0)
    trainer.train()
    assert trainer.step == 5 and trainer.seconds == 20.0
    rates = [row["learning_rate"] for row in log_of(tmp_path / "whole")]
    assert rates[1:] == [trainer.learning_rate(share * trainer.total_steps) for share in (0.2, 0.4, 0.6, 0.8)]
    # Killed after the third step, it has the seconds behind the second left.
    parts = tiny_trainer(tmp_path / "parts", **options)
    steps = parts.train_step

    def interrupted(batches):
        if parts.step == 3:
            raise KeyboardInterrupt
        return steps(batches)

    parts.train_step, parts._agreed = interrupted, lambda seconds: 4.0
    with pytest.raises(KeyboardInterrupt):
        parts.train()
    again = tiny_trainer(tmp_path / "parts", **options)
    again._agreed = lambda seconds: 4.0
    again.resume()
    assert again.step == 2 and again.seconds == 8.0
    again.train()
    assert again.step == 5
    over = tiny_trainer(tmp_path / "parts", **options)
    over.train_step = lambda batches: pytest.fail("a step was taken when the time was over")
    over.train()


@pytest.mark.parametrize("broken", [1, 12])
def test_gradients_that_are_not_finite_move_no_weight(broken, tmp_path):
    trainer = tiny_trainer(tmp_path, epochs=4, log_steps=1)
    real = trainer.drafter.loss

    def loss(*args, **kwargs):
        out = real(*args, **kwargs)
        return out | {"loss": out["loss"] * (math.nan if 2 <= trainer.step < 2 + broken else 1.0)}

    trainer.drafter.loss = loss
    if broken == 1:
        trainer.train()
        weights = load_file(tmp_path / "final" / "model.safetensors")
    else:
        with pytest.raises(ValueError, match="of the last 10 steps were not finite, the last of them step 12; lower"):
            trainer.train()
        # What the message then says to do.
        start = SpecBlockDrafter.from_pretrained(trainer.checkpoints()[-1])
        tiny_trainer(tmp_path / "another", drafter=start, learning_rate=1e-3).train()
        weights = load_file(tmp_path / "another" / "final" / "model.safetensors")
        assert not (tmp_path / "final").exists()
    assert all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.parametrize("name", ["log_steps", "save_steps", "eval_steps"])
def test_never_is_said_otherwise(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name} is 0; for never give more steps than the run has"):
        arguments(tmp_path, **{name: 0})


def test_processes_wait_for_the_one_that_measures(tmp_path):
    handlers = make_accelerator(arguments(tmp_path), cpu=True).init_handler
    assert handlers.timeout >= timedelta(days=1)


def test_nothing_to_train_on_is_refused(tmp_path):
    drafter = tiny_drafter()
    table = TokenTable.of(tiny_target("llama"))
    with pytest.raises(ValueError, match="there is no conversation to train on; give more answers"):
        DrafterTrainer(drafter, table, [], lambda indices: [], arguments(tmp_path))


@pytest.fixture
def answers(tmp_path) -> Path:
    """A folder of answers and the tiny target with its tokenizer in another."""
    char_tokenizer().save_pretrained(tmp_path / "target")
    tiny_target("llama").save_pretrained(tmp_path / "target")
    data = tmp_path / "answers"
    data.mkdir()
    with open(data / "answers-0.jsonl", "w") as file:
        for number, tokens in enumerate(Told(30, 14).tokens.tolist()):
            row = {"prompt": f"{number}ab", "answer_ids": tokens, "temperature": 0.0 if number % 3 else 1.0}
            file.write(json.dumps(row) + "\n")
    return tmp_path


@pytest.mark.parametrize("views", [False, True])
def test_the_command_trains_from_a_folder_of_answers(answers, capsys, monkeypatch, views):
    monkeypatch.setattr(SpecBlockDrafter, "plans_that_pay", ((2, 1, 0), (4, 1, 0), (8, 2, 2), (8, 3, 2)))
    options = ["--views", str(answers / "views")] if views else []
    status = cli.main(
        ["train", "--target", str(answers / "target"), "--data", str(answers / "answers"), "--draft-vocab-size", "24"]
        + ["--output", str(answers / "run"), "--epochs", "2", "--batch-tokens", "60", "--learning-rate", "0.01"]
        + [
            "--held-out",
            "0.3",
            "--eval-steps",
            "5",
            "--eval-budgets",
            "8",
            "--log-steps",
            "1",
            "--mixed-precision",
            "no",
            *options,
        ]
    )
    assert status == 0, capsys.readouterr().err
    assert "draft vocabulary: 24 of 32 tokens" in capsys.readouterr().out
    rows = log_of(answers / "run")
    assert all(math.isfinite(row["loss"]) for row in rows if "loss" in row)
    assert [row["step"] for row in rows if "tau_8" in row][0] == 5
    drafter = SpecBlockDrafter.from_pretrained(answers / "run" / "final")
    drafter.check_target(tiny_target("llama"))
    assert drafter.config._attn_implementation == "sdpa"
    assert [row[:3] for row in drafter.config.acceptance] == [[2, 1, 0], [4, 1, 0], [8, 2, 2]]
    assert all(1 <= row[3] <= 5 for row in drafter.config.acceptance)
    assert (answers / "views").exists() == views


def test_the_command_trains_without_held_out_answers(answers, capsys):
    status = cli.main(
        ["train", "--target", str(answers / "target"), "--data", str(answers / "answers"), "--draft-vocab-size", "24"]
        + [
            "--output",
            str(answers / "run"),
            "--epochs",
            "1",
            "--batch-tokens",
            "300",
            "--held-out",
            "0",
            "--mixed-precision",
            "no",
        ]
    )
    assert status == 0, capsys.readouterr().err
    assert SpecBlockDrafter.from_pretrained(answers / "run" / "final").config.acceptance is None
