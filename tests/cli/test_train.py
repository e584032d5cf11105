# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""`specblock train`: shapes of drafters, what to start from, where the target lies, what is measured on the way."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import signal
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, dispatch_model
from conftest import SIZES, prompt_of, tiny_target
from training_for_tests import DRAFT_VOCAB, Told, char_tokenizer, example_of, tiny_drafter, write_answers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from specblock_hf import AutoDrafter, SpecBlockDrafter, cli
from specblock_hf.cli import train as command
from specblock_hf.drafters.layouts import OURS, write_checkpoint
from specblock_hf.training.target_views import view_target
from specblock_hf.training.trainer import DrafterTrainer


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """A folder of answers and the tiny target with its tokenizer in another."""
    folder = tmp_path_factory.mktemp("answers")
    write_answers(folder)
    return folder


@pytest.fixture
def train(answers, tmp_path, monkeypatch):
    """Runs the command and gives its status."""
    monkeypatch.setattr(SpecBlockDrafter, "plans_that_pay", ((2, 1, 0),))

    def run(*options: object) -> int:
        fixed = ["train", "--target", answers / "target", "--data", answers / "data", "--output", tmp_path / "run"]
        fixed += ["--epochs", 1, "--batch-tokens", 60, "--learning-rate", 0.01, "--held-out", 0.3, "--log-steps", 1]
        fixed += ["--eval-budgets", 4, 8, "--mixed-precision", "no", "--cpu"]
        fixed += [] if "--init-from" in options else ["--draft-vocab-size", DRAFT_VOCAB]
        return cli.main([str(option) for option in (*fixed, *options)])

    return run


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]


