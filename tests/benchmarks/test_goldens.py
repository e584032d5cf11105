# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
`benchmarks/goldens.py`: what it compares, and that the networks still draft what the code of the projects drafted that
they come from, with the same weights and text.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_loading import rewrite

from specblock_hf import BlockDiffusionConfig, BlockDiffusionDrafter, Eagle3Config, Eagle3Drafter
from specblock_hf.drafters.known import layouts_tested
from specblock_hf.drafters.layouts import write_checkpoint


FOLDER = Path(__file__).parents[2] / "benchmarks"
ROWS = json.loads((FOLDER / "results" / "goldens.json").read_text())["cases"]
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True, "sliding_window": 6}
EAGLE_3_1 = {"fc_norm": True, "norm_output": True}
MARKOV = {"markov_rank": 6, "confidence_head": True, "confidence_head_with_markov": True}
DFLASH2 = {"conv_kernel_size": 3, "conv_group_size": 8, "selector_rank": 6, "selector_top_k": 7}
SHARED = WINDOWS | {"window_from_anchor": True}
EAGLES = {
    "speculators EAGLE-3, Llama": {},
    "speculators EAGLE-3, norms": {"norm_before_fc": True, "norm_before_residual": True},
    "speculators EAGLE-3, Qwen3": {"qk_norm": True, "norm_before_residual": True},
    "speculators EAGLE-3.1": EAGLE_3_1,
    "speculators EAGLE-3.1, Qwen3": {"qk_norm": True} | EAGLE_3_1,
    "DeepSpec EAGLE-3": {"qk_norm": True, "draft_vocab_size": 64},
}
BLOCKS = {
    "speculators DFlash": {},
    "speculators DFlash, draft vocabulary": {"restricted_vocabulary": True},
    "speculators DFlash, windows": SHARED,
    "speculators DFlash, windows both ways": SHARED | {"causal": False},
    "speculators DFlash, from the anchor": {"predicts_from_anchor": True},
    "speculators DFlash 2": DFLASH2 | SHARED | {"causal": False},
    "speculators DSpark": {"predicts_from_anchor": True} | MARKOV,
    "SpecForge DFlash": {},
    "SpecForge DFlash, windows": WINDOWS,
    "SpecForge DSpark, windows": WINDOWS | {"predicts_from_anchor": True} | MARKOV,
}
"""Fields of our configurations by what the recorded drafters are."""


@pytest.fixture(scope="module")
def goldens():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("goldens")


@pytest.fixture(scope="module")
def target(goldens, tmp_path_factory):
    return goldens.make_target(tmp_path_factory.mktemp("goldens") / "target")


def said() -> torch.LongTensor:
    """Of the module beside it."""
    return importlib.import_module("goldens_of_others").SAID


def eagle3_of(goldens, **fields) -> Eagle3Drafter:
    fields = {"draft_vocab_size": len(said())} | fields
    drafter = Eagle3Drafter(Eagle3Config(**goldens.SIZES, feature_layers=goldens.FEATURES, **fields)).eval()
    goldens.randomise(drafter)
    if drafter.config.draft_vocab_size < drafter.config.vocab_size:
        drafter.set_draft_vocabulary(said())
    return drafter


def block_of(goldens, **fields) -> BlockDiffusionDrafter:
    sizes = goldens.SIZES | {"num_hidden_layers": 2, "block_size": goldens.BLOCK, "feature_layers": goldens.FEATURES}
    drafter = BlockDiffusionDrafter(BlockDiffusionConfig(**sizes, **fields)).eval()
    goldens.randomise(drafter)
    if drafter.config.restricted_vocabulary:
        drafter.t2d.copy_(torch.isin(torch.arange(drafter.config.vocab_size), said()))
    return drafter


@torch.no_grad()
@pytest.mark.parametrize("name", [*EAGLES, *BLOCKS])
def test_a_network_drafts_what_its_projects_code_drafted(goldens, target, name):
    text = goldens.read_text(target)
    if name in EAGLES:
        made = goldens.run_eagle3(eagle3_of(goldens, **EAGLES[name]), target, text)
    else:
        made = goldens.run_block(block_of(goldens, **BLOCKS[name]), target, text)
    assert made.tokens == ROWS[name]["tokens"]
    assert made.log_probs.tolist() == pytest.approx(ROWS[name]["log_probs"], abs=5e-5)


def test_what_was_recorded_is_all_there_is_and_passed(goldens):
    assert ROWS.keys() == goldens.CASES.keys()
    for name, row in ROWS.items():
        case = goldens.CASES[name]
        assert row["passed"] and row["same_tokens"] and row["largest_difference"] <= goldens.TOLERANCE, name
        assert (row["layout"], row["project"], row["version"]) == (
            case.layout,
            case.project,
            goldens.VERSIONS[case.project],
        )
    runs = {layout: said.split() for layout, said in layouts_tested().items() if said.startswith("golden run of ")}
    for layout, words in runs.items():
        found = {(row["project"], row["version"]) for row in ROWS.values() if row["layout"] == layout}
        assert (words[-2].lower(), words[-1]) in found, layout


@torch.no_grad()
def test_a_case_is_both_sides(goldens, target, tmp_path):
    """With this package in the other's place, and then with one norm of its folder changed."""

    def make(_, at, text, folder):
        drafter = eagle3_of(goldens, **EAGLE_3_1)
        write_checkpoint(drafter, folder, "speculators")
        return goldens.run_eagle3(drafter, target, text)

    def spoil(tensors):
        tensors["fc_norm.1.weight"] += 0.01

    def make_another(*args):
        golden = make(*args)
        rewrite(args[-1], spoil)
        return golden

    text = goldens.read_text(target)
    for number, (maker, same) in enumerate([(make, True), (make_another, False)]):
        (tmp_path / str(number)).mkdir()
        row = goldens.run(goldens.Case("speculators", "speculators", maker), target, text, tmp_path / str(number))
        assert row["passed"] is same and (row["largest_difference"] <= goldens.TOLERANCE) is same


def test_a_part_that_only_one_side_has_is_no_agreement(goldens):
    golden = goldens.Golden(torch.ones(1, 2), torch.ones(1, 3), [1], torch.zeros(1))
    assert max(goldens.differences(golden, golden).values()) == 0
    assert goldens.differences(golden, replace(golden, confidence=torch.ones(1)))["confidence"] == float("inf")
    assert goldens.differences(golden, replace(golden, states=torch.ones(2, 2)))["states"] == float("inf")


def test_a_project_of_another_version_is_refused(goldens, monkeypatch):
    monkeypatch.setattr(goldens, "version", lambda name: "0.1.0")
    with pytest.raises(SystemExit, match=r"^speculators 0\.9\.0 is needed and 0\.1\.0 is there; see --help\.$"):
        goldens.refuse_versions(["speculators"])
