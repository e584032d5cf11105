# Copyright 2026 The specblock_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""`specblock regenerate`: rows that training reads, prompts left out, runs that go on to the row."""

from __future__ import annotations

import json
import random

import pytest
import torch
from conftest import tiny_target
from hypothesis import given
from hypothesis import strategies as st
from training_for_tests import ALPHABET, char_tokenizer

from specblock_hf import cli
from specblock_hf.evaluation.suites import humaneval
from specblock_hf.terminal import encode, load_target
from specblock_hf.training import regenerate as regeneration
from specblock_hf.training.answering import answer_batch
from specblock_hf.training.data import load_examples, read_rows, render_prompt
from specblock_hf.training.regenerate import AnswerFile, excluded_texts, normalised, read_prompts, stop_ids_of


@pytest.fixture
def folder(tmp_path):
    """A tiny target with its tokenizer, and 12 prompts of different lengths in two files."""
    char_tokenizer().save_pretrained(tmp_path / "target")
    tiny_target("llama").save_pretrained(tmp_path / "target")
    rng = random.Random(0)
    texts = ["".join(rng.choices(ALPHABET[2:26], k=length)) for length in range(3, 15)]
    write(tmp_path / "first.jsonl", [{"prompt": text, "source": "here"} for text in texts[:6]])
    write(tmp_path / "second.jsonl", [{"question": text} for text in texts[6:]])
    return tmp_path


def write(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(folder, *options: str) -> int:
    files = [str(folder / name) for name in ("first.jsonl", "second.jsonl")]
    fixed = ["--max-new-tokens", "9", "--batch-size", "4", "--dtype", "float32", "--device", "cpu"]
    paths = ["--target", str(folder / "target"), "--output", str(folder / "out"), "--prompts", *files]
    return cli.main(["regenerate", *paths, *fixed, *options])


def rows_of(folder) -> list[dict]:
    return list(read_rows(folder / "out"))


def test_rows_are_what_training_reads(folder):
    assert run(folder) == 0
    rows = rows_of(folder)
    target, tokenizer = tiny_target("llama"), char_tokenizer()
    given = [
        row.get("prompt", row.get("question")) for n in ("first", "second") for row in read_rows(folder / f"{n}.jsonl")
    ]
    assert sorted(row["prompt"] for row in rows) == sorted(given) and len(rows) == 12
    for row in rows:
        assert list(row) == ["prompt", "source", "answer", "answer_ids", "temperature"]
        assert row["source"] == ("here" if len(row["prompt"]) < 9 else "second") and row["temperature"] == 0.0
        ids = render_prompt(tokenizer, [{"role": "user", "content": row["prompt"]}])
        # `3` is the tokenizer's EOS.
        assert [row["answer_ids"]] == answer_batch(target, [ids], 9, {ALPHABET.index("3")})
        assert row["answer"] == tokenizer.decode(row["answer_ids"], skip_special_tokens=True)
    examples = load_examples(folder / "out", tokenizer)
    assert len(examples) == sum(len(row["answer_ids"]) >= 2 for row in rows) and all(e.greedy for e in examples)


def test_an_answer_that_ended_keeps_its_last_token(folder):
    """Whatever ends an answer by the generation configuration or the tokenizer is part of the answer."""
    target, tokenizer = tiny_target("llama"), char_tokenizer()
    assert run(folder) == 0
    end = rows_of(folder)[0]["answer_ids"][3]
    config = json.loads((folder / "target" / "generation_config.json").read_text())
    (folder / "target" / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [end]}))
    loaded, _ = load_target(str(folder / "target"), target.dtype)
    assert stop_ids_of(loaded, tokenizer) == {end, ALPHABET.index("3")}
    assert stop_ids_of(target, tokenizer) == {ALPHABET.index("3")}
    before = {row["prompt"]: row["answer_ids"] for row in rows_of(folder)}
    (folder / "out").rename(folder / "before")
    assert run(folder) == 0
    shorter = 0
    for row in rows_of(folder):
        whole = before[row["prompt"]]
        cut = whole.index(end) + 1 if end in whole else len(whole)
        assert row["answer_ids"] == whole[:cut]
        shorter += cut < len(whole)
    assert shorter > 0


