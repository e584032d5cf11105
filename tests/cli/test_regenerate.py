# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from chat_server import ChatServer, completion
from conftest import tiny_target
from training_for_tests import ALPHABET, char_tokenizer
from transformers import GenerationConfig

from specblock_hf import cli
from specblock_hf.cli import regenerate as regeneration
from specblock_hf.cli.models import encode, load_target
from specblock_hf.cli.regenerate import Progress, load_settings, stop_ids_of
from specblock_hf.data.examples import answered_by, load_examples, read_rows, render_prompt
from specblock_hf.data.template import PromptStyle
from specblock_hf.regeneration.answer_file import AnswerFile
from specblock_hf.regeneration.answering import Answering


EOS = ALPHABET.index("3")


@pytest.fixture
def folder(tmp_path):
    """A tiny target with its tokenizer, and 12 prompts of different lengths in two files."""
    char_tokenizer().save_pretrained(tmp_path / "target")
    tiny_target("llama").save_pretrained(tmp_path / "target")
    rng = random.Random(0)
    texts = ["".join(rng.choices(ALPHABET[2:26], k=length)) for length in range(3, 15)]
    write(tmp_path / "first.jsonl", [{"prompt": text, "source": "here"} for text in texts[:6]])
    write(tmp_path / "second.jsonl", [{"question": text} for text in texts[6:]])
    return tmp_path


def write(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def command_of(folder, *options: str, output: str = "out") -> list[str]:
    files = [str(folder / name) for name in ("first.jsonl", "second.jsonl")]
    fixed = ["--max-new-tokens", "9", "--batch-size", "4", "--dtype", "float32", "--device", "cpu"]
    paths = ["--target", str(folder / "target"), "--output", str(folder / output), "--prompts", *files]
    return ["regenerate", *paths, *fixed, *options]


def run(folder, *options: str, output: str = "out") -> int:
    return cli.main(command_of(folder, *options, output=output))


def rows_of(folder, output: str = "out") -> list[dict]:
    return list(read_rows(folder / output))


def in_order(rows: list[dict]) -> list[str]:
    return sorted(json.dumps(row) for row in rows)


def test_rows_are_what_training_reads(folder):
    assert run(folder) == 0
    rows = rows_of(folder)
    target, tokenizer = tiny_target("llama"), char_tokenizer()
    given = [
        row.get("prompt", row.get("question")) for n in ("first", "second") for row in read_rows(folder / f"{n}.jsonl")
    ]
    assert sorted(row["prompt"] for row in rows) == sorted(given) and len(rows) == 12
    for row in rows:
        assert list(row) == ["prompt", "source", "answer", "prompt_ids", "answer_ids", "temperature", "sample"]
        assert row["source"] == ("here" if len(row["prompt"]) < 9 else "second")
        assert (row["temperature"], row["sample"]) == (0.0, 0)
        ids = torch.tensor([render_prompt(tokenizer, [{"role": "user", "content": row["prompt"]}])])
        plain = target.generate(ids, do_sample=False, max_new_tokens=9, eos_token_id=EOS, pad_token_id=EOS)
        assert [row["prompt_ids"], row["answer_ids"]] == [ids[0].tolist(), plain[0, ids.shape[1] :].tolist()]
        assert row["answer"] == tokenizer.decode(row["answer_ids"], skip_special_tokens=True)
    examples = load_examples(folder / "out", tokenizer)
    assert len(examples) == sum(len(row["answer_ids"]) >= 2 for row in rows) and all(e.greedy for e in examples)


def test_what_ends_an_answer(folder):
    """Whatever does by the generation configuration or the tokenizer; it is part of the answer."""
    assert run(folder) == 0
    before = {row["prompt"]: row["answer_ids"] for row in rows_of(folder)}
    end = rows_of(folder)[0]["answer_ids"][2]
    path = folder / "target" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [end]}))
    target, tokenizer = load_target(str(folder / "target"), torch.float32)
    assert stop_ids_of(target.generation_config, tokenizer) == {end, EOS}
    assert stop_ids_of(load_settings(str(folder / "target"), target.config), tokenizer) == {end, EOS}
    assert stop_ids_of(GenerationConfig(), tokenizer) == {EOS}
    path.unlink()
    assert stop_ids_of(load_settings(str(folder / "target"), target.config), tokenizer) == {EOS}
    path.write_text(json.dumps({"eos_token_id": [end]}))
    assert run(folder, output="ended") == 0
    shorter = 0
    for row in rows_of(folder, "ended"):
        whole = before[row["prompt"]]
        assert row["answer_ids"] == (whole[: whole.index(end) + 1] if end in whole else whole)
        shorter += len(row["answer_ids"]) < len(whole)
    assert shorter > 0


OPTIONS = ("--temperature", "1.0", "--answers", "3", "--greedy-share", "0.5")


