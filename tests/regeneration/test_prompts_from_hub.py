# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Prompts from data sets on the Hub, through `datasets` as it comes and a server on this machine."""

from __future__ import annotations

import io
import json

import pytest
from conftest import tiny_target
from dataset_server import DatasetServer
from hub_client import Client, ClientError
from training_for_tests import char_tokenizer

from specblock_hf import cli
from specblock_hf.data.examples import read_rows
from specblock_hf.regeneration.prompts import rows_of


arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows: list[dict]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(rows), file)
    return file.getvalue()


ANSWER = {"role": "assistant", "content": "x"}
DIALOGUES = [{"messages": [{"role": "user", "content": text}, ANSWER]} for text in "abc"]
QUESTIONS = [{"question": "ab" * number, "answer": "x"} for number in range(1, 5)]
SPLITS = b"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: one.jsonl
  - split: train_sft
    path: all.jsonl
---
"""
SUBSETS = b"""---
configs:
- config_name: main
  data_files: main/*.parquet
- config_name: other
  data_files: other/*.parquet
---
"""


@pytest.fixture(scope="module")
def server():
    repos = {
        "owner/dialogues": {"README.md": SPLITS, "one.jsonl": lines(DIALOGUES[:1]), "all.jsonl": lines(DIALOGUES)},
        "owner/questions": {
            "README.md": SUBSETS,
            "main/train-00000-of-00001.parquet": table(QUESTIONS),
            "other/train-00000-of-00001.parquet": table(QUESTIONS[:1]),
        },
    }
    with DatasetServer(repos) as server:
        yield server


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    client = Client(server.url, tmp_path_factory.mktemp("hub"))
    yield client
    client.close()


def listed(source: str) -> list[dict]:
    return list(rows_of(source))


def test_rows_of_a_data_set(client):
    assert client(listed, "owner/dialogues") == DIALOGUES[:1]  # split `train` if it is not named
    assert client(listed, "owner/dialogues:train_sft") == DIALOGUES
    assert client(listed, "owner/questions/main:train") == QUESTIONS
    assert client(listed, "owner/questions/other") == QUESTIONS[:1]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("owner/none", r"could not load owner/none \(subset None, split train\) from the Hub: .*doesn't exist"),
        ("owner/questions/none", r"\(subset none, split train\) from the Hub: .*'none' not found.*main"),
        ("owner/dialogues:none", r"\(subset None, split none\) from the Hub: Unknown split"),
    ],
)
def test_what_the_hub_does_not_have_is_refused(client, source, message):
    with pytest.raises(ClientError, match=f"ValueError: .*{message}"):
        client(listed, source)


def test_answers_to_prompts_of_the_hub(client, tmp_path):
    char_tokenizer().save_pretrained(tmp_path / "target")
    tiny_target("llama").save_pretrained(tmp_path / "target")
    command = ["regenerate", "--target", str(tmp_path / "target"), "--output", str(tmp_path / "out")]
    command += ["--device", "cpu", "--max-new-tokens", "4", "--prompts"]
    assert client(cli.main, [*command, "owner/dialogues:train_sft", "owner/questions/main:train"]) == 0
    rows = list(read_rows(tmp_path / "out"))
    expected = [(messages["messages"][:1], "dialogues:train_sft") for messages in DIALOGUES]
    expected += [(row["question"], "main:train") for row in QUESTIONS]
    assert sorted(map(repr, ((row["prompt"], row["source"]) for row in rows))) == sorted(map(repr, expected))
