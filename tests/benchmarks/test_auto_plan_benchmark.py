# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The measurement of the plan that finds itself: what is compared with what, and a run that goes on."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from models_for_tests import save_models


SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "auto_plan.py"))
SIDES = ["plain", "5 nodes, 1 forward(s)", "7 nodes, 1 forward(s)", "11 nodes, 2 forward(s)", "auto", "random"]


def rows(**speeds: list[float]) -> list[dict]:
    """Batches of one suite, by their speeds."""
    return [
        {
            "suite": "s",
            "repeat": 0,
            "batch": batch,
            "side": side,
            "tokens": speed,
            "seconds": 1.0,
            "text": batch < 3 or side,
        }
        for side, values in speeds.items()
        for batch, speed in enumerate(values)
    ]


def test_the_best_fixed_plan_is_chosen_on_other_batches_than_it_is_compared_on():
    table = rows(plain=[1] * 6, one=[9, 9, 2, 9, 2, 9], two=[1, 1, 3, 1, 3, 2], auto=[1, 1, 1, 2, 1, 4])
    assert SCRIPT["summarise"](table) == [
        "s: one / plain 6.667 (4.333 to 9.000, 6 batches)",
        "s: two / plain 1.833 (1.333 to 2.500, 6 batches)",
        "s: auto / plain 1.667 (1.000 to 2.500, 6 batches)",
        # After two calls to learn: batches 2 and 4 choose for 3 and 5, and these for 2 and 4.
        "s: auto / best fixed (two and one) 1.250 (0.500 to 2.000, 4 batches)",
        "s: the same where their texts are equal 0.500 (0.500 to 0.500, 1 batches)",
    ]


def test_every_repeat_begins_with_calls_to_learn_and_needs_no_plain_ones():
    first, second = rows(one=[1] * 4, auto=[1, 1, 2, 2]), rows(one=[1] * 4, auto=[9, 9, 3, 3])
    assert SCRIPT["summarise"](first + [row | {"repeat": 1} for row in second]) == [
        "s: auto / best fixed (one) 2.500 (2.000 to 3.000, 4 batches)",
        "s: the same where their texts are equal 2.500 (2.000 to 3.000, 2 batches)",
    ]


@pytest.mark.parametrize("suite", ["mtbench", "mtbench+humaneval"])
def test_all_sides_answer_all_prompts_once(suite, tmp_path, capsys):
    folders, output = save_models(tmp_path), tmp_path / "rows.jsonl"
    arguments = ["--measure", "--target", folders["target"], "--drafter", folders["specblock"], "--suites", suite]
    arguments += [
        "--prompts",
        "2",
        "--repeats",
        "2",
        "--tokens",
        "4",
        "--no-lookup",
        "--device",
        "cpu",
        "--output",
        str(output),
    ]
    SCRIPT["main"](arguments)
    answered = [json.loads(line) for line in output.read_text().splitlines()]
    parts = [f"{suite}, part {number}" for number in (1, 2)] if "+" in suite else [suite]
    assert {row["suite"] for row in answered} == set(parts)
    assert sorted((row["repeat"], row["batch"], row["side"]) for row in answered) == sorted(
        (repeat, batch, side) for repeat in range(2) for batch in range(2 * len(parts)) for side in SIDES
    )
    assert all(row["seconds"] > 0 and row["tokens"] <= 4 for row in answered)
    # A run that was broken off goes on where it was.
    output.write_text("".join(json.dumps(row) + "\n" for row in answered[:-3]))
    SCRIPT["main"](arguments)
    again = [json.loads(line) for line in output.read_text().splitlines()]
    assert again[:-3] == answered[:-3] and [row["side"] for row in again] == [row["side"] for row in answered]
    assert f"{parts[-1]}: auto / plain " in capsys.readouterr().out


def test_some_sides_alone(tmp_path, capsys):
    folders, output = save_models(tmp_path), tmp_path / "rows.jsonl"
    arguments = ["--measure", "--target", folders["target"], "--drafter", folders["specblock"], "--prompts", "1"]
    arguments += ["--suites", "mtbench", "--tokens", "4", "--no-lookup", "--device", "cpu", "--output", str(output)]
    SCRIPT["main"]([*arguments, "--sides", "plain", "auto"])
    assert [json.loads(line)["side"] for line in output.read_text().splitlines()] == ["plain", "auto"]
    assert "mtbench: auto / plain" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        SCRIPT["main"]([*arguments, "--sides", "3 nodes"])
    assert "invalid choice: '3 nodes'" in capsys.readouterr().err
