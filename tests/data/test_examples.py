# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Reading answers: what is an answer's first token, which rows are refused, which side of the split a prompt is on."""

from __future__ import annotations

import gzip
import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from training_for_tests import ALPHABET, char_tokenizer

from specblock_hf.data.examples import (
    ANSWERED_BY,
    Example,
    load_examples,
    prompt_key,
    read_rows,
    render_prompt,
    split_examples,
)
from specblock_hf.data.template import PromptStyle


def ids_of(text: str) -> list[int]:
    return [ALPHABET.index(character) for character in text]


def row_of(prompt, answer: str = "yes3", temperature: float = 0.0) -> dict:
    return {"prompt": prompt, "answer_ids": ids_of(answer), "temperature": temperature}


def write(path, rows) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_rows_of_a_file(tmp_path, name):
    rows = [{"a": 1}, {"a": "ö\n"}]
    write(tmp_path / name, rows)
    assert list(read_rows(tmp_path / name)) == rows


def test_rows_of_a_folder_come_in_the_order_of_the_names(tmp_path):
    for name, value in (("b.jsonl", 2), ("a.jsonl.gz", 1), ("c.jsonl", 3)):
        write(tmp_path / name, [{"value": value}])
    (tmp_path / "notes.json").write_text("{}")
    assert [row["value"] for row in read_rows(tmp_path)] == [1, 2, 3]


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a":\n')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2 is not JSON .*; repair or remove that line"):
        list(read_rows(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("line", ['"the prompt"', '["prompt"]', "3", "null"])
def test_a_row_that_is_no_object_is_named(tmp_path, line):
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row_of('a'))}\n{line}\n")
    for read in (lambda path: list(read_rows(path)), lambda path: load_examples(path, char_tokenizer())):
        with pytest.raises(ValueError, match=r"rows.jsonl, line 2 is not a JSON object like .*; repair or remove"):
            read(tmp_path / "rows.jsonl")


def test_prompts_are_rendered_with_the_chat_template(tmp_path):
    """A string is one turn; the loss starts at the first token behind the template's prompt for an answer."""
    messages = [{"role": "user", "content": "abc"}, {"role": "user", "content": "d"}]
    write(tmp_path / "rows.jsonl", [row_of("ab"), row_of(messages, "ok", temperature=1.0)])
    first, second = load_examples(tmp_path / "rows.jsonl", char_tokenizer())
    assert (first.input_ids, first.answer_start, first.greedy) == (ids_of("ab0yes3"), 3, True)
    assert (second.input_ids, second.answer_start, second.greedy) == (ids_of("abcd0ok"), 5, False)
    assert second.key == prompt_key(messages)
    assert first.key == prompt_key([{"role": "user", "content": "ab"}])


def test_without_a_chat_template_the_bare_text_is_read():
    tokenizer = char_tokenizer()
    tokenizer.chat_template = None
    assert render_prompt(tokenizer, [{"role": "user", "content": "abc"}]) == ids_of("abc")


@pytest.mark.parametrize("thinking", [True, False, None])
@pytest.mark.parametrize("of_a_folder", [True, False])
def test_prompts_let_the_target_think_as_they_did_for_the_answers(tmp_path, thinking, of_a_folder):
    write(tmp_path / "rows.jsonl", [row_of("ab")])
    (tmp_path / ANSWERED_BY).write_text(json.dumps({"target": "a", "thinking": thinking}))
    tokenizer = char_tokenizer()
    tokenizer.chat_template += "{% if enable_thinking is defined and not enable_thinking %}n{% endif %}"
    (example,) = load_examples(tmp_path if of_a_folder else tmp_path / "rows.jsonl", tokenizer)
    assert example.input_ids == ids_of("ab0nyes3" if thinking is False else "ab0yes3")
    assert PromptStyle.of(tokenizer).thinking == (thinking is not False)
    tokenizer.chat_template = char_tokenizer().chat_template  # which has no switch
    assert load_examples(tmp_path, tokenizer)[0].input_ids == ids_of("ab0yes3")


