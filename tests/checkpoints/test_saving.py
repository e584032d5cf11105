# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Saving is whole or nothing: with a disk that fills up in the middle, everything is as it was."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from block_drafters_for_tests import block_drafter
from safetensors import SafetensorError
from test_loading import assert_same, small_drafter

from specblock_hf import AutoDrafter
from specblock_hf.checkpoints.saving import save_file_whole, save_folder_whole, save_text_whole
from specblock_hf.drafters.layouts import write_checkpoint


FULL = (OSError, RuntimeError, SafetensorError)
"""What the libraries that write raise where there is no room."""


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """A disk on which no file can grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def halved(drafter: torch.nn.Module) -> torch.nn.Module:
    """The drafter with other weights."""
    with torch.no_grad():
        for weight in drafter.parameters():
            weight.mul_(0.5)
    return drafter


WRITERS = {
    "ours": (small_drafter, lambda drafter, folder: drafter.save_pretrained(folder)),
    "ours in shards": (small_drafter, lambda drafter, folder: drafter.save_pretrained(folder, max_shard_size="10KB")),
    "specblock": (small_drafter, lambda drafter, folder: write_checkpoint(drafter, folder, "specblock")),
    "speculators": (
        lambda: small_drafter("eagle3"),
        lambda drafter, folder: write_checkpoint(drafter, folder, "speculators"),
    ),
    "dflash": (block_drafter, lambda drafter, folder: write_checkpoint(drafter, folder, "dflash")),
}


@pytest.mark.parametrize("room", [0, 1000, 5000])
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_good_drafter(name, room, tmp_path):
    make, write = WRITERS[name]
    write(make(), tmp_path / "drafter")
    (tmp_path / "drafter" / "mine.txt").write_text("of somebody else")
    before = contents(tmp_path)
    with pytest.raises(FULL), room_for(room):
        write(halved(make()), tmp_path / "drafter")
    assert contents(tmp_path) == before
    with pytest.raises(FULL), room_for(room):
        write(make(), tmp_path / "new")
    assert contents(tmp_path) == before and not (tmp_path / "new").exists()
    write(halved(make()), tmp_path / "drafter")
    assert_same(AutoDrafter.from_pretrained(tmp_path / "drafter"), halved(make()))
    assert (tmp_path / "drafter" / "mine.txt").read_text() == "of somebody else"


@pytest.mark.parametrize("sizes", [("5GB", "10KB"), ("10KB", "5GB"), ("10KB", "20KB")])
def test_no_weights_of_before_are_left_to_be_loaded(sizes, tmp_path):
    for size, drafter in zip(sizes, (small_drafter(), halved(small_drafter())), strict=True):
        drafter.save_pretrained(tmp_path, max_shard_size=size)
        fresh = tmp_path / "fresh"
        drafter.save_pretrained(fresh, max_shard_size=size)
        weights = {path.name for path in tmp_path.glob("model*")}
        assert weights == {path.name for path in fresh.glob("model*")}
        assert_same(AutoDrafter.from_pretrained(tmp_path), drafter)


def test_a_card_of_its_own_is_kept(tmp_path):
    small_drafter().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    small_drafter().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "drafter").write_text("mine")
    with pytest.raises(OSError, match="drafter"):
        small_drafter().save_pretrained(tmp_path / "drafter")
    assert (tmp_path / "drafter").read_text() == "mine"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_file_is_replaced_or_left(error, tmp_path):
    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise error

    save_text_whole(tmp_path / "file", "good")
    with pytest.raises(error):
        save_file_whole(tmp_path / "file", fail)
    assert contents(tmp_path) == {"file": b"good"}
    save_text_whole(tmp_path / "file", "better")
    assert contents(tmp_path) == {"file": b"better"}


def test_what_a_kill_has_left_is_not_taken_over(tmp_path):
    for torn in (tmp_path / "new.partial", tmp_path / "old" / ".partial"):
        torn.mkdir(parents=True)
        (torn / "torn").write_text("half")
    for name in ("new", "old"):
        with save_folder_whole(tmp_path / name) as folder:
            (folder / "deep").mkdir()
            (folder / "deep" / "file").write_text("whole")
    assert contents(tmp_path) == {"new/deep/file": b"whole", "old/deep/file": b"whole"}
