# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/gpu.py`: what it skips, what it takes up again, and that every command that it builds is one."""

from __future__ import annotations

import argparse
import gzip
import importlib
import json
import sys
from pathlib import Path

import pytest

from specblock_hf.cli import bench, regenerate
from specblock_hf.cli import train as command


FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("gpu")


@pytest.fixture
def runner(gpu, tmp_path):
    """A fresh runner of a step in the same folder."""
    return lambda seconds=60: gpu.Runner("tests", tmp_path, tmp_path / "work", "cpu", seconds)


def marking(gpu, path: Path, name: str, then: str = ""):
    """A task that leaves a line in a file, and does something else."""
    code = f"open({str(path)!r}, 'a').write({name!r} + '\\n'); print('said', {name!r}); {then}"
    return gpu.Task(name, ["-c", code], str.split)


def test_what_is_done_is_skipped_and_the_rest_tried_again(gpu, runner, tmp_path):
    marks, broken = tmp_path / "marks", tmp_path / "broken"
    broken.touch()
    tasks = [
        marking(gpu, marks, "one"),
        marking(gpu, marks, "two", f"import os; assert not os.path.exists({str(broken)!r}), 'broken'"),
        marking(gpu, marks, "three"),
    ]
    assert not runner().run(tasks)
    report = json.loads((tmp_path / "tests.json").read_text())
    rows = report["tasks"]
    assert [rows[name]["status"] for name in ("one", "two", "three")] == ["done", "failed", "done"]
    assert rows["one"]["result"] == ["said", "one"] and rows["one"]["exit"] == 0 and "tail" not in rows["one"]
    assert rows["two"]["exit"] == 1 and rows["two"]["tail"][-1] == "AssertionError: broken"
    assert report["machine"]["torch"]
    broken.unlink()
    assert runner().run(tasks)
    assert marks.read_text().split() == ["one", "two", "three", "two"]
    assert runner().run(tasks) and len(marks.read_text().split()) == 4