def test_what_is_measured_while_training(train, tmp_path, capsys):
    assert train("--objective", "num_blocks=2", "join_at=0.5") == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    for line in (
        "draft vocabulary: 24 of 32 tokens",
        "padding: ",
        "memory: target ",
        "a step: ",
        "the run: ",
        "evaluation(s) of ",
    ):
        assert line in said
    rows = log_of(tmp_path)
    measured = [row for row in rows if "tau_8" in row][-1]
    assert {"tau_4", "tau_8", "depths", "held_out_chain"} <= measured.keys()
    assert [len(block) for block in measured["held_out_agreement"]] == [4, 4]
    assert sum(bucket["frequency"] for bucket in measured["held_out_rank"].values()) == pytest.approx(1, abs=1e-3)
    steps = [row for row in rows if "loss" in row]
    first = -(-len(steps) // 2)
    assert [len(row["agreement"]) for row in steps] == [1] * first + [2] * (len(steps) - first)
    assert all(sum(row["shares"].values()) == pytest.approx(1, abs=0.01) for row in steps)
    final = tmp_path / "run" / "final"
    recorded = json.loads((final / "training.json").read_text())
    assert recorded["training"]["learning_rate"] == 0.01 and recorded["training"]["eval_budgets"] == "4 8"
    assert re.match(
        r"\d+ answers of the target itself \(\d+ answer tokens\) from `data`; \d+ others", recorded["data"]
    )
    card = (final / "README.md").read_text()
    assert recorded["data"] in card and "| learning_rate | 0.01 |" in card and "Nothing was measured" not in card
    assert str(tmp_path) not in card and "| Target | local, not on the Hub |" in card


def test_held_out_answers_are_read_in_batches_of_the_size_that_is_given(train, capsys, monkeypatch):
    places = []

    def viewed(target, examples, *rest):
        places.append((len(examples), len(examples) * max(len(example.input_ids) for example in examples)))
        return view_target(target, examples, *rest)

    monkeypatch.setattr(command, "view_target", viewed)
    assert train() == 0, capsys.readouterr().err
    assert all(count == 1 or size <= 60 for count, size in places)


class SecondAccelerator(Accelerator):
    """Of a process that is not the main one."""

    @property
    def is_main_process(self) -> bool:
        return False


def test_a_process_that_does_not_measure_meets_the_one_that_does(train, capsys, monkeypatch):
    met, measured = [], []
    monkeypatch.setattr(command, "make_accelerator", lambda *_: SecondAccelerator(cpu=True))
    monkeypatch.setattr(command, "_measured", lambda *_: measured.append(True))
    monkeypatch.setattr(DrafterTrainer, "log_evaluation", lambda trainer: met.append(trainer.step))
    assert train("--eval-steps", 2) == 0, capsys.readouterr().err
    assert met == [2, 4, 5] and not measured


def test_pairs_that_are_given_one_by_one_all_count():
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    options = ["--config", "a=1", "b=2", "--objective", "c=3", "--config", "d=4", "--objective", "e=5"]
    args = parser.parse_args(["--data", "x", "--output", "y", *options])
    assert (args.config, args.objective) == (["a=1", "b=2", "d=4"], ["c=3", "e=5"])


@pytest.fixture
def interrupted(train, monkeypatch):
    """Runs the command, gets Ctrl-C in the step after the given one, and gives its status."""

    def run(at: int, *options: object) -> int:
        def step(trainer, batches):
            if trainer.step == at:
                signal.raise_signal(signal.SIGINT)
            return taken(trainer, batches)

        taken = DrafterTrainer.train_step
        with monkeypatch.context() as patch:
            patch.setattr(DrafterTrainer, "train_step", step)
            return train(*options)

    return run


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_that_is_interrupted_goes_on_where_it_was(train, interrupted, tmp_path, capsys):
    assert interrupted(2, "--epochs", 2) == 130
    said = "specblock train: ended by SIGINT after step 3, which is saved; the same command goes on from there.\n"
    assert capsys.readouterr().err.endswith(said)
    assert train("--epochs", 2) == 0
    steps = [row["step"] for row in log_of(tmp_path) if "loss" in row]
    assert steps == list(range(1, len(steps) + 1))
    output = capsys.readouterr().out
    assert f"resuming at step 3 of {len(steps)}\n" in output
    assert f"the rest of the run: {len(steps) - 3} of {len(steps)} steps in " in output


def test_a_finished_run_stays_as_it_is(train, tmp_path, capsys):
    assert train() == 0
    before, final = files_of(tmp_path), tmp_path / "run" / "final"
    steps = log_of(tmp_path)[-1]["step"]
    capsys.readouterr()
    assert train("--save-steps", 7) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"finished already: {final} is the drafter of its {steps} steps; go on with --init-from it."
    )
    for options, message in (
        (["--learning-rate", 0.02], "--learning-rate 0.01 and this run has 0.02"),
        (["--draft-vocab-size", 20], "--draft-vocab-size 24 and this run has 20"),
        (["--config", "layer_shift=false"], "--config layer_shift=true and this run has false"),
        (["--drafter", "eagle3"], "--drafter specblock and this run has eagle3"),
        (["--init-from", final], "--init-from nothing and this run has final"),
        (["--greedy-only"], "--greedy-only false and this run has true"),
    ):
        assert train(*options) == 2
        assert f"was made with {message}; give the old value, or begin in another" in capsys.readouterr().err
    assert files_of(tmp_path) == before


def test_a_run_that_was_ended_before_it_was_measured_is_measured(train, tmp_path, capsys):
    assert train() == 0
    steps, final = log_of(tmp_path)[-1]["step"], tmp_path / "run" / "final"
    (final / "training.json").unlink()
    capsys.readouterr()
    assert train() == 0
    assert f"resuming at step {steps} of {steps}\n" in capsys.readouterr().out
    assert (final / "training.json").is_file() and log_of(tmp_path)[-1]["step"] == steps


def test_more_time_goes_on_with_a_run_whose_time_was_over(train, interrupted, tmp_path, capsys):
    assert interrupted(2, "--max-seconds", 1e6) == 130
    assert train("--max-seconds", 1e-6) == 0
    assert "resuming at step 3, after " in capsys.readouterr().out
    final = tmp_path / "run" / "final"
    assert (final / "training.json").is_file()
    assert interrupted(3, "--max-seconds", 1e6) == 130
    assert "ended by SIGINT after step 4" in capsys.readouterr().err
    assert not (final / "training.json").exists()  # which would be said of another drafter


def test_quiet_means_quiet(train, capfd):
    assert train("--quiet", "--save-steps", 2) == 0
    captured = capfd.readouterr()
    assert "%|" not in captured.err and "%|" not in captured.out and "the run: " in captured.out


