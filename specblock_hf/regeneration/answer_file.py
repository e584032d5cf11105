# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The folder of answers: one file a process, to which whole rows are added, safe from a kill at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..checkpoints.saving import save_text_whole
from ..data.examples import ANSWERED_BY, answered_by, as_messages, prompt_key


PATIENCE = 5.0
"""Seconds in which another process of the same run has looked through this one's file."""


class AnswerFile:
    """
    The rows that one process writes: what is in the file when [`~AnswerFile.append`] returns is on the disk.

    Args:
        folder (`Path`): Shared by all processes; made if absent.
        process (`int`, *optional*, defaults to 0): Which process this is.
        processes (`int`, *optional*, defaults to 1): How many there are; another run may have other ones.

    Raises:
        ValueError: A process that still runs writes the same file.
    """

    def __init__(self, folder: Path, process: int = 0, processes: int = 1):
        self.folder = folder
        self.process = process
        self.path = folder / f"answers-{process:05d}-of-{processes:05d}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(f"{self.path}.lock")
        try:
            self._lock.acquire(timeout=PATIENCE)
        except Timeout as error:
            raise ValueError(
                f"another process is writing {self.path}; wait until it has ended, or name another folder."
            ) from error
        for path in folder.glob("answers-*.jsonl"):
            self._mend(path)

    def _mend(self, path: Path) -> None:
        """Cut off a line that a killed process has not written to its end; the prompt will be answered again."""
        if path == self.path:
            os.truncate(path, len(_whole_lines(path)))
            return
        try:
            with FileLock(f"{path}.lock", blocking=False):
                os.truncate(path, len(_whole_lines(path)))
        except Timeout:
            pass  # its process runs, and is just writing the rest

    def claim(self, whose: Mapping[str, Any]) -> None:
        """
        Have the folder say whose answers it holds, which those of older releases do not.

        Args:
            whose (mapping): What all of its answers share, ready for JSON.

        Raises:
            ValueError: It holds others.
        """
        begun = any(path.stat().st_size for path in self.folder.glob("answers-*.jsonl"))
        before = answered_by(self.folder) if begun else {}
        changed = [name for name in whose if before and before.get(name) != whose[name]]
        if changed:
            name = changed[0]
            raise ValueError(
                f"{self.folder} holds answers with {name} = {before.get(name)!r} and this run's have {whose[name]!r}, "
                "but a drafter learns from answers of one kind; give another --output, or the same options to go on."
            )
        if self.process == 0:
            save_text_whole(self.folder / ANSWERED_BY, json.dumps(dict(whose)) + "\n")

    def answered(self) -> set[tuple[str, float, int]]:
        """Key, temperature and number of every answer in the folder, those of other processes included."""
        rows = (
            json.loads(line)
            for path in sorted(self.folder.glob("answers-*.jsonl"))
            for line in _whole_lines(path).splitlines()
        )
        return {(prompt_key(as_messages(row["prompt"])), row["temperature"], row.get("sample", 0)) for row in rows}

    def append(self, rows: Iterable[dict]) -> None:
        """Add rows; when this returns they are on the disk."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Let other processes write the file."""
        self._lock.release()


def _whole_lines(path: Path) -> bytes:
    """The file up to the last line's end."""
    whole, end, _ = path.read_bytes().rpartition(b"\n")
    return whole + end
