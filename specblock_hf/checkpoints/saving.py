# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Files and folders that are whole or as they were: written beside, brought to the disk, and only then moved into place.
Neither a full disk nor a kill in the middle costs what was there before.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def save_file_whole(path: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """
    Write a file.

    Args:
        path (`str` or `os.PathLike`): Where; replaced if it is there.
        write (`Callable[[Path], object]`): Writes the content into the file that it is given, which lies beside.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    try:
        write(partial)
        _to_disk(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_text_whole(path: str | os.PathLike, text: str) -> None:
    """As [`save_file_whole`], of a text."""
    save_file_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


@contextmanager
def save_folder_whole(
    folder: str | os.PathLike, obsolete: tuple[str, ...] = (), partial: Path | None = None
) -> Iterator[Path]:
    """
    Gives an empty folder to write into. When the block ends, that folder becomes a new one under the name by one
    rename; if there was one, what was written replaces its files of the same names and the others stay. If the block
    raises, nothing has happened.

    Args:
        folder (`str` or `os.PathLike`): Where; made with its parents if it is not there.
        obsolete (`tuple[str, ...]`, *optional*):
            Patterns of files that stand for the content before, and go unless they were written again.
        partial (`Path`, *optional*):
            Where to write a new folder, on the same disk; beside it by default. What a kill has left there goes.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    # An existing folder may be a disk of its own.
    written = (partial or folder.with_name(f"{folder.name}.partial")) if is_new else folder / ".partial"
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    try:
        yield written
        files = [path for path in sorted(written.rglob("*")) if path.is_file()]
        for path in files:
            _to_disk(path)
        if is_new:
            os.replace(written, folder)
        else:
            _move_in(written, files, folder, obsolete)
    finally:
        shutil.rmtree(written, ignore_errors=True)


def _move_in(written: Path, files: list[Path], folder: Path, obsolete: tuple[str, ...]) -> None:
    places = [folder / path.relative_to(written) for path in files]
    for path, place in zip(files, places, strict=True):
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)
    for old in {path for pattern in obsolete for path in folder.glob(pattern)} - set(places):
        old.unlink()


def _to_disk(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())