@pytest.mark.parametrize(
    "config",
    [
        {"prefix_broadcast": False},
        {"layer_shift": False},
        {"branching": [2, 2, 2, 2], "root_width": 2},  # a uniform tree instead of a rank-guided one
    ],
)
def test_every_part_of_the_paper_can_be_left_out(train, tmp_path, capsys, config):
    pairs = [f"{name}={json.dumps(value)}" for name, value in config.items()]
    objective = ["--objective", "valid_prefix=false", "num_blocks=1"]
    status = train("--config", "num_hidden_layers=2", "rank_top_k=12", "root_width=4", *pairs, *objective)
    assert status == 0, capsys.readouterr().err
    target = tiny_target("llama")
    drafter = AutoDrafter.from_pretrained(tmp_path / "run" / "final", target=target).eval()
    assert {name: getattr(drafter.config, name) for name in config} == config
    assert len(drafter.shift_proj) == (1 if drafter.config.layer_shift else 0)
    output = target.generate(prompt_of(6), max_new_tokens=12, do_sample=False, assistant_model=drafter)
    assert torch.equal(output, target.generate(prompt_of(6), max_new_tokens=12, do_sample=False))


@torch.no_grad()
@pytest.mark.parametrize("broadcast", [True, False])
def test_without_the_broadcast_later_slots_have_their_query_alone(broadcast):
    drafter = tiny_drafter(prefix_broadcast=broadcast)
    conditions, embeds = (torch.randn(2, 3, drafter.config.hidden_size) for _ in range(2))
    one = drafter.input_layer(conditions, embeds)
    other = drafter.input_layer(conditions + 1, embeds)
    assert one.shape == (2, 3, 4, drafter.config.hidden_size)
    assert not torch.equal(one[:, :, 0], other[:, :, 0])
    assert torch.equal(one[:, :, 1:], other[:, :, 1:]) != broadcast
    assert not torch.equal(one[:, :, 1], one[:, :, 2])


@pytest.mark.parametrize("layout", [OURS, "specblock"])
def test_a_run_may_start_from_a_drafter_of_another_layout(train, tmp_path, capsys, layout):
    start = tiny_drafter(rank_top_k=20, rank_hidden_size=256, feature_layers=[2, 2, 1])
    if layout == OURS:
        start.save_pretrained(tmp_path / "start")
    else:
        write_checkpoint(start, tmp_path / "start", layout)
    assert train("--init-from", tmp_path / "start", "--learning-rate", 1e-9) == 0, capsys.readouterr().err
    trained = AutoDrafter.from_pretrained(tmp_path / "run" / "final", target=tiny_target("llama"))
    for name, weight in trained.state_dict().items():
        torch.testing.assert_close(weight, start.state_dict()[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("changes", [[], ["--config", "draft_vocab_size=20"]])
def test_nothing_that_was_measured_with_the_start_is_said_of_what_becomes_of_it(
    train, answers, tmp_path, capsys, changes
):
    shutil.copytree(answers / "target", tmp_path / "target")
    start = tiny_drafter(rank_top_k=12, acceptance=[[8, 1, 0, 3.0, 3.0]], target_name_or_path="org/base")
    start.save_pretrained(tmp_path / "start")
    options = ["--target", tmp_path / "target", "--held-out", 0, *changes]
    assert train("--init-from", tmp_path / "start", *options) == 0, capsys.readouterr().err
    config = AutoDrafter.from_pretrained(tmp_path / "run" / "final").config
    assert config.acceptance is None and config.target_name_or_path == str(tmp_path / "target")


def test_a_start_may_get_another_shape_and_vocabulary(train, tmp_path, capsys):
    start = tiny_drafter(rank_top_k=12)
    start.save_pretrained(tmp_path / "start")
    changes = ["--config", "markov_rank=3", "draft_vocab_size=20"]
    assert train("--init-from", tmp_path / "start", *changes, "--learning-rate", 1e-9) == 0, capsys.readouterr().err
    trained = AutoDrafter.from_pretrained(tmp_path / "run" / "final", target=tiny_target("llama"))
    assert trained.config.markov_rank == 3 and trained.lm_head.weight.shape[0] == 20
    for name in ("layers.0.mlp.up_proj.weight", "rank_head.0.weight"):
        torch.testing.assert_close(trained.state_dict()[name], start.state_dict()[name], rtol=0, atol=1e-6)
    assert "draft vocabulary: 20 of 32 tokens" in capsys.readouterr().out


def test_a_vocabulary_of_no_tokens_is_not_the_default_one(train, capsys):
    assert train("--draft-vocab-size", 0) == 2
    assert "draft_vocab_size" in capsys.readouterr().err


def test_a_start_is_of_the_kind_that_is_asked_for(train, tmp_path, capsys):
    tiny_drafter(rank_top_k=12).save_pretrained(tmp_path / "start")
    assert train("--init-from", tmp_path / "start", "--drafter", "eagle3") == 2
    assert "is a SpecBlockDrafter and no Eagle3Drafter, which --drafter eagle3 asks for" in capsys.readouterr().err
    assert train("--init-from", tmp_path / "start", "--draft-vocab-size", 20) == 2
    assert "with --init-from say --config draft_vocab_size=20." in capsys.readouterr().err
    assert train("--init-from", tmp_path / "start", "--drafter", "specblock") == 0, capsys.readouterr().err


def test_a_start_without_a_head_of_its_own_keeps_its_shape(train, tmp_path, capsys):
    assert train("--drafter", "dflash") == 0, capsys.readouterr().err
    final = tmp_path / "run" / "final"
    assert train("--init-from", final, "--output", tmp_path / "next", "--config", "block_size=2") == 2
    assert "A BlockDiffusionDrafter keeps its shape; leave --config out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--objective", "blocks=3"], "--objective got 'blocks=3'; give NAME=VALUE with one of these names: num"),
        (["--config", "layers"], "--config got 'layers'"),
        (["--objective", "num_blocks=0"], "at least the first block is trained"),
    ],
)
def test_other_names_are_refused(train, capsys, options, message):
    assert train(*options) == 2
    assert message in capsys.readouterr().err


