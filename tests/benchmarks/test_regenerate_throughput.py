# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from conftest import tiny_target
from training_for_tests import char_tokenizer


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "regenerate_throughput.py"


@pytest.fixture
def folder(tmp_path):
    char_tokenizer().save_pretrained(tmp_path / "target")
    tiny_target("llama").save_pretrained(tmp_path / "target")
    rows = [{"prompt": "abcdefghijklm"[:length]} for length in range(1, 13)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_both_sides_answer_every_prompt_of_every_round(folder, monkeypatch):
    arguments = ["--target", str(folder / "target"), "--prompts", str(folder / "prompts.jsonl"), "--rounds", "2"]
    arguments += ["--plain-prompts", "2", "--batch-prompts", "7", "--max-new-tokens", "6", "--batch-size", "4"]
    output = folder / "result.json"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments, "--dtype", "float32", "--output", str(output)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    report = json.loads(output.read_text())
    assert len(report["rounds"]) == 2 and report["ratio"] > 0 and report["ratio_of_processor_time"] > 0
    for row in report["rounds"]:
        assert 2 <= row["plain"]["tokens"] <= 12 and 7 <= row["regenerate"]["tokens"] <= 42


def test_the_summary_takes_medians():
    module = runpy.run_path(str(SCRIPT))

    def side(tokens: int, seconds: float, processor: float) -> dict:
        return {"tokens": tokens, "seconds": seconds, "processor_seconds": processor}

    rounds = [
        {"plain": side(10, 1.0, 1.0), "regenerate": side(100, 2.0, 1.0)},
        {"plain": side(10, 2.0, 1.0), "regenerate": side(100, 2.0, 2.0)},
        {"plain": side(10, 0.5, 0.5), "regenerate": side(100, 2.5, 2.5)},
    ]
    settings = type("", (), {"dtype": "d", "max_new_tokens": 1, "batch_size": 1, "batch_tokens": 1})
    report = module["summarise"](rounds, settings)
    assert report["ratio"] == 5.0 and report["ratio_of_processor_time"] == 5.0
    assert report["tokens_per_second"] == {"plain": 10.0, "regenerate": 50.0}
