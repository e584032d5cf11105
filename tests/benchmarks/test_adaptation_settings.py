# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Ways to train an update, replayed on recorded texts."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from conftest import tiny_target
from training_for_tests import char_tokenizer, tiny_drafter


PATH = Path(__file__).parents[2] / "benchmarks" / "adaptation_settings.py"


@pytest.fixture
def benchmark(monkeypatch):
    spec = importlib.util.spec_from_file_location("adaptation_settings", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "adaptation_settings", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(benchmark, tmp_path, monkeypatch):
    """Replays ways on short texts of tiny models; the report."""
    char_tokenizer().save_pretrained(tmp_path / "target")
    tiny_target("llama").save_pretrained(tmp_path / "target")
    tiny_drafter().save_pretrained(tmp_path / "drafter")
    monkeypatch.setattr(benchmark, "docstrings", lambda: ["the same"] * 20)
    monkeypatch.setattr(benchmark, "STRETCH", 4)
    monkeypatch.setattr(benchmark, "REQUEST", "q")

    def call(*ways, queries=9) -> dict:
        fixed = ["--target", tmp_path / "target", "--drafter", tmp_path / "drafter", "--state", tmp_path / "state"]
        fixed += [
            "--output",
            tmp_path / "out" / "ways.json",
            "--queries",
            queries,
            "--max-new-tokens",
            8,
            "--ways",
            *ways,
        ]
        monkeypatch.setattr(sys, "argv", ["adaptation_settings.py", *map(str, fixed)])
        benchmark.main()
        return json.loads((tmp_path / "out" / "ways.json").read_text())["ways"]

    return call


def test_a_way_says_after_which_queries_what_is_trained(benchmark):
    way = benchmark.Way(every=3, scopes=("full", "head"), most=3)
    assert [way.scope(query) for query in range(13)] == [
        *(None, None, "full"),
        *(None, None, "head"),
        *(None, None, "full"),
        *[None] * 4,
    ]


def test_ways_are_replayed_on_the_same_texts_and_a_second_run_goes_on(run, benchmark, monkeypatch):
    strong = {"learning_rate": 5e-3, "steps": 8, "warmup_steps": 1, "averaging": 0.5, "drift_weight": 0.0}
    twice = benchmark.Way(every=4, scopes=("full", "head"), settings=strong)
    monkeypatch.setattr(benchmark, "WAYS", {"never": benchmark.Way(most=0), "twice": twice})
    first = run("never")
    assert first["never"]["updates"] == {"full": 0, "head": 0}
    both = run("never", "twice")
    assert both["never"] == first["never"]
    assert both["twice"]["updates"] == {"full": 1, "head": 1}
    before, after = both["never"]["curve"], both["twice"]["curve"]
    assert len(before) == len(after) == 3 and len(set(before)) == 1
    # Drafted before it may be learned from: the first update comes after the fourth text.
    assert after[0] == before[0] and after[1] > before[1] and after[2] > before[2]


def test_results_of_another_setting_are_not_mixed_in(run, benchmark, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "WAYS", {"never": benchmark.Way(most=0)})
    run("never")
    with pytest.raises(SystemExit):
        run("never", queries=8)
    assert "holds results of another setting; give another --output" in capsys.readouterr().err


def test_the_texts_are_paragraphs_of_docstrings(benchmark):
    texts = benchmark.docstrings()
    assert len(texts) == len(set(texts)) >= 300
    assert all(35 <= len(text.split()) <= 90 for text in texts)