def die_after(command: list[str], file: Path, steps: int, torn: str) -> None:
    """Run the command until so many steps are done, write a part of a row and be killed."""
    torch.set_num_threads(1)
    step, taken = Answering._step, []

    def stepped(self) -> None:
        taken.append(self)
        if len(taken) > steps:
            with open(file, "a") as rows:
                rows.write(torn)
            os.kill(os.getpid(), signal.SIGKILL)
        step(self)

    Answering._step = stepped
    cli.main(command)


def test_a_killed_run_goes_on_to_the_row(folder, monkeypatch):
    """Five kills, each with a part of a row on the disk; in the end there are the rows of a run without any."""
    rows_by_step = [0]
    step, append = Answering._step, AnswerFile.append

    def stepped(self) -> None:
        rows_by_step.append(rows_by_step[-1])
        step(self)

    def appended(self, rows) -> None:
        rows = list(rows)
        rows_by_step[-1] += len(rows)
        append(self, rows)

    monkeypatch.setattr(Answering, "_step", stepped)
    monkeypatch.setattr(AnswerFile, "append", appended)
    assert run(folder, *OPTIONS, output="whole") == 0
    monkeypatch.undo()
    whole = in_order(rows_of(folder, "whole"))
    assert len(whole) == 36 == rows_by_step[-1]
    file = folder / "out" / "answers-00000-of-00001.jsonl"
    kept = 0
    for number, (steps, torn) in enumerate([(13, '{"prom'), (0, ""), (9, "{"), (8, '{"prompt": "a'), (4, "\n")]):
        arguments = (command_of(folder, *OPTIONS), file, steps, torn)
        process = multiprocessing.get_context("fork").Process(target=die_after, args=arguments)
        process.start()
        process.join(100)
        assert process.exitcode == -signal.SIGKILL
        lines = file.read_text().split("\n")
        assert set(lines[:-1]) - {""} <= set(whole) and lines[-1] == torn.strip()
        assert len(lines) - 1 - (torn == "\n") >= kept
        kept = len(lines) - 1
        if number == 0:  # nothing is lost that was finished before: it steps as a run without a break does
            assert kept == rows_by_step[steps] > 0
    file.write_text(file.read_text().rstrip("\n") + "\n")
    assert kept < 36
    assert run(folder, *OPTIONS) == 0 and in_order(rows_of(folder)) == whole
    assert run(folder, *OPTIONS) == 0 and in_order(rows_of(folder)) == whole


def test_another_temperature_adds_answers(folder):
    assert run(folder, "--temperature", "0.8", "--greedy-share", "0.5") == 0
    rows = rows_of(folder)
    sampled = {row["prompt"] for row in rows if row["temperature"] == 0.8}
    assert 0 < len(sampled) < 12 == len(rows) and {row["temperature"] for row in rows} == {0.0, 0.8}
    assert run(folder) == 0
    assert len(rows_of(folder)) == 12 + len(sampled)
    assert run(folder, "--temperature", "0.8", "--greedy-share", "0.5", "--limit", "7", output="few") == 0
    again = {row["prompt"]: row["temperature"] for row in rows_of(folder, "few")}
    assert len(again) == 7 and all((p in sampled) == (t == 0.8) for p, t in again.items())


def test_answers_of_another_target_are_not_taken_for_this_ones(folder, capsys):
    assert run(folder, "--limit", "2") == 0
    shutil.copytree(folder / "target", folder / "other")
    digest = PromptStyle.of(char_tokenizer()).chat_template
    whose = {"target": str(folder / "target"), "chat_template": digest, "thinking": None, "max_new_tokens": 9}
    assert answered_by(folder / "out") == whose
    before = rows_of(folder)
    for options, name in ((("--target", str(folder / "other")), "target"), (("--max-new-tokens", "10"), "max_new_to")):
        assert run(folder, *options) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"out holds answers with {name}" in error and "; give another --output, or the same" in error
        assert rows_of(folder) == before and answered_by(folder / "out") == whose
    assert run(folder, "--target", f"{folder / 'target'}/") == 0 and len(rows_of(folder)) == 12


def test_answers_that_were_cut_are_counted(folder, capsys):
    assert run(folder) == 0
    cut = sum(row["answer_ids"][-1] != EOS for row in rows_of(folder))
    assert 0 < cut and f"\n{cut} of 12 answers stopped at --max-new-tokens 9\n" in "".join(capsys.readouterr())
    assert run(folder) == 0  # there is nothing to answer
    assert "stopped at" not in "".join(capsys.readouterr())


