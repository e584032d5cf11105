# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Recorded rounds are what was drafted at every token, and are played as calls would have gone."""

from __future__ import annotations

import gzip
import json
import runpy
from itertools import repeat
from pathlib import Path

import pytest
from models_for_tests import save_models

from specblock_hf import DraftingPlan
from specblock_hf.cli.models import encode, load_models
from specblock_hf.data.suites import load_prompts
from specblock_hf.planning.offers import Choice, Round, Way


SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "recorded_rounds.py"))


@pytest.mark.real
def test_a_fixed_plan_is_played_in_the_rounds_that_it_takes(tmp_path, capsys):
    file = tmp_path / "rounds.json.gz"
    asked = [
        "--no-lookup",
        "--suites",
        "mtbench",
        "--prompts",
        "1",
        "--tokens",
        "24",
        "--record",
        "--rounds",
        str(file),
    ]
    SCRIPT["main"](asked)
    assert capsys.readouterr().out == "mtbench: 1 texts\n"
    with gzip.open(file, "rt") as written:
        texts = json.load(written)["mtbench"]
    assert [len(text["rounds"]) for text in texts] == [texts[0]["tokens"] - 1]
    target, tokenizer, drafter = load_models(SCRIPT["parse"](asked))
    (prompt,) = SCRIPT["evenly"](load_prompts("mtbench", None), 1)
    ids = encode(tokenizer, prompt.prompt, target.device)
    machine = SCRIPT["Machine"](texts, SCRIPT["recorded_curves"]("float32"), SCRIPT["recorded_offer"](False))
    for plan in (DraftingPlan(23, 1), DraftingPlan(23, 2, 4), DraftingPlan(23, 2, 8)):
        drafter.drafting_plan = plan
        target.generate(ids, assistant_model=drafter, max_new_tokens=24, do_sample=False)
        rounds: list[Round] = []
        choice = Choice(plan.tree_budget, Way(plan.num_forwards, plan.max_starts))
        pilot = SCRIPT["Played"](repeat(choice))
        pilot.observe = rounds.append
        seconds = machine.answer(0, pilot)
        assert [int(seen.emitted) - 1 for seen in rounds] == drafter.last_statistics.accepted
        assert sum(drafter.last_statistics.accepted) > 4
        assert seconds == pytest.approx(sum(seen.draft + seen.rest for seen in rounds))


def test_the_same_record_gives_the_same_figures(tmp_path, capsys):
    folders, file = save_models(tmp_path), str(tmp_path / "rounds.json.gz")
    models = ["--target", folders["target"], "--drafter", folders["specblock"], "--device", "cpu"]
    asked = ["--suites", "mtbench", "--prompts", "3", "--tokens", "16", "--record", "--rounds", file]
    SCRIPT["main"]([*models, *asked])
    capsys.readouterr()
    for _ in range(2):
        SCRIPT["main"](["--rounds", file, "--seeds", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == lines[2:] and lines[0].startswith("mtbench, bfloat16: ") and " of " in lines[0]