@pytest.mark.parametrize("torn", [0, 1, 30])
def test_a_run_goes_on_to_the_row(folder, monkeypatch, torn):
    """Killed after two batches, in the middle of a line of the second or just before its end."""
    assert run(folder, "--temperature", "1.0") == 0
    whole = {row["prompt"]: row for row in rows_of(folder)}
    (folder / "out").rename(folder / "whole")
    appended = AnswerFile.append

    def interrupted(self, rows):
        appended(self, rows)
        if len(self.path.read_text().splitlines()) == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(AnswerFile, "append", interrupted)
    assert run(folder, "--temperature", "1.0") == 130
    monkeypatch.undo()
    path = folder / "out" / "answers-00000-of-00001.jsonl"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - torn])
    asked = []
    original = regeneration.answer_batch
    monkeypatch.setattr(
        regeneration, "answer_batch", lambda target, ids, *rest: asked.append(len(ids)) or original(target, ids, *rest)
    )
    assert run(folder, "--temperature", "1.0") == 0
    assert asked == [4] if torn == 0 else sorted(asked) == [1, 4]
    rows = rows_of(folder)
    assert sorted(row["prompt"] for row in rows) == sorted(whole) and len(rows) == 12
    kept = [row for row in rows if row == whole[row["prompt"]]]
    assert len(kept) >= 11  # the same draws as without a break, but for a row whose batch was torn
    if torn == 0:
        assert len(kept) == 12
    assert run(folder, "--temperature", "1.0") == 0 and rows_of(folder) == rows


def test_every_share_of_sampled_answers(folder):
    """Which prompts are sampled depends on the prompt alone; another temperature adds answers."""
    assert run(folder, "--temperature", "0.8", "--sampled-share", "0.5") == 0
    rows = rows_of(folder)
    sampled = {row["prompt"] for row in rows if row["temperature"] == 0.8}
    assert 0 < len(sampled) < 12 and {row["temperature"] for row in rows} == {0.0, 0.8}
    assert run(folder) == 0
    rows = rows_of(folder)
    assert len(rows) == 12 + len(sampled)
    assert {row["prompt"] for row in rows if row["temperature"] == 0.0} == {row["prompt"] for row in rows}
    (folder / "out").rename(folder / "before")
    assert run(folder, "--temperature", "0.8", "--sampled-share", "0.5", "--limit", "7") == 0
    again = {row["prompt"]: row["temperature"] for row in rows_of(folder)}
    assert len(again) == 7 and all((p in sampled) == (t == 0.8) for p, t in again.items())


def test_shards_share_the_prompts(folder):
    assert run(folder) == 0
    whole = sorted(json.dumps(row) for row in rows_of(folder))
    (folder / "out").rename(folder / "whole")
    for shard in ("1", "0"):
        assert run(folder, "--shards", "2", "--shard", shard) == 0
    assert sorted(p.name for p in (folder / "out").iterdir()) == [
        "answers-00000-of-00002.jsonl",
        "answers-00001-of-00002.jsonl",
    ]
    assert [len(p.read_text().splitlines()) for p in (folder / "out").iterdir()] == [6, 6]
    assert sorted(json.dumps(row) for row in rows_of(folder)) == whole
    assert run(folder) == 0 and sorted(json.dumps(row) for row in rows_of(folder)) == whole


def test_a_line_that_another_process_is_writing_is_left_alone(tmp_path):
    row = {"prompt": "a", "answer_ids": [1], "temperature": 0.0}
    AnswerFile(tmp_path, 1, 2).append([row])
    other = tmp_path / "answers-00001-of-00002.jsonl"
    other.write_text(other.read_text() + '{"prompt": "b", "ans')
    before = other.read_bytes()
    assert len(AnswerFile(tmp_path, 0, 2).answered()) == 1 and other.read_bytes() == before
    AnswerFile(tmp_path, 1, 2)
    assert other.read_text() == json.dumps(row) + "\n"