def test_a_killed_run_goes_on(gpu, runner, tmp_path, monkeypatch):
    marks = tmp_path / "marks"
    tasks = [marking(gpu, marks, "one"), marking(gpu, marks, "two", "import time; time.sleep(600)")]
    children = []
    wait = gpu.subprocess.Popen.wait

    def interrupted(process, timeout=None):
        if process.args[0] == sys.executable:
            children.append(process)
        if len(set(children)) == 2 and timeout is not None:
            raise KeyboardInterrupt
        return wait(process, timeout)

    monkeypatch.setattr(gpu.subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner().run(tasks)
    monkeypatch.undo()
    assert children[-1].poll() is not None
    assert list(json.loads((tmp_path / "tests.json").read_text())["tasks"]) == ["one"]
    marks.write_text("")
    assert runner().run([tasks[0], marking(gpu, marks, "two")])
    assert marks.read_text().split() == ["two"]


def test_a_step_ends_in_time(gpu, runner, tmp_path):
    marks = tmp_path / "marks"
    tasks = [marking(gpu, marks, "slow", "import time; time.sleep(600)"), marking(gpu, marks, "late")]
    assert not runner(seconds=3).run(tasks)
    rows = json.loads((tmp_path / "tests.json").read_text())["tasks"]
    assert [row["status"] for row in rows.values()] == ["out of time", "out of time"]
    assert 2 < rows["slow"]["seconds"] < 60 and rows["late"]["seconds"] == 0
    assert not marks.exists() or marks.read_text().split() == ["slow"]


def test_the_step_cost(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "TARGETS", ("llama-3.1-8b",))
    options = ["--output", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--tiny", "--device", "cpu"]
    assert gpu.main([*options, "--only", "cost"]) == 0
    report = json.loads((tmp_path / "out" / "cost.json").read_text())
    assert list(report["tasks"]) == ["llama-3.1-8b, context 32, batch 1", "llama-3.1-8b, context 32, batch 8"]
    figures = json.loads((tmp_path / "out" / "draft_cost.json").read_text())
    assert [unit["batch"] for unit in figures["units"]] == [1, 8]
    for unit in figures["units"]:
        assert set(unit["ratios"]) == {"SpecBlock M=1", "SpecBlock M=2", "SpecBlock M=3", "SpecBlock M=2, best-first"}
        assert unit["ratios"]["SpecBlock M=2"]["operators"] < 0.6
    capsys.readouterr()
    assert gpu.main([*options, "--only", "cost"]) == 0
    assert capsys.readouterr().out.count("is done already") == 2


def accepts(module, arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize("tiny", [False, True])
def test_the_commands_are_ones(gpu, tmp_path, tiny):
    options = ["--output", str(tmp_path), "--work", str(tmp_path / "work"), "--device", "cpu"]
    options += ["--prompts", "a.jsonl", "b.jsonl", "--gsm8k", "c.jsonl", *(["--tiny"] if tiny else [])]
    final = tmp_path / "work" / "train-medusa" / "final"
    final.mkdir(parents=True)
    (final / "config.json").write_text("{}")
    args = gpu.parse(options)
    (answers,) = gpu.regenerate(args)
    read = accepts(regenerate, answers.command[3:])
    assert answers.command[:3] == ["-m", "specblock_hf", "regenerate"]
    assert [Path(path).name for path in read.prompts] == ["a.jsonl", "b.jsonl"]
    assert (read.answers, read.temperature, read.greedy_share) == (2, 1.0, 1.0)
    timed = gpu.parse([*options, "--train-seconds", "30", "--init-from", str(final), "--kinds", "specblock"])
    (task,) = gpu.train(timed)
    read_back = accepts(command, task.command[3:])
    assert (read_back.max_seconds, read_back.init_from) == (30.0, str(final))
    trained = [accepts(command, task.command[3:]) for task in gpu.train(args)]
    assert [each.drafter for each in trained] == list(gpu.DRAFTERS)
    assert {each.data for each in trained} == {read.output}
    batches, side_by_side = gpu.bench(args)
    assert importlib.import_module("batches").parse(batches.command[1:]).sizes == [1, 8]
    compared = accepts(bench, side_by_side.command[3:])
    bench.check(compared)
    assert dict(compared.drafter) == {"medusa-trained": str(final)} and compared.methods[-1] == "medusa-trained"
    assert compared.temperature == [0.0, 1.0]
    tests = {task.name: task.command for task in gpu.tests(args)}
    identity = importlib.import_module("identity").parse(tests["identity"][1:])
    assert identity.limit == (1 if tiny else 10) and identity.dtype == ["float32", "bfloat16"]
    assert all(Path(gpu.ROOT, part).exists() for task in tests.values() for part in task if part.startswith("tests"))


def test_large_files_come_in_parts(gpu, tmp_path, monkeypatch):
    final = tmp_path / "train-eagle3" / "final"
    final.mkdir(parents=True)
    weights = bytes(range(256)) * 10
    (final / "model.safetensors").write_bytes(weights)
    (final / "config.json").write_text(json.dumps({"acceptance": [[8, 1, 0, 2.0, 2.5]]}))
    rows = [{"step": 1, "learning_rate": 1.0}, {"step": 2, "learning_rate": 0.5}, {"step": 2, "tau_8": 1.5}]
    (final.parent / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(gpu, "PART_BYTES", 1000)
    output = tmp_path / "out"
    output.mkdir()
    packed = gpu.pack_drafter(final.parent, output)
    parts = [f"train-eagle3.final.safetensors.0{number}" for number in range(3)]
    figures = {"last_step": [rows[1]], "held_out": [rows[2]], "acceptance": [[8, 1, 0, 2.0, 2.5]]}
    assert packed == {"parts": parts} | figures == json.loads((output / "train-eagle3.json").read_text())
    unpacked = gpu.unpack_drafter(output / "train-eagle3.json", tmp_path / "start")
    assert (unpacked / "model.safetensors").read_bytes() == weights
    assert (unpacked / "config.json").read_text() == (final / "config.json").read_text()
    assert gpu.unpack_drafter(final, tmp_path / "other") == final
    assert gpu.pack_drafter(tmp_path / "train-medusa", output) == {}


def test_the_newest_weights_replace_older_ones_once_they_are_all_there(gpu, tmp_path, monkeypatch):
    folder, output = tmp_path / "train-specblock", tmp_path / "out"
    output.mkdir()
    folder.mkdir()
    (folder / "log.jsonl").write_text("")
    for step in (8, 10):
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "model.safetensors").write_bytes(bytes([step]) * 10)
        (checkpoint / "config.json").write_text('{"acceptance": null}')
        if step == 8:
            gpu.pack_drafter(folder, output)

    def killed(path, content):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gpu, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            gpu.pack_drafter(folder, output)
    start = gpu.unpack_drafter(output / "train-specblock.json", tmp_path / "start")
    assert (start / "model.safetensors").read_bytes() == bytes([8]) * 10
    gpu.pack_drafter(folder, output)
    start = gpu.unpack_drafter(output / "train-specblock.json", tmp_path / "start")
    assert (start / "model.safetensors").read_bytes() == bytes([10]) * 10
    assert [path.name for path in output.glob("*.safetensors.*")] == ["train-specblock.checkpoint-10.safetensors.00"]


def test_a_command_is_looked_after_while_it_runs(gpu, runner, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "WATCH_SECONDS", 0.2)
    seen, release = [], tmp_path / "release"
    code = f"import os, time\nwhile not os.path.exists({str(release)!r}): time.sleep(0.05)"

    def watch():
        seen.append(len(seen))
        if len(seen) == 3:
            release.touch()

    assert runner().run([gpu.Task("one", ["-c", code], str.split, watch)])
    assert len(seen) >= 3


def test_answers_are_packed(gpu, tmp_path):
    rows = [{"prompt": "a", "answer_ids": [1, 2, 3], "temperature": t} for t in (0.0, 1.0, 1.0)]
    (tmp_path / "answers-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out"
    output.mkdir()
    assert gpu.pack_answers(tmp_path, output) == {"answers": 3, "greedy": 1, "tokens": 9}
    with gzip.open(output / "answers-0.jsonl.gz", "rt") as file:
        assert [json.loads(line) for line in file] == rows


def test_there_is_something_to_train_on(gpu, tmp_path, capsys):
    options = ["--output", str(tmp_path), "--work", str(tmp_path), "--device", "cpu", "--tiny", "--only", "train"]
    assert gpu.parse(options).only == ["regenerate", "train"]
    (tmp_path / "answers").mkdir()
    assert gpu.parse(options).only == ["train"]
    with pytest.raises(SystemExit):
        gpu.parse([*options, "--data", str(tmp_path / "nowhere")])
    assert "nowhere is not there; name the answers that train shall read." in capsys.readouterr().err


def test_what_cannot_work_is_refused(gpu, tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.parse(["--output", str(tmp_path), "--device", "cpu"])
    assert "name files with --prompts" in capsys.readouterr().err