def test_answers_with_or_without_thinking(folder, capsys):
    tokenizer = char_tokenizer()
    tokenizer.chat_template += "{% if enable_thinking is defined and not enable_thinking %}n{% endif %}"
    tokenizer.save_pretrained(folder / "target")
    thoughts = {}
    for output, options in (("usual", ()), ("on", ("--thinking",)), ("off", ("--no-thinking",))):
        assert run(folder, *options, output=output) == 0
        thoughts[output] = answered_by(folder / output)["thinking"]
    assert thoughts == {"usual": True, "on": True, "off": False}
    assert in_order(rows_of(folder, "on")) == in_order(rows_of(folder, "usual"))
    target, row = tiny_target("llama"), rows_of(folder, "off")[0]
    ids = torch.tensor([[*tokenizer.encode(row["prompt"]), *tokenizer.encode("0n")]])
    plain = target.generate(ids, do_sample=False, max_new_tokens=9, eos_token_id=EOS, pad_token_id=EOS)
    assert row["answer_ids"] == plain[0, ids.shape[1] :].tolist()
    with ChatServer(lambda body: (200, completion("a", token_ids=[2]), {})) as server:
        assert run(folder, "--no-thinking", "--server", server.url, "--limit", "1", output="asked") == 0
    assert server.bodies[0]["chat_template_kwargs"] == {"enable_thinking": False}


def test_sources_may_be_named_one_after_the_other(folder):
    first, *_ = [row["prompt"] for row in read_rows(folder / "first.jsonl")]
    write(folder / "third.jsonl", [{"prompt": "abc"}])
    write(folder / "left-out.jsonl", [{"prompt": "abc"}])
    write(folder / "too.jsonl", [{"prompt": first}])
    options = ["--prompts", str(folder / "third.jsonl")]
    for name in ("left-out.jsonl", "too.jsonl"):
        options += ["--exclude", str(folder / name)]
    assert run(folder, *options) == 0
    found = {row["prompt"] for row in rows_of(folder)}
    assert len(found) == 11 and not found & {"abc", first}
    assert run(folder, *options[:2]) == 0 and len(rows_of(folder)) == 13


def as_process(monkeypatch, index: int, count: int) -> None:
    def state(cpu: bool) -> SimpleNamespace:
        return SimpleNamespace(
            process_index=index,
            num_processes=count,
            is_main_process=index == 0,
            device=torch.device("cpu"),
            destroy_process_group=lambda: None,
        )

    monkeypatch.setattr(regeneration, "PartialState", state)


def test_any_number_of_processes_shares_the_prompts_and_goes_on(folder, monkeypatch):
    assert run(folder, *OPTIONS, output="whole") == 0
    whole = in_order(rows_of(folder, "whole"))
    for index in (2, 0):
        as_process(monkeypatch, index, 3)
        assert run(folder, *OPTIONS) == 0
    names = [f"answers-0000{index}-of-00003.jsonl" for index in (0, 2)]
    assert sorted(p.name for p in (folder / "out").glob("*.jsonl")) == names
    assert [len((folder / "out" / name).read_text().splitlines()) for name in names] == [12, 12]
    # A kill has torn the second one's last row; two processes go on.
    torn = folder / "out" / names[1]
    torn.write_text(torn.read_text()[:-20])
    for index in (0, 1):
        as_process(monkeypatch, index, 2)
        assert run(folder, *OPTIONS) == 0
    assert in_order(rows_of(folder)) == whole


