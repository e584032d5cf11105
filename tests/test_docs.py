# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
What README, docs and notebook show works: every Python block is run, every `specblock` line is parsed, and the
README's table is the one in `benchmarks/results`.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import prompt_of, tiny_target
from training_for_tests import char_tokenizer, tiny_drafter
from verdicts_for_tests import FAULTS

from specblock_command import COMMANDS, command_line


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
STAND_INS = "target, tokenizer, drafter, inputs, requests, prompts"
"""Names that a page may use without having made them."""


@dataclass(frozen=True)
class Block:
    """Part of a page: its lines, and why it is not run if it is not."""

    text: str
    reason: str | None


def blocks(page: Path, kind: str) -> list[Block]:
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(match["text"], match["reason"]) for match in found if match["kind"] == kind]


def stand_ins() -> dict[str, object]:
    """A tiny random target and drafter, and texts for them."""
    inputs = {"input_ids": prompt_of(6), "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    values = (tiny_target("llama"), char_tokenizer(), tiny_drafter(), inputs, [inputs] * 2)
    return dict(zip(STAND_INS.split(", "), (*values, [prompt_of(6, seed) for seed in range(8)]), strict=True))


def run(page: Path, names: dict[str, object]) -> None:
    for block in blocks(page, "python"):
        if block.reason is None:
            exec(compile(block.text, str(page), "exec"), names)


WITH_PYTHON = [page for page in PAGES if any(block.reason is None for block in blocks(page, "python"))]


@pytest.mark.parametrize("page", WITH_PYTHON[1:], ids=lambda page: page.stem)
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with torch.compiler.set_stance("force_eager"):  # how kernels are made is not what a page is about
        run(page, stand_ins())


@pytest.mark.real
def test_the_readme_runs_as_it_is(tmp_path, monkeypatch, capsys):
    assert WITH_PYTHON[0].name == "README.md"
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    run(WITH_PYTHON[0], names)
    assert "def " in capsys.readouterr().out
    plain = names["target"].generate(**names["inputs"], max_new_tokens=64, do_sample=False)
    assert torch.equal(names["output"], plain)


@pytest.mark.real
def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in cells)  # they would name somebody's machine
    names: dict[str, object] = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file() and "tau " in capsys.readouterr().out


def commands(page: Path) -> list[str]:
    """The lines that begin with `specblock`; `...` stands for whatever the reader fills in."""
    lines = "".join(block.text for block in blocks(page, "bash")).replace("\\\n", "").splitlines()
    return [line for line in lines if line.startswith("specblock ") and "..." not in line]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.stem)
def test_commands_of_a_page_are_understood(page):
    parser, subcommands = command_line(COMMANDS, "0")
    for name, (module, _) in COMMANDS.items():
        import_module(module).add_arguments(subcommands[name])
    for line in commands(page):
        try:
            parser.parse_args(shlex.split(line, comments=True)[1:])
        except SystemExit as end:
            assert end.code == 0, line


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} names {target}"


SIDE_BY_SIDE = ROOT / "benchmarks" / "results" / "side-by-side-bf16" / "results.json"
ROWS = {
    "transformers' prompt lookup": "prompt_lookup",
    "look-ups as trees": "lookup",
    "SpecBlock, rank-guided": "specblock:rank_guided",
    "SpecBlock, best-first": "specblock:best_first",
    "SpecBlock, fixed tree + look-ups": "specblock:fixed+lookup",
    "SpecBlock, best-first + look-ups": "specblock:best_first+lookup",
    "SpecBlock, rank-guided + look-ups": "specblock:rank_guided+lookup",
}


def test_the_readme_s_figures_are_the_measured_ones():
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("**", "")
    (figures,) = json.loads(SIDE_BY_SIDE.read_text())["temperatures"]
    measured = {method["method"]: method for method in figures["methods"]}
    for words, name in ROWS.items():
        method, cost = measured[name], measured[name]["round"]
        cells = [f"{method['suites'][suite]['speedup']:.2f}" for suite in ("humaneval", "mtbench", "gsm8k")]
        cells += [f"{method['mean']['speedup']:.2f}", f"{method['mean']['tau']:.2f}"]
        cells += [" / ".join(f"{cost[f'{part}_ms']:.1f}" for part in ("draft", "verify", "host")) if cost else ""]
        assert f"| {words} | {' | '.join(cells)} |".replace("|  |", "| |") in text
    assert f"{measured['specblock:best_first+lookup']['mean']['speedup']:.2f} times" in text
    fuzz = json.loads((SIDE_BY_SIDE.parents[1] / "fuzz_generate.json").read_text())
    assert f"{fuzz['calls']:,}\nrandom calls" in text and not fuzz["outcomes"].keys() & set(FAULTS)