def test_views_of_a_target_that_is_spread_over_devices(tmp_path):
    """A part of the layers on the disk, which on one device is what several are: states that lie where layers ran."""
    examples = [example_of(tokens, 3) for tokens in Told(3, 12).tokens.tolist()]
    whole = tiny_target("llama")
    spread = deepcopy(whole)
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "disk"}
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(len(spread.model.layers))}
    dispatch_model(spread, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    for ours, theirs in zip(*(view_target(t, examples, (0, 2, 4), 5) for t in (whole, spread)), strict=True):
        torch.testing.assert_close(ours.features, theirs.features)
        assert torch.equal(ours.top_ids, theirs.top_ids)


def test_a_target_with_other_names_for_its_sizes(train, answers, tmp_path, capsys):
    sizes = {name: SIZES[name] for name in SIZES if name != "num_key_value_heads"}
    target = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)).eval()
    target.save_pretrained(tmp_path / "target")
    char_tokenizer().save_pretrained(tmp_path / "target")
    assert train("--target", tmp_path / "target") == 0, capsys.readouterr().err
    drafter = AutoDrafter.from_pretrained(tmp_path / "run" / "final", target=target).eval()
    assert drafter.config.target_num_layers == 4 and drafter.config.num_key_value_heads == 4
    settings = {"do_sample": False, "max_new_tokens": 12}
    output = target.generate(prompt_of(6), assistant_model=drafter, **settings)
    assert torch.equal(output, target.generate(prompt_of(6), **settings))


def test_a_drafter_remembers_which_prompts_it_was_trained_behind(train, answers, tmp_path, capsys):
    shutil.copytree(answers / "target", tmp_path / "target")
    tokenizer = char_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}{% if enable_thinking is true %}y{% endif %}"
    tokenizer.save_pretrained(tmp_path / "target")
    assert train("--target", tmp_path / "target") == 0, capsys.readouterr().err
    config = json.loads((tmp_path / "run" / "final" / "config.json").read_text())
    assert config["thinking"] is False
    assert config["chat_template"] == hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()[:16]
    assert "| Trained on answers | without thinking |" in (tmp_path / "run" / "final" / "README.md").read_text()