def test_evaluation_sets_are_left_out(folder, tmp_path, capsys):
    prompts = [row["prompt"] for row in read_rows(folder / "first.jsonl")]
    write(tmp_path / "eval.jsonl", [{"question": f"  {prompts[1].upper()}!"}, {"turns": ["x", prompts[4]]}])
    assert run(folder, "--exclude", str(tmp_path / "eval.jsonl"), "humaneval") == 0
    assert {row["prompt"] for row in rows_of(folder)} & set(prompts) == set(prompts) - {prompts[1], prompts[4]}
    assert len(rows_of(folder)) == 10
    assert "10 prompts, 0 of them answered already; 0 left out as repeated, 2 left out as part of an" in (
        "".join(capsys.readouterr())
    )


def test_a_copied_humaneval_function_is_recognised(tmp_path):
    text = humaneval()[3].texts[0]
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": text.replace("    ", "\t").upper()}]
    write(tmp_path / "prompts.jsonl", [{"prompt": messages}, {"prompt": "a"}])
    prompts, left_out = read_prompts(
        [tmp_path / "prompts.jsonl"], char_tokenizer(), excluded_texts(["humaneval"]), 999
    )
    assert [prompt.given for prompt in prompts] == ["a"]
    assert left_out == {"repeated": 0, "part of an evaluation set": 1, "too long": 0}


def test_repeated_and_long_prompts_are_left_out(tmp_path):
    write(tmp_path / "prompts.jsonl", [{"prompt": "abc"}, {"question": "abc"}, {"prompt": "a" * 50}])
    prompts, left_out = read_prompts([tmp_path / "prompts.jsonl"], char_tokenizer(), set(), 50)
    assert [prompt.given for prompt in prompts] == ["abc"]
    assert left_out == {"repeated": 1, "part of an evaluation set": 0, "too long": 1}


@given(st.text(), st.sampled_from(["  ", "!", "\n", "—", ""]))
def test_normalised_texts_ignore_case_spacing_and_punctuation(text, noise):
    assert normalised(f"{noise} {text}{noise}") == normalised(text) == normalised(normalised(text))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shards", "2", "--shard", "2"], "--shard is 2 of 2; number the shards from 0 to 1."),
        (["--temperature", "-1"], "--temperature is -1.0 and --sampled-share 1.0; give a temperature of 0 or more"),
        (["--sampled-share", "1.5"], "--temperature is 0.0 and --sampled-share 1.5; give a temperature of 0 or more"),
        (["--batch-size", "0"], "--max-new-tokens, --batch-size and --batch-tokens must be 1 or more."),
        (["--max-new-tokens", "255"], "no prompt is left to answer (0 repeated, 0 part of an evaluation set, 12 too"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(folder, capsys, options, message):
    assert run(folder, *options) == 2
    assert f"specblock regenerate: {message}" in capsys.readouterr().err


def test_a_row_without_a_prompt_is_refused(folder, capsys):
    write(folder / "first.jsonl", [{"text": "a", "id": 1}])
    assert run(folder) == 2
    assert "first.jsonl has only text, id; every row needs a prompt or a question" in capsys.readouterr().err


@pytest.mark.real
def test_the_default_target_answers(tmp_path):
    """In fp32 a batch of three prompts gets the answers that `generate()` gives each of them alone."""
    asked = ["Say hi.", "What is 2 + 2? Answer with the number only.", "Name a colour."]
    write(tmp_path / "prompts.jsonl", [{"prompt": text} for text in asked])
    status = cli.main(
        ["regenerate", "--prompts", str(tmp_path / "prompts.jsonl"), "--output", str(tmp_path / "out")]
        + ["--max-new-tokens", "20", "--device", "cpu", "--dtype", "float32", "--exclude", "humaneval", "mtbench"]
    )
    assert status == 0
    target, tokenizer = load_target(None, torch.float32)
    answers = {row["prompt"]: row["answer_ids"] for row in read_rows(tmp_path / "out")}
    assert set(answers) == set(asked)
    for text in asked:
        prompt = encode(tokenizer, text, target.device)
        mask = torch.ones_like(prompt)
        ids = target.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=20)
        assert answers[text] == ids[0, prompt.shape[1] :].tolist()
    assert any(answer[-1] == tokenizer.eos_token_id for answer in answers.values())
    assert len(load_examples(tmp_path / "out", tokenizer)) == 3
