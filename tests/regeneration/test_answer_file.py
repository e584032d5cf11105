# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import threading
import time

import pytest
from filelock import FileLock
from test_saving import room_for

from specblock_hf.data.examples import ANSWERED_BY, answered_by, as_messages, prompt_key, read_rows
from specblock_hf.regeneration import answer_file
from specblock_hf.regeneration.answer_file import AnswerFile


def row(prompt, temperature: float = 0.0, **more) -> dict:
    return {"prompt": prompt, "answer_ids": [1], "temperature": temperature, **more}


def name(prompt, temperature: float = 0.0, sample: int = 0) -> tuple:
    return prompt_key(as_messages(prompt)), temperature, sample


def test_answers_of_all_processes_count(tmp_path):
    first, second = AnswerFile(tmp_path / "out", 0, 2), AnswerFile(tmp_path / "out", 1, 2)
    first.append([row("a"), row("a", 1.0), row("a", 1.0, sample=1)])
    second.append([row([{"role": "user", "content": "b"}])])
    expected = {name("a"), name("a", 1.0), name("a", 1.0, 1), name("b")}
    assert first.answered() == second.answered() == AnswerFile(tmp_path / "out").answered() == expected


WHOSE = {"target": "org/a", "chat_template": "0123", "thinking": None, "max_new_tokens": 9}


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (
            {"target": "org/b"},
            r"holds answers with target = 'org/a' and this run's have 'org/b', but a drafter learns",
        ),
        ({"chat_template": "4567"}, r"chat_template = '0123' and this run's have '4567'"),
        ({"thinking": False}, r"thinking = None and this run's have False"),
        ({"max_new_tokens": 10}, r"max_new_tokens = 9 and this run's have 10, .*; give another --output, or the same"),
    ],
)
def test_a_folder_holds_answers_of_one_kind(tmp_path, other, sentence):
    file = AnswerFile(tmp_path)
    file.claim(WHOSE)
    file.append([row("a")])
    file.claim(WHOSE)
    for process, processes in ((0, 1), (1, 2)):
        file.close()
        file = AnswerFile(tmp_path, process, processes)
        with pytest.raises(ValueError, match=sentence):
            file.claim(WHOSE | other)
    assert answered_by(tmp_path) == WHOSE and list(read_rows(tmp_path)) == [row("a")]


def test_a_folder_without_answers_or_of_an_older_release_becomes_whose_it_is(tmp_path):
    file = AnswerFile(tmp_path)
    file.claim(WHOSE)
    file.claim(WHOSE | {"max_new_tokens": 10})
    assert answered_by(tmp_path)["max_new_tokens"] == 10
    (tmp_path / ANSWERED_BY).unlink()
    file.append([row("a")])
    assert answered_by(tmp_path) == {} and file.answered() == {name("a")}
    file.claim(WHOSE)
    assert answered_by(tmp_path) == WHOSE and file.answered() == {name("a")}


@pytest.mark.parametrize("torn", ['{"prompt": "b", "ans', '{"prompt": "é'.encode()[:-1], ""])
@pytest.mark.parametrize("processes", [2, 1, 3])
def test_a_torn_line_is_cut_off_by_whoever_comes_next(tmp_path, torn, processes):
    """Also by a run of another number of processes, or it would stay and no trainer could read the folder."""
    killed = AnswerFile(tmp_path, 1, 2)
    killed.append([row("a")])
    killed.close()
    with open(killed.path, "ab") as file:
        file.write(torn if isinstance(torn, bytes) else torn.encode())
    AnswerFile(tmp_path, 0, processes)
    assert killed.path.read_text() == json.dumps(row("a")) + "\n"
    assert list(read_rows(tmp_path)) == [row("a")]


def test_a_line_that_another_process_is_writing_is_left_alone(tmp_path):
    other = AnswerFile(tmp_path, 1, 2)
    other.append([row("a")])
    with open(other.path, "a") as file:
        file.write('{"prompt": "b", "ans')
    before = other.path.read_bytes()
    assert AnswerFile(tmp_path, 0, 2).answered() == {name("a")} and other.path.read_bytes() == before
    other.close()
    assert AnswerFile(tmp_path, 1, 2).path.read_text() == json.dumps(row("a")) + "\n"


def test_a_full_disk_costs_no_answer_that_is_there(tmp_path):
    file = AnswerFile(tmp_path)
    file.append([row("a"), row("b")])
    with pytest.raises(OSError), room_for(file.path.stat().st_size + 20):
        file.append([row("c")])
    assert file.answered() == {name("a"), name("b")}
    file.close()
    again = AnswerFile(tmp_path)
    again.append([row("c")])
    assert list(read_rows(tmp_path)) == [row("a"), row("b"), row("c")]


def test_a_process_that_looks_through_ones_file_is_waited_for(tmp_path):
    lock = FileLock(f"{AnswerFile(tmp_path).path}.lock")
    held = threading.Event()

    def look() -> None:
        with lock:
            held.set()
            time.sleep(0.2)

    looking = threading.Thread(target=look)
    looking.start()
    held.wait()
    AnswerFile(tmp_path)
    looking.join()


def test_two_processes_do_not_write_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(answer_file, "PATIENCE", 0.01)
    first = AnswerFile(tmp_path, 0, 1)
    with pytest.raises(ValueError, match="another process is writing .*answers-00000-of-00001.jsonl; wait until it"):
        AnswerFile(tmp_path, 0, 1)
    first.close()
    AnswerFile(tmp_path, 0, 1)
