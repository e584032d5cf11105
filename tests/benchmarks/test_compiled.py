# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/compiled.py`: four ways to one text, of which two run compiled."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import torch
from models_for_tests import save_models


SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "compiled.py"))


def test_the_compiled_sides_are_compiled_and_say_the_same(tmp_path, monkeypatch):
    torch._dynamo.reset()
    folders = save_models(tmp_path)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("abcde", "fgh")))
    plain = []  # calls of plain generate() that were asked to compile themselves
    answer = SCRIPT["Sides"].answer

    def watched(self, side, ids):
        spent, text = answer(self, side, ids)
        plain.append((side, vars(self.target).get("_compiled_call") is not None))
        return spent, text

    monkeypatch.setattr(SCRIPT["Sides"], "answer", watched)
    output = tmp_path / "results" / "compiled.json"
    models = [
        "--target",
        folders["target"],
        "--drafter",
        folders["specblock"],
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    chosen = ["--prompts", str(tmp_path / "prompts.jsonl"), "--max-new-tokens", "6", "--repeats", "2"]
    SCRIPT["main"]([*models, *chosen, "--plan", "4", "1", "4", "--backend", "eager", "--output", str(output)])
    report = json.loads(output.read_text())
    assert len(report["rows"]) == 2 and list(report["speedup"]) == list(SCRIPT["SIDES"])
    for row in report["rows"]:
        assert all(row["identical"].values()) and row["compiled_rounds"] > 0
    assert ("plain, compiled", True) in plain
