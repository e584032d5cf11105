# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/check_rounds.py`: a section that fails costs one line, and forced texts are the target's."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch


FOLDER = Path(__file__).parents[2] / "benchmarks"
TINY = ["--tiny", "--device", "cpu", "--dtype", "float32", "--context", "16", "--repeats", "1", "--rounds", "2"]


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("check_rounds")


def broken() -> None:
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize(
    ("sections", "status"),
    [
        ({"one": lambda: {"ms": 1.0}, "two": lambda: {"same_text": True}}, 0),
        ({"one": broken, "two": lambda: {"same_text": True}}, 1),
        ({"one": lambda: {"ms": 1.0}, "two": lambda: {"same_text": False}}, 1),
    ],
    ids=["good", "broken", "wrong text"],
)
def test_every_section_is_caught_and_written(sections, status, script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "sections", lambda check: sections)
    path = tmp_path / "check.json"
    assert script.main([*TINY, "--output", str(path)]) == status
    rows = json.loads(path.read_text())["sections"]
    assert list(rows) == ["one", "two"] and all(row["seconds"] >= 0 for row in rows.values())
    assert ("not permitted" in rows["one"].get("error", "")) == (sections["one"] is broken)


def test_no_section_begins_after_the_time(script, tmp_path):
    path = tmp_path / "check.json"
    assert script.main([*TINY, "--seconds", "-1", "--output", str(path)]) == 1
    rows = json.loads(path.read_text())["sections"]
    assert len(rows) == 2 * 6 + 1 and all(row["error"] == "out of time" for row in rows.values())


@torch.no_grad()
def test_a_loop_in_fixed_shapes_and_the_steps_of_a_round(script):
    check = script.Check(script.parse([*TINY, "--output", "-"]))
    for candidate in script.CANDIDATES:
        figures = check.loop(candidate, 1, True)
        assert figures["same_text"] and figures["tau"] == 4 and figures["captured"] == [0, 0, 2]
    steps = check.steps(1)
    assert [row["nodes"] for row in steps["verify"]] == [1, 16, 32, 64]
    assert steps["EAGLE-3"]["draft"]["operators"] > 100
