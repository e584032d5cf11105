# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The adaptation benchmark on a tiny target: turns, counts, resumption and the check of identity."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from conftest import tiny_target
from training_for_tests import char_tokenizer, tiny_drafter


PATH = Path(__file__).parents[2] / "benchmarks" / "adaptation.py"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the benchmark with short prompts; the rows and the report."""
    spec = importlib.util.spec_from_file_location("adaptation_benchmark", PATH)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    char_tokenizer().save_pretrained(tmp_path / "target")
    tiny_target("llama").save_pretrained(tmp_path / "target")
    tiny_drafter().save_pretrained(tmp_path / "drafter")
    monkeypatch.setattr(benchmark, "paragraphs", lambda task: [f"{number}ab" for number in range(20)])
    monkeypatch.setattr(benchmark, "TASKS", {"quiz": "q"})

    def call(*options) -> tuple[list[dict], dict]:
        output = tmp_path / "out" / "adaptation.json"
        output.parent.mkdir(exist_ok=True)
        fixed = ["--target", tmp_path / "target", "--drafter", tmp_path / "drafter", "--output", output]
        fixed += ["--state", tmp_path / "state", "--dtype", "float32", "--max-new-tokens", 8, "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["adaptation.py", *map(str, [*fixed, *options])])
        benchmark.main()
        lines = output.with_suffix(".jsonl")
        rows = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
        return rows, json.loads(output.read_text())

    return call


def test_policies_take_turns_and_a_second_run_goes_on(run, tmp_path):
    rows, _ = run("--queries", 8, "--turn", 8)
    assert [(row["policy"], row["query"]) for row in rows] == [
        (policy, query) for policy in ("never", "always", "bandit") for query in range(8)
    ]
    again, report = run("--queries", 16, "--turn", 8)
    assert again[: len(rows)] == rows
    # The next turn begins with another policy.
    assert [row["policy"] for row in again[len(rows) :: 8]] == ["always", "bandit", "never"]
    figures = report["policies"]
    assert all(f["queries"] == 16 and f["tokens"] == 16 * 8 for f in figures.values())
    assert figures["never"]["updates"] == {"head": 0, "full": 0}
    assert figures["always"]["updates"] == {"head": 0, "full": 2}
    for policy, mine in figures.items():
        chosen = [row for row in again if row["policy"] == policy]
        tau = 1 + sum(row["accepted"] for row in chosen) / sum(row["rounds"] for row in chosen)
        assert mine["tau"] == pytest.approx(tau, abs=1e-4)
    assert (tmp_path / "out" / "adaptation.png").stat().st_size > 0


def test_identity_is_counted(run, capsys):
    _, report = run("--identity", 9)
    assert (report["queries"], report["identical"], report["updates"]) == (9, 9, 1)
    assert "9 of 9 texts are those of plain generate()" in capsys.readouterr().out
