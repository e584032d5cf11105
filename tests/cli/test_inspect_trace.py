# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""`specblock inspect --trace`: trees as text and pictures."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
import torch
from conftest import tiny_target
from models_for_tests import save_models
from training_for_tests import char_tokenizer, tiny_drafter
from transformers import AutoModelForCausalLM, AutoTokenizer

from specblock_hf import cli
from specblock_hf.cli import inspect_trace
from specblock_hf.evaluation.trace_page import trace_page


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


def test_the_rounds_of_an_answer_are_a_page(folders, capsys, tmp_path):
    page = tmp_path / "new" / "tree.html"
    assert trace(folders, "--plan", "6,1", "--html", str(page)) == 0
    assert capsys.readouterr().out.endswith(f"written: {page}\n")
    html = page.read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=|https?://(?!www\.w3\.org/2000/svg)", html)  # it needs no other file
    (line,) = (line for line in html.splitlines() if line.startswith("const data = "))
    data = json.loads(line.removeprefix("const data = ").removesuffix(";"))
    assert data["title"].startswith("SpecBlockDrafter, ")
    emitted = [*data["first"], *(token for one in data["rounds"] for token in one["emitted"])]
    tokenizer = AutoTokenizer.from_pretrained(folders["target"])
    ids = torch.tensor([tokenizer.encode("hello")])
    target = AutoModelForCausalLM.from_pretrained(folders["target"])
    answer = target.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    assert emitted == [tokenizer.decode([token]) for token in answer.tolist()]
    for one in data["rounds"]:
        kept = [node for node in one["nodes"] if node["kept"]]
        assert len(kept) == len(one["emitted"]) and [node["text"] for node in kept[1:]] == one["emitted"][:-1]
        assert len(one["nodes"]) <= 7 and len(one["milliseconds"]) == 3 and min(one["milliseconds"]) > 0
        assert [node["parent"] for node in kept] == [None, *(one["nodes"].index(node) for node in kept[:-1])]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
def test_a_browser_shows_the_round_that_the_address_names(folders, tmp_path):
    page = tmp_path / "tree.html"
    assert trace(folders, "--plan", "6,1", "--html", str(page)) == 0
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"{page.as_uri()}#2"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert re.search(r"round 2 of \d+: 6 drafted, \d kept, \d emitted", dom)
    assert re.search(r'id="costs">.*draft \d+\.\d ms.*verify \d+\.\d ms.*rest \d+\.\d ms', dom)
    assert len(re.findall(r'<g class="node">', dom)) == 7 and len(re.findall(r"<path ", dom)) == 6


def test_no_text_ends_the_script_of_a_page(monkeypatch):
    target, drafter, tokenizer = tiny_target("llama"), tiny_drafter(), char_tokenizer()
    monkeypatch.setattr(tokenizer, "decode", lambda *args, **kwargs: "</script>")
    page = trace_page(target, tokenizer, drafter, torch.tensor([[2, 3]]), "</script>", max_new_tokens=4)
    assert page.count("</script>") == 1


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


@pytest.mark.parametrize("options", [["--plan", "6,1"], ["--lookup"], ["--html"], ["--against"]])
def test_options_of_a_trace_ask_for_one(folders, capsys, tmp_path, options):
    values = {"--html": [str(tmp_path / "tree.html")], "--against": [folders["eagle3"]]}
    command = ["inspect", folders["specblock"], "--target", folders["target"], *options]
    assert cli.main([*command, *values.get(options[0], [])]) == 0
    assert capsys.readouterr().out.startswith("SpecBlockDrafter")
    assert (tmp_path / "tree.html").exists() == (options == ["--html"])


def test_pictures_may_be_named_one_after_the_other(folders, tmp_path):
    pytest.importorskip("matplotlib")
    assert trace(folders, "--picture", str(tmp_path / "a.svg"), "--picture", str(tmp_path / "b.svg")) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a.svg", "b.svg"}


def test_a_target_that_cannot_think_is_not_told_to(folders, capsys):
    assert trace(folders, "--no-thinking") == 2
    assert "has no enable_thinking to set; leave --thinking out." in capsys.readouterr().err


def test_a_target_is_told_not_to_think(folders, monkeypatch):
    asked = []

    def encode(tokenizer, prompt, device):
        asked.append(tokenizer.chat_template)
        return torch.tensor([[2, 3]])

    def load_target(name, dtype):
        tokenizer = char_tokenizer()
        tokenizer.chat_template += "{% if enable_thinking is defined and not enable_thinking %}n{% endif %}"
        return tiny_target("llama"), tokenizer

    monkeypatch.setattr(inspect_trace, "encode", encode)
    monkeypatch.setattr(inspect_trace, "load_target", load_target)
    assert trace(folders, "--no-thinking") == 0
    assert "set enable_thinking = false" in asked[0]


def test_without_trace_it_still_describes_the_drafter(folders, capsys):
    assert cli.main(["inspect", folders["specblock"]]) == 0
    assert capsys.readouterr().out.startswith("class: SpecBlockDrafter\n")