def test_long_conversations_are_cut_and_empty_answers_left_out(tmp_path, caplog):
    rows = [row_of("abcdef"), row_of("abcde"), row_of("abcd"), row_of("a", "n"), row_of("b", "")]
    write(tmp_path / "rows.jsonl", rows)
    examples = load_examples(tmp_path / "rows.jsonl", char_tokenizer(), max_length=8)
    # Of the first, one token of the answer is left, which no drafter could predict.
    assert [e.input_ids for e in examples] == [ids_of("abcde0ye"), ids_of("abcd0yes")]
    sentence = f"2 conversations of {tmp_path / 'rows.jsonl'} were cut at --max-length 8, and 1 left out whose prompts"
    (record,) = caplog.records
    assert record.getMessage() == f"{sentence} fill it; raise it to keep them whole."
    assert record.levelno == logging.WARNING
    caplog.clear()
    assert len(load_examples(tmp_path / "rows.jsonl", char_tokenizer(), max_length=11)) == 3 and not caplog.records


def test_a_length_that_leaves_nothing_is_named(tmp_path):
    write(tmp_path / "rows.jsonl", [row_of("abcdef"), row_of("b", "")])
    with pytest.raises(ValueError, match=r"rows.jsonl has two tokens of its answer within --max-length 8; give more"):
        load_examples(tmp_path / "rows.jsonl", char_tokenizer(), max_length=8)


def test_a_file_without_answers_is_refused(tmp_path):
    write(tmp_path / "rows.jsonl", [row_of("a", "n")])
    with pytest.raises(ValueError, match="holds no answer of two tokens or more; regenerate it"):
        load_examples(tmp_path / "rows.jsonl", char_tokenizer())


def test_a_prompt_is_what_the_target_has_read_whatever_day_it_is(tmp_path):
    write(tmp_path / "a.jsonl", [row_of("hello") | {"prompt_ids": ids_of("monday_hello0")}, row_of("hello")])
    told, rendered = load_examples(tmp_path, char_tokenizer())
    assert (told.input_ids, told.answer_start) == (ids_of("monday_hello0yes3"), 13)
    assert (rendered.input_ids, rendered.answer_start) == (ids_of("hello0yes3"), 6)


def test_a_row_without_answer_ids_is_refused(tmp_path):
    write(tmp_path / "rows.jsonl", [row_of("a"), {"prompt": "b", "answer": "c"}])
    with pytest.raises(ValueError, match=r"row 2 of .* has only prompt, answer, and training needs .*answer_ids"):
        load_examples(tmp_path / "rows.jsonl", char_tokenizer())


@pytest.mark.parametrize("answer_start", [0, 3, 4, -1])
def test_a_mask_of_all_or_nothing_is_refused(answer_start):
    with pytest.raises(ValueError, match="the loss would count every token or none"):
        Example([1, 2, 3], answer_start, True, "00")


@given(st.lists(st.text(max_size=5), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_a_prompt_stays_on_one_side_whatever_the_order(prompts, rng):
    def keys(order):
        examples = [Example([1, 2, 3], 1, True, prompt_key([{"role": "user", "content": p}])) for p in order]
        return [sorted(e.key for e in side) for side in split_examples(examples, 0.3)]

    train, held_out = keys(prompts)
    shuffled = list(prompts)
    rng.shuffle(shuffled)
    assert keys(shuffled) == [train, held_out]
    assert not set(train) & set(held_out) and len(train) + len(held_out) == len(prompts)


def test_the_share_held_out():
    examples = [Example([1, 2, 3], 1, True, prompt_key([{"role": "user", "content": str(n)}])) for n in range(2000)]
    train, held_out = split_examples(examples, 0.1)
    assert 150 < len(held_out) < 250 and len(train) + len(held_out) == 2000
    assert split_examples(examples, 0.0) == (examples, [])
