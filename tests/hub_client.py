# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
What `test_hub.py` lets a process of its own do, one whose `HF_ENDPOINT` is the test server: that variable and its like
are read only when `huggingface_hub` is imported.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from conftest import prompt_of, tiny_target
from huggingface_hub import constants, snapshot_download
from transformers import AutoModel

import specblock_hf
from specblock_hf import AutoDrafter, cli
from specblock_hf.drafters.find import find_drafters


NAPS: list[float] = []
"""Of this process: the pauses between the client's retries, which are cut short."""


class ClientError(Exception):
    """What went wrong in the other process: the class's name and the message."""


class Client:
    """
    A process with its own environment.

    Args:
        url (`str`): The server.
        home (`Path`): Where its caches go.
        **environment (`str`): Further variables.
    """

    def __init__(self, url: str, home: Path, **environment: str):
        # The server does not speak Xet, the protocol that replaces LFS where its client is installed.
        wanted = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        wanted |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment}
        before = dict(os.environ)
        os.environ.pop("HF_TOKEN", None)
        os.environ.update(wanted)
        try:
            self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_prepare)
            self._pool.submit(time.sleep, 0).result()
        finally:
            os.environ.clear()
            os.environ.update(before)

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        outcome, value = self._pool.submit(_outcome, function, args, kwargs).result()
        if outcome == "error":
            raise ClientError(value)
        return value

    def close(self) -> None:
        self._pool.shutdown()


def _prepare() -> None:
    torch.set_num_threads(1)
    # Small enough for a test's files to come in several pieces, which is what can be resumed.
    constants.DOWNLOAD_CHUNK_SIZE = 4096
    sleep = time.sleep

    def nap(seconds: float) -> None:
        NAPS.append(seconds)
        sleep(min(seconds, 0.01))

    time.sleep = nap


def _outcome(function: Callable, args: tuple, kwargs: dict) -> tuple[str, Any]:
    # As text, because not every exception survives the way between processes.
    try:
        return "value", function(*args, **kwargs)
    except Exception as error:
        return "error", f"{type(error).__name__}: {error}"


def naps() -> list[float]:
    return [seconds for seconds in NAPS if seconds]


def push(folder: Path, repo_id: str, **kwargs: Any) -> str:
    commit = AutoDrafter.from_pretrained(folder).push_to_hub(repo_id, token="hf_owner", **kwargs)
    return commit.pr_url or commit.oid


def push_with(folder: Path, repo_id: str, token: str) -> None:
    AutoDrafter.from_pretrained(folder).push_to_hub(repo_id, token=token)


def push_while_saving(folder: Path, repo_id: str, to: Path) -> None:
    AutoDrafter.from_pretrained(folder).save_pretrained(to, push_to_hub=True, repo_id=repo_id, token="hf_owner")


def pull(name: str, **kwargs: Any) -> dict[str, Any]:
    """Everything that a loaded drafter is."""
    drafter = AutoDrafter.from_pretrained(name, **kwargs)
    return {"class": type(drafter).__name__, "config": drafter.config.to_dict(), "weights": drafter.state_dict()}


def pull_own(name: str, **kwargs: Any) -> dict[str, torch.Tensor]:
    """By the class itself and by transformers' `AutoModel`."""
    weights = specblock_hf.SpecBlockDrafter.from_pretrained(name, **kwargs).state_dict()
    again = AutoModel.from_pretrained(name, **kwargs).state_dict()
    assert weights.keys() == again.keys() and all(torch.equal(weights[key], again[key]) for key in weights)
    return weights


def fetch_all(name: str, **kwargs: Any) -> None:
    """All files of a repository into the cache."""
    snapshot_download(name, **kwargs)


def generate(name: str, **options: Any) -> list[int]:
    drafter = AutoDrafter.from_pretrained(name, target=tiny_target("llama")).eval()
    output = tiny_target("llama").generate(
        prompt_of(6), max_new_tokens=16, do_sample=False, assistant_model=drafter, **options
    )
    assert drafter.last_statistics.rounds > 0
    return output[0].tolist()


def custom_generate(name: str, **options: Any) -> tuple[list[int], list[int], int]:
    """
    Decode by the repository's name with the hook taken out: the text, what a streamer got, and how many forwards of
    the target it took.
    """
    target, streamer, calls = tiny_target("llama"), _Keeper(), []
    handle = target.register_forward_pre_hook(lambda *_: calls.append(1))
    specblock_hf.uninstall()
    try:
        output = target.generate(
            prompt_of(6), custom_generate=name, trust_remote_code=True, streamer=streamer, max_new_tokens=16, **options
        )
    finally:
        specblock_hf.install()
        handle.remove()
    return output[0].tolist(), streamer.tokens, len(calls)


class _Keeper:
    def __init__(self):
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


def command(*arguments: str) -> int:
    os.environ["HF_TOKEN"] = "hf_owner"
    try:
        return cli.main(list(arguments))
    finally:
        del os.environ["HF_TOKEN"]


def search(target: str, **kwargs: Any) -> dict[str, Any]:
    """All that a search finds: by name, the facts of every candidate; what is best, or why nothing is; and notes."""
    findings = find_drafters(target, **kwargs)
    rows = {one.name: (one.trained_for, one.kind, one.layout, one.misfit, one.listed) for one in findings.candidates}
    try:
        best = findings.best().name
    except ValueError as error:
        best = str(error)
    return {"rows": rows, "best": best, "notes": findings.notes}


def find_and_generate(target: str, **options: Any) -> tuple[str, list[int]]:
    """Find the drafter of a model that is the tiny Llama, and draft with it: what was loaded, and the text."""
    drafter = AutoDrafter.find(target, **options).eval()
    output = tiny_target("llama").generate(prompt_of(6), max_new_tokens=16, do_sample=False, assistant_model=drafter)
    assert drafter.last_statistics.rounds > 0
    return drafter.config.name_or_path, output[0].tolist()


def spoken(*arguments: str) -> tuple[int, str]:
    """A command's exit status, and what it said."""
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        status = cli.main(list(arguments))
    return status, said.getvalue()
