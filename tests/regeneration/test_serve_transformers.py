# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""`specblock regenerate --server` against `transformers serve`, as it comes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from conftest import tiny_target
from test_server import EOS, tokenizer
from transformers.utils.import_utils import is_serve_available

from specblock_hf import cli
from specblock_hf.data.examples import read_rows


pytestmark = pytest.mark.skipif(not is_serve_available(), reason="needs transformers[serving]")
TEXTS = ["".join("abcdefgh"[: 1 + number % 8]) + "klmnop"[number // 8] for number in range(24)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    tokenizer().save_pretrained(folder / "target")
    target = tiny_target("llama")
    target.save_pretrained(folder / "target")
    # A server applies what the generation configuration says unless it is told otherwise.
    config = target.generation_config.to_dict() | {"eos_token_id": EOS, "repetition_penalty": 1.5, "top_k": 2}
    (folder / "target" / "generation_config.json").write_text(json.dumps(config))
    rows = [{"prompt": text} if number % 2 else {"question": text} for number, text in enumerate(TEXTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder / "target"), "--device"]
    command += ["cpu", "--host", "127.0.0.1", "--port", str(port)]
    with open(folder / "serve.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            for _ in range(600):
                try:
                    urlopen(f"http://127.0.0.1:{port}/health").close()
                    break
                except URLError:
                    assert process.poll() is None, (folder / "serve.log").read_text()
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()
            process.wait()


def run(folder, output: str, *options: str) -> list[dict]:
    paths = ["--target", str(folder / "target"), "--output", str(folder / output)]
    fixed = ["--prompts", str(folder / "prompts.jsonl"), "--max-new-tokens", "9"]
    assert cli.main(["regenerate", *paths, *fixed, *options]) == 0
    return sorted(read_rows(folder / output), key=lambda row: (row["prompt"], row["sample"]))


def test_a_server_gives_the_greedy_answers_of_the_target(folder, server, capsys):
    """Those with a token that a text leaves out, or a text that another token stands for, are counted."""
    here = run(folder, "here", "--device", "cpu", "--dtype", "float32")
    there = run(folder, "there", "--server", server, "--engine", "transformers")
    special = {0, 1, EOS}  # `?` stands for every unknown character, so no text tells it from them
    same = [row for row in here if not special & set(row["answer_ids"][:-1])]
    assert len(here) == len(there) == 24 and len(same) >= 8
    by_prompt = {row["prompt"]: row for row in there}
    assert [by_prompt[row["prompt"]] for row in same] == same
    assert "answers have another number of tokens than the server generated" in "".join(capsys.readouterr())


def test_a_server_samples_as_told(folder, server):
    options = ["--server", server, "--engine", "transformers", "--in-flight", "1", "--limit", "4"]
    options += ["--temperature", "1.0", "--answers", "3"]
    rows = run(folder, "sampled", *options)
    assert [row["sample"] for row in rows] == [0, 1, 2] * 4 and {row["temperature"] for row in rows} == {1.0}
    assert len({(row["prompt"], tuple(row["answer_ids"])) for row in rows}) == 12
    assert run(folder, "again", *options) == rows


def test_a_wrong_name_for_the_target_is_refused_in_a_sentence(folder, server, capsys):
    command = ["regenerate", "--target", str(folder / "target"), "--output", str(folder / "wrong")]
    command += ["--prompts", str(folder / "prompts.jsonl"), "--max-new-tokens", "9"]
    status = cli.main([*command, "--server", server, "--model", "another"])
    assert status == 2
    error = capsys.readouterr().err
    assert "refuses to answer as another (status 400: " in error and "check --server, --model" in error