@pytest.mark.timeout(300)
def test_accelerate_launches_processes(folder):
    """Two processes, started as users do; each answers half of the prompts and says nothing of the other's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # What starts several processes, on GPUs or not.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launch, "-m", "specblock_hf", *command_of(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (folder / "out").glob("*.jsonl")) == [
        "answers-00000-of-00002.jsonl",
        "answers-00001-of-00002.jsonl",
    ]
    assert run(folder, output="whole") == 0
    assert in_order(rows_of(folder)) == in_order(rows_of(folder, "whole"))
    assert done.stderr.count("answers wanted") + done.stdout.count("answers wanted") == 1


def test_a_server_can_answer_instead(folder, capsys):
    """The same rows and the same resumption; the weights are not even loaded."""

    def echo(body: dict) -> tuple[int, dict, dict]:
        text = body["messages"][-1]["content"]
        if len(text) == 5:
            return 400, {"error": "too long"}, {}
        return 200, completion(text[::-1], token_ids=[2, 4, 31]), {}

    (folder / "target" / "model.safetensors").unlink()
    with ChatServer(echo) as server:
        assert run(folder, "--server", server.url, "--limit", "4") == 0
        assert len(rows_of(folder)) == 3
        assert run(folder, "--server", server.url) == 0
        rows = rows_of(folder)
        assert len(rows) == 11 and len(server.bodies) == 4 + 9
        assert {tuple(row["answer_ids"]) for row in rows} == {(2, 4, 31)}
        assert {body["model"] for body in server.bodies} == {str(folder / "target")}
    said = "".join(capsys.readouterr())
    assert "12 answers wanted, 3 of them there already; no prompt left out" in said
    assert '1 prompts were refused by the server; the first: status 400: {"error": "too long"}' in said


def test_evaluation_sets_are_left_out(folder, tmp_path, capsys):
    prompts = [row["prompt"] for row in read_rows(folder / "first.jsonl")]
    write(tmp_path / "eval.jsonl", [{"question": f"  {prompts[1].upper()}!"}, {"turns": ["x", prompts[4]]}])
    assert run(folder, "--exclude", str(tmp_path / "eval.jsonl"), "humaneval") == 0
    assert {row["prompt"] for row in rows_of(folder)} & set(prompts) == set(prompts) - {prompts[1], prompts[4]}
    said = "".join(capsys.readouterr())
    assert "10 answers wanted, 0 of them there already; 2 left out as part of an evaluation set" in said


def test_progress_is_told_by_tokens(capsys):
    with Progress(10, 8, 100, True) as progress:
        assert progress.bar.total == 800
        progress.write(80)
        assert progress.bar.n == 80 and progress.bar.total == 800  # nothing has ended: answers may get as long as that
        progress.add(2)
        assert progress.bar.total == 320 and progress.bar.postfix == "4 of 10 answers"
        progress.write(400)
        progress.add(6)
        assert progress.bar.n == progress.bar.total == 480 and progress.bar.postfix == "10 of 10 answers"
    assert "<" in capsys.readouterr().err  # elapsed<left


def test_every_token_moves_the_bar_when_it_is_there(folder, monkeypatch):
    told = []
    monkeypatch.setattr(Progress, "write", lambda self, tokens: told.append(tokens))
    assert run(folder) == 0
    assert sum(told) == sum(len(row["answer_ids"]) for row in rows_of(folder)) and len(told) > 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "--answers is 1, --temperature -1.0 and --greedy-share 0.0; give at least 1 answer"),
        (["--answers", "2"], "--answers is 2 and --temperature 0, but greedy answers to one prompt are all the same"),
        (["--batch-size", "0"], "--batch-size is 0; give 1 or more."),
        (["--limit", "0"], "--limit is 0; give 1 or more."),
        (
            ["--max-new-tokens", "255"],
            "no prompt is left to answer (12 too long); give other prompts, or a smaller --max-new-tokens.",
        ),
        (
            ["--max-new-tokens", "256"],
            "--max-new-tokens is 256, which leaves no room for a prompt in the 256 tokens that the target can read",
        ),
        (
            ["--engine", "vllm", "--in-flight", "8"],
            "--engine, --in-flight would be ignored, because no server is asked; name it with --server, or leave",
        ),
        (["--model", "a", "--api-key", "b"], "--model, --api-key would be ignored, because no server is asked"),
        (["--exclude", "nothing"], "nothing is no file or folder here; name one with JSON lines, a data set on the"),
        (["--server", "http://127.0.0.1:9/v1", "--tries", "1"], "http://127.0.0.1:9/v1 gave no answer in 1 tries"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(folder, capsys, options, message):
    assert run(folder, *options) == 2
    assert f"specblock regenerate: {message}" in capsys.readouterr().err


def test_a_row_without_a_prompt_is_refused(folder, capsys):
    write(folder / "first.jsonl", [{"text": "a", "id": 1}])
    assert run(folder) == 2
    assert "first.jsonl has only text, id; every row needs prompt, question" in capsys.readouterr().err
    (folder / "first.jsonl").write_text('"what prompt"\n')
    assert run(folder) == 2
    assert "first.jsonl, line 1 is not a JSON object like" in capsys.readouterr().err


@pytest.mark.real
def test_the_default_target_answers(tmp_path):
    """In fp32 a batch of three prompts gets the answers that `generate()` gives each of them alone."""
    asked = ["Say hi.", "What is 2 + 2? Answer with the number only.", "Name a colour."]
    write(tmp_path / "prompts.jsonl", [{"prompt": text} for text in asked])
    status = cli.main(
        ["regenerate", "--prompts", str(tmp_path / "prompts.jsonl"), "--output", str(tmp_path / "out")]
        + ["--max-new-tokens", "20", "--device", "cpu", "--dtype", "float32"]
    )
    assert status == 0
    target, tokenizer = load_target(None, torch.float32)
    answers = {row["prompt"]: row["answer_ids"] for row in read_rows(tmp_path / "out")}
    assert set(answers) == set(asked)
    for text in asked:
        prompt = encode(tokenizer, text, target.device)
        mask = torch.ones_like(prompt)
        ids = target.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=20)
        assert answers[text] == ids[0, prompt.shape[1] :].tolist()
    assert any(answer[-1] == tokenizer.eos_token_id for answer in answers.values())
    assert len(load_examples(tmp_path / "out", tokenizer)) == 3
