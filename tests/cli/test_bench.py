# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""`specblock bench` from the command line to its files."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import pytest
from models_for_tests import save_models
from transformers import AutoTokenizer

from specblock_hf import DraftingPlan, cli
from specblock_hf.cli import bench
from specblock_hf.cli.bench import name_of, state_of
from specblock_hf.evaluation import plans
from specblock_hf.evaluation.benchmark import Benchmark


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    prompts = [{"prompt": "abc"}, {"turns": ["hello", "again"]}, {"question": "why"}]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (folder / "gsm8k.jsonl").write_text('{"question": "two and two"}\n{"question": "left out"}\n')
    return save_models(folder) | {"prompts": str(folder / "own.jsonl"), "gsm8k": str(folder / "gsm8k.jsonl")}


def run(folders, output, *options, methods="vanilla,lookup,specblock,eagle3", status=0):
    shared = ["--target", folders["target"], "--prompts", folders["prompts"], "--output", str(output), "--no-plots"]
    shared += [f"--drafter={name}={folders[name]}" for name in ("specblock", "eagle3")]
    shared += ["--methods", methods, "--max-new-tokens", "12", "--repeats", "1"]
    shared += [f"--plan={name}=6,2,3" for name in methods.split(",") if name.startswith(("specblock", "eagle3"))]
    assert cli.main(["bench", *shared, *options]) == status


def rows_in(output) -> list[dict]:
    return [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]


