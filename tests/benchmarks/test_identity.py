# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/identity.py`: what it counts, that it goes on where it stopped, and the shipped drafter."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import tiny_target
from training_for_tests import char_tokenizer, tiny_drafter

from specblock_hf.evaluation.divergence import Divergence


PATH = Path(__file__).parents[2] / "benchmarks" / "identity.py"


@pytest.fixture(scope="module")
def identity():
    spec = importlib.util.spec_from_file_location("identity", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(identity, tmp_path, monkeypatch):
    """Runs the benchmark on a tiny target with three short prompts a suite; returns status and report."""
    char_tokenizer().save_pretrained(tmp_path / "target")
    tiny_target("llama").save_pretrained(tmp_path / "target")
    tiny_drafter().save_pretrained(tmp_path / "drafter")
    monkeypatch.setattr(identity, "load_suite", lambda name, path: [f"{name}{'abc'[:n]}" for n in range(3)])

    def call(*options: str) -> tuple[int, dict]:
        output = tmp_path / "results" / "identity.json"
        models = ["--target", str(tmp_path / "target"), "--drafter", str(tmp_path / "drafter"), "--device", "cpu"]
        fixed = ["--max-new-tokens", "24", "--plan", "12", "2", "4", "--output", str(output)]
        return identity.main([*models, *fixed, *options]), json.loads(output.read_text())

    return call


def test_fp32_answers_are_identical(run, capsys):
    status, report = run("--dtype", "float32")
    assert status == 0
    assert [(row["suite"], row["number"]) for row in report["prompts"]] == [
        (suite, number) for suite in ("humaneval", "mtbench") for number in range(3)
    ]
    for row in report["prompts"]:
        assert row["identical"] and row["divergence"] is None
        # The prefill emits one token, the rounds the others.
        assert row["tokens"] - 1 == row["rounds"] + row["accepted"] and row["rounds"] > 0
    rounds, accepted = (sum(row[name] for row in report["prompts"]) for name in ("rounds", "accepted"))
    tau = 1 + accepted / rounds
    assert report["summary"] == {
        "float32": {
            "prompts": 6,
            "identical": 6,
            "tokens": rounds + accepted + 6,
            "divergence_rate": 0.0,
            "margins": [],
            "tau": tau,
        }
    }
    assert report["settings"]["drafter"] == "drafter" and "float32" in report["machines"]["float32"]
    assert capsys.readouterr().out.startswith(f"float32: 6 of 6 answers identical ({rounds + accepted + 6} tokens), ")


def test_a_difference_fails_in_fp32_only(run, identity, monkeypatch, capsys):
    differences = iter(
        [None, Divergence(4, 1, 2, 0.5), None, Divergence(2, None, 3, None), None, Divergence(9, 1, 2, 0.125)] * 2
    )
    monkeypatch.setattr(identity, "divergence_between", lambda *args, **kwargs: next(differences))
    status, report = run("--dtype", "bfloat16")
    assert status == 0
    summary = report["summary"]["bfloat16"]
    assert (summary["identical"], summary["divergence_rate"], summary["margins"]) == (3, 0.5, [0.125, 0.5])
    assert report["prompts"][1]["divergence"] == asdict(Divergence(4, 1, 2, 0.5))
    assert "divergence rate 50.0%" in capsys.readouterr().out
    status, report = run()
    assert status == 1 and report["summary"]["float32"]["identical"] == 3


def test_an_interrupted_run_goes_on(run, identity, monkeypatch):
    asked = []
    original = identity.compare

    def interrupted(*args):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(args[3])
        return original(*args)

    monkeypatch.setattr(identity, "compare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("--dtype", "float32", "--limit", "2")
    monkeypatch.setattr(identity, "compare", lambda *args: asked.append(args[3]) or original(*args))
    status, report = run("--dtype", "float32", "--limit", "2")
    assert status == 0 and asked == ["humaneval", "humanevala", "mtbench", "mtbencha"]
    assert len(report["prompts"]) == report["summary"]["float32"]["prompts"] == 4
    run("--dtype", "float32", "--limit", "2")
    assert len(asked) == 4


def test_results_of_other_settings_are_not_mixed(run):
    run("--dtype", "float32", "--limit", "1")
    with pytest.raises(SystemExit, match="remove it or give another --output"):
        run("--dtype", "float32", "--limit", "1", "--no-lookup")


@pytest.mark.real
def test_the_shipped_drafter(identity, tmp_path):
    output = tmp_path / "identity.json"
    assert identity.main(["--dtype", "float32", "--limit", "1", "--output", str(output), "--device", "cpu"]) == 0
    summary = json.loads(output.read_text())["summary"]["float32"]
    assert summary["identical"] == summary["prompts"] == 2
    assert summary["tau"] > 1.2
