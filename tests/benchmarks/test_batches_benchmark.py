# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The batch benchmark on tiny models: every size is measured and written, and figures follow from what was decoded."""

from __future__ import annotations

import json
import runpy
from functools import partial
from pathlib import Path

import pytest
from conftest import prompt_of, tiny_target
from models_for_tests import save_models, tiny_drafter

from specblock_hf import DraftingPlan, calibrate
from specblock_hf.calibration import trial
from specblock_hf.calibration.calibrate import Calibration
from specblock_hf.calibration.costs import CostCurves
from specblock_hf.calibration.trial import padded
from specblock_hf.cli.demo import PROMPTS


SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "batches.py"))


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    folders = save_models(tmp_path)
    texts = ["abcdefghijklm"[:length] for length in (4, 9, 2, 12)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    chosen = ["--target", folders["target"], "--drafter", folders["specblock"], "--device", "cpu"]
    chosen += ["--prompts", str(tmp_path / "prompts.jsonl"), "--limit", "4", "--max-new-tokens", "6", "--repeats", "2"]
    return [*chosen, "--output", str(tmp_path / "results" / "batches.json")]


def test_every_size_is_measured_with_the_given_plan(arguments, capsys):
    SCRIPT["main"]([*arguments, "--sizes", "1", "4", "--plan", "5", "1", "4"])
    report = json.loads(Path(arguments[-1]).read_text())
    assert list(report["sizes"]) == ["1", "4"] and report["drafter"] == "specblock"
    for summary in report["sizes"].values():
        assert summary["plan"]["tree_budget"] == 5 and summary["expected"] is None
        assert summary["identical"] == 4 and summary["tau"] >= 1 and summary["ratio"] > 0
    assert capsys.readouterr().out.count("4 of 4 answers identical") == 2


def test_a_size_is_calibrated_for_itself(arguments, monkeypatch):
    asked = []
    curves = CostCurves(((1, 1.0), (5, 2.0)), 0.1, (), 0.1, 1.0, "")

    def given(target, drafter, batch_size, prompts):
        asked.append((batch_size, [ids.shape[1] for ids in prompts]))
        plan = drafter.drafting_plan = DraftingPlan(0 if batch_size > 1 else 4, 1)
        return Calibration(curves, plan, 1.5, 0.05, ((DraftingPlan(4, 1), 1.5),))

    monkeypatch.setitem(SCRIPT["main"].__globals__, "calibrate", given)
    SCRIPT["main"]([*arguments, "--sizes", "1", "2", "--limit", "2"])
    sizes = json.loads(Path(arguments[-1]).read_text())["sizes"]
    # The first and the third of the four prompts are measured and the two others tried.
    assert asked == [(1, [9, 12]), (2, [9, 12])]
    assert [sizes[size]["plan"]["tree_budget"] for size in "12"] == [4, 0] and sizes["2"]["tau"] == 1
    assert sizes["1"]["expected"] == 1.5 and sizes["1"]["spread"] == 0.05 and sizes["1"]["curves"]["plain"] == 1.0
    (tried,) = sizes["1"]["tried"]
    assert tried["plan"]["tree_budget"] == 4 and tried["ratio"] == 1.5


def test_a_suite_that_is_used_up_is_tried_on_the_demos_prompts(arguments, monkeypatch):
    args = SCRIPT["parse"]([*arguments, "--sizes", "4"])
    measured, others = SCRIPT["chosen_texts"](args)
    demo = [text for _, text in PROMPTS]
    assert [len(text) for text in measured] == [4, 9, 2, 12] and others == demo[:4]
    args.limit = 3
    measured, others = SCRIPT["chosen_texts"](args)
    assert len(measured) == 3 and others[1:] == demo[:2] and others[0] not in measured
    monkeypatch.setattr(trial, "TRIAL_TOKENS", 4)
    monkeypatch.setitem(SCRIPT["main"].__globals__, "calibrate", partial(calibrate, context=16, repeats=1))
    SCRIPT["main"]([*arguments, "--sizes", "4"])
    summary = json.loads(Path(arguments[-1]).read_text())["sizes"]["4"]
    assert summary["identical"] == 4 and [tried["plan"]["num_forwards"] for tried in summary["tried"]] == [1, 2]


def test_unfilled_batches_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        SCRIPT["main"]([*arguments, "--sizes", "3"])
    assert "--limit 4 leaves a batch of [3] unfilled" in capsys.readouterr().err


def test_the_sides_take_turns_and_medians_count(monkeypatch):
    target, drafter = tiny_target("llama"), tiny_drafter()
    drafter.drafting_plan = DraftingPlan(4, 1)
    order = []
    times = {False: iter([3.0, 1.0, 2.0]), True: iter([1.0, 5.0, 4.0])}

    def timed(target, batch, options):
        drafted = "assistant_model" in options
        order.append(drafted)
        output = target.generate(**batch, **options)
        return next(times[drafted]), output[:, batch["input_ids"].shape[1] :]

    monkeypatch.setitem(SCRIPT["compare"].__globals__, "timed", timed)
    batch = padded([prompt_of(4), prompt_of(7, 1)], 0)
    row = SCRIPT["compare"](target, drafter, batch, {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}, 3)
    assert order == [False, True, True, False, False, True]
    assert row["seconds"] == {"plain": 2.0, "drafted": 4.0} and row["identical"] == 2
    assert row["tokens"] == {"plain": 10, "drafted": 10}
    summary = SCRIPT["summarise"]([row, row | {"seconds": {"plain": 4.0, "drafted": 1.0}}])
    assert summary["tokens_per_second"] == {"plain": 20 / 6, "drafted": 4.0} and summary["ratio"] == pytest.approx(1.2)