def test_tables_figures_and_plots_are_written(folders, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    suites = ["--suite", "gsm8k", "--gsm8k", folders["gsm8k"], "--limit", "1"]
    run(folders, tmp_path / "new", *suites, "--temperature", "0", "1", "--plots", methods="specblock,eagle3")
    output = capsys.readouterr().out
    summary = json.loads((tmp_path / "new" / "results.json").read_text())
    assert [figures["temperature"] for figures in summary["temperatures"]] == [0, 1]
    for figures in summary["temperatures"]:
        assert figures["suites"] == ["gsm8k", "prompts"]
        assert [method["method"] for method in figures["methods"]] == ["vanilla", "specblock", "eagle3"]
        assert [method["identical"] for method in figures["methods"][1:]] == [{"same": 2, "of": 2, "margins": []}] * 2
        assert figures["methods"][1]["to_eagle3"].keys() == {"draft_ms", "rows", "draft_share"}
    text = (tmp_path / "new" / "results.md").read_text()
    assert text in output and "| method | gsm8k Spd | gsm8k tau | prompts Spd |" in text
    for name in ("tokens.png", "speedup.png", "round.png", "acceptance.png"):
        assert (tmp_path / "new" / name).read_bytes().startswith(b"\x89PNG") and name in output
    assert "wall time of the command: " in output
    assert summary["conditions"]["given_plans"] == {"specblock": [6, 2, 3], "eagle3": [6, 2, 3]}


def test_an_interrupted_run_loses_one_prompt_at_most(folders, tmp_path, monkeypatch, capsys):
    made, real = [], Benchmark.run

    def failing(self, unit, number=0):
        if len(made) == 2:
            raise OSError("the power went out")
        made.append((unit.prompt.name, number))
        return real(self, unit, number)

    monkeypatch.setattr(Benchmark, "run", failing)
    run(folders, tmp_path, status=2)
    assert made == [("1", 0), ("2", 1)] and not (tmp_path / "results.json").exists()
    before = rows_in(tmp_path)
    assert len(before) == 4 + 8
    # As if it had died while it wrote.
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write(json.dumps(before[0] | {"prompt": "3"}) + '\n{"suite": "pro')
    made.clear()
    monkeypatch.setattr(plans, "calibrate", lambda *args, **kwargs: pytest.fail("calibrated again"))
    run(folders, tmp_path)
    assert made == [("3", 2)] and rows_in(tmp_path)[:12] == before and len(rows_in(tmp_path)) == 16
    made.clear()
    after = rows_in(tmp_path)
    run(folders, tmp_path)
    assert made == [] and rows_in(tmp_path) == after
    assert json.loads((tmp_path / "results.json").read_text())["answers"] == 16


def test_other_conditions_are_refused_in_the_same_folder(folders, tmp_path, capsys):
    run(folders, tmp_path, methods="lookup")
    run(folders, tmp_path, "--seed", "1", methods="lookup", status=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("specblock bench: ") and "with seed = 0 and this one has 1; give another --output" in error


def test_nothing_written_says_where_files_lie(folders, tmp_path, capsys):
    suites = ["--suite", "gsm8k", "--gsm8k", folders["gsm8k"], "--limit", "1"]
    run(folders, tmp_path / "out", *suites, methods="lookup")
    home = str(Path(folders["target"]).parent)
    for file in (tmp_path / "out").iterdir():
        assert home not in file.read_text(), file
    conditions = json.loads((tmp_path / "out" / "setting.json").read_text())["conditions"]
    assert conditions["drafters"] == {"specblock": "specblock", "eagle3": "eagle3"}
    names = (conditions["target"], conditions["prompts"], conditions["gsm8k"])
    assert names == ("target", "own.jsonl", "gsm8k.jsonl")
    assert conditions["files"].keys() == {"target", "prompts", "gsm8k", "drafter specblock", "drafter eagle3"}
    assert name_of("org/drafter") == "org/drafter" and state_of("org/drafter") is None


def test_models_of_transformers_own_methods_go_by_their_names(folders, tmp_path):
    run(folders, tmp_path / "out", methods=f"assistant:{folders['target']}")
    home = str(Path(folders["target"]).parent)
    assert not any(home in file.read_text() for file in (tmp_path / "out").iterdir())
    conditions = json.loads((tmp_path / "out" / "setting.json").read_text())["conditions"]
    assert conditions["methods"] == ["vanilla", "assistant:target"] and "assistant target" in conditions["files"]
    assert conditions["dtype"] == "float32"


def test_other_files_of_the_same_name_are_refused_in_the_same_folder(folders, tmp_path, capsys):
    own = tmp_path / "specblock"
    shutil.copytree(folders["specblock"], own)  # which keeps times: this is the same drafter
    run(folders, tmp_path / "out", methods="lookup")
    run(folders | {"specblock": str(own)}, tmp_path / "out", methods="lookup")
    (own / "README.md").write_text("decides nothing")
    run(folders | {"specblock": str(own)}, tmp_path / "out", methods="lookup")
    os.utime(own / "model.safetensors")  # as training again does
    run(folders | {"specblock": str(own)}, tmp_path / "out", methods="lookup", status=2)
    assert "with files = {" in capsys.readouterr().err.splitlines()[-1]


def test_a_target_is_told_not_to_think(folders, tmp_path, capsys):
    target = tmp_path / "target"
    shutil.copytree(folders["target"], target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.chat_template = "{{ messages[0].content }}{{ 'y' if enable_thinking | default(true) else 'nnn' }}"
    tokenizer.save_pretrained(target)
    counts = {}
    for name, options in (("usual", ()), ("on", ("--thinking",)), ("off", ("--no-thinking",))):
        run(folders | {"target": str(target)}, tmp_path / name, *options, "--limit", "1", methods="lookup")
        counts[name] = {row["prompt_tokens"] for row in rows_in(tmp_path / name)}
    assert counts == {"usual": {4}, "on": {4}, "off": {6}}
    run(folders | {"target": str(target)}, tmp_path / "on", "--limit", "1", methods="lookup", status=2)
    assert "with thinking = True and this one has None; give another" in capsys.readouterr().err
    run(folders, tmp_path / "none", "--no-thinking", methods="lookup", status=2)
    assert "has no enable_thinking to set; leave --thinking out." in capsys.readouterr().err


@pytest.mark.parametrize(("dtype", "status"), [("float32", 1), ("bfloat16", 0)])
def test_a_different_greedy_text_fails_only_in_fp32(folders, tmp_path, monkeypatch, dtype, status):
    real = Benchmark._differences

    def differing(self, prompt_ids, answers, settings):
        changed = {name: ids[:3] if name == "lookup" else ids for name, ids in answers.items()}
        return real(self, prompt_ids, changed, settings)

    monkeypatch.setattr(Benchmark, "_differences", differing)
    run(folders, tmp_path, "--dtype", dtype, methods="lookup", status=status)
    (lookup,) = json.loads((tmp_path / "results.json").read_text())["temperatures"][0]["methods"][1:]
    assert lookup["identical"]["same"] == 0 and len(lookup["identical"]["margins"]) == 4


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--temperature", "0", "-1"], "the temperatures are [0.0, -1.0]; give different ones of 0 (greedy) or more."),
        (["--temperature", "1", "1"], "give different ones"),
        (["--repeats", "0"], "--repeats is 0; give 1 or more."),
        (["--limit", "0"], "--limit is 0; give 1 or more."),
        (["--suite", "mt"], "there is no suite 'mt'"),
        (["--suite", "gsm8k"], "no package carries GSM8K"),
        (["--plan", "vanilla=4,1"], "a plan is given to 'vanilla'"),
    ],
)
def test_bad_options_end_in_one_sentence(folders, tmp_path, capsys, options, sentence):
    run(folders, tmp_path / "out", *options, methods="lookup", status=2)
    assert sentence in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_an_interrupt_says_what_stays(folders, tmp_path, monkeypatch, capsys):
    def interrupted(self, unit, number=0):
        raise KeyboardInterrupt

    monkeypatch.setattr(Benchmark, "run", interrupted)
    run(folders, tmp_path, status=130)
    assert f"interrupted; what is measured stays in {tmp_path}, and the same command" in capsys.readouterr().err


def test_nothing_to_ask_is_refused(tmp_path, capsys):
    assert cli.main(["bench", "--output", str(tmp_path)]) == 2
    assert "there is nothing to ask; name a suite with --suite" in capsys.readouterr().err


def test_options_are_parsed():
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    options = [
        "--methods",
        "a, b,,c",
        "d",
        "--suite",
        "humaneval,mtbench",
        "--plan",
        "a=8,1",
        "b=4,2,3",
        "--plan",
        "c=1,1",
    ]
    args = parser.parse_args([*options, "--drafter", "a=x", "b=y", "--output", "out"])
    assert args.methods == ["a", "b", "c", "d"] and args.suite == ["humaneval", "mtbench"]
    assert dict(args.plan) == {"a": DraftingPlan(8, 1), "b": DraftingPlan(4, 2, 3), "c": DraftingPlan(1, 1)}
    assert args.drafter == [("a", "x"), ("b", "y")]
    assert parser.parse_args(["--output", "out"]).plan == []
    again = ["--methods", "a,b", "--suite", "mtbench", "--temperature", "0", "--output", "out"]
    again = parser.parse_args([*again, "--methods", "c", "--suite", "gsm8k", "humaneval", "--temperature", "1"])
    assert again.methods == ["a", "b", "c"] and again.suite == ["mtbench", "gsm8k", "humaneval"]
    assert again.temperature == [0.0, 1.0]
    usual = parser.parse_args(["--output", "out"])
    assert usual.methods[0] == "vanilla" and (usual.suite, usual.temperature) == ([], [0.0])
    assert bench.named("a=b=c") == ("a", "b=c")
    assert bench.named_plan("specblock+lookup=8,2,0") == ("specblock+lookup", DraftingPlan(8, 2))
    assert bench.plan_of("8,2") == DraftingPlan(8, 2) and bench.plan_of("8,2,4") == DraftingPlan(8, 2, 4)


@pytest.mark.parametrize("text", ["8,1", "a=8", "a=8,1,2,3", "a=8,0", "a=x,1", "=8,1"])
def test_a_plan_that_is_none_is_refused(text, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--plan", text, "--output", str(tmp_path)])
    assert "is not" in capsys.readouterr().err


@pytest.mark.real
def test_the_default_target_and_drafter_side_by_side(tmp_path, capsys):
    options = ["--methods", "prompt_lookup,specblock,specblock+lookup", "--suite", "humaneval,mtbench", "--limit", "1"]
    options += ["--plan", "specblock=8,1", "specblock+lookup=8,2,4", "--max-new-tokens", "12"]
    assert cli.main(["bench", *options, "--repeats", "1", "--no-plots", "--output", str(tmp_path)]) == 0
    (figures,) = json.loads((tmp_path / "results.json").read_text())["temperatures"]
    _, helper, alone, joined = figures["methods"]
    assert all(method["identical"] == {"same": 3, "of": 3, "margins": []} for method in (helper, alone, joined))
    assert 1 < alone["mean"]["tau"] <= 5 and 1 < joined["mean"]["tau"] <= 9
    # From the second round on: 4 slots for every pair that the round before has emitted (5 at most), and for starts.
    assert 4 <= alone["round"]["rows"] <= 20 and alone["round"]["rows"] < joined["round"]["rows"] <= 52
