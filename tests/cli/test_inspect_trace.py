# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""`specblock inspect --trace`: trees as text and pictures."""

from __future__ import annotations

import re

import pytest
from models_for_tests import save_models

from specblock_hf import cli


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


def trace(folders, *options):
    shared = ["--trace", "--target", folders["target"], "--prompt", "hello", "--max-new-tokens", "16"]
    return cli.main(["inspect", folders["specblock"], *shared, *options])


def test_the_tree_of_a_round_is_printed(folders, capsys):
    assert trace(folders, "--plan", "6,1", "--round", "2") == 0
    head, explained, *lines, emitted = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"SpecBlockDrafter, .*specblock: 6 drafted by 1 forward\(s\), \d accepted", head)
    assert "* = kept" in explained and emitted.startswith("emitted: '")
    assert len(lines) == 7 and sum(line.endswith("*") for line in lines) == 1 + int(head.split()[-2])


def test_two_drafters_stand_side_by_side(folders, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    pictures = [str(tmp_path / name) for name in ("t.svg", "t.png")]
    options = ["--against", folders["eagle3"], "--plan", "8,2,4", "--plan", "4,2,4", "--round", "3", "--lookup"]
    assert trace(folders, *options, "--picture", *pictures) == 0
    output = capsys.readouterr().out
    ours, theirs = output.split("\n\n")
    assert ours.startswith("SpecBlockDrafter + LookupDrafter, ") and " 8 drafted by " in ours
    assert theirs.startswith("Eagle3Drafter + LookupDrafter, ") and " 4 drafted by " in theirs
    root = [part.splitlines()[2].split("'")[1] for part in (ours, theirs)]
    assert root[0] == root[1]
    assert theirs.endswith(f"drawn: {pictures[0]}\ndrawn: {pictures[1]}\n")
    svg = (tmp_path / "t.svg").read_text()
    assert "SpecBlockDrafter" in svg and "Eagle3Drafter" in svg and "8 drafted" in svg and "4 drafted" in svg
    assert (tmp_path / "t.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--picture", "t.gif"], "t.gif is neither an SVG nor a PNG file"),
        (["--plan", "8,1", "--plan", "4,1"], "there are 2 plans for 1 drafter(s); give one for each"),
        (["--round", "99"], "so that there is no round 99"),
    ],
)
def test_bad_options_end_in_one_sentence(folders, capsys, options, sentence):
    assert trace(folders, *options) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_without_trace_it_still_describes_the_drafter(folders, capsys):
    assert cli.main(["inspect", folders["specblock"]]) == 0
    assert capsys.readouterr().out.startswith("class: SpecBlockDrafter\n")
