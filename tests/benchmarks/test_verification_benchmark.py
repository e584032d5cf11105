# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/verification.py`: the distributions that it verifies with are the target's, and its sums are right."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import prompt_of, tiny_target
from test_drawn_trees import drafter_for
from test_verification import tree_of
from transformers import DynamicCache

from specblock_hf.compat import CACHE


PATH = Path(__file__).parents[2] / "benchmarks" / "verification.py"


@pytest.fixture(scope="module")
def verification():
    spec = importlib.util.spec_from_file_location("verification_benchmark", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def test_trees_at_several_places_are_scored_as_texts_of_their_own(verification):
    target, ids, roots = tiny_target("llama"), prompt_of(20), [5, 11, 19]
    trees = [tree_of([(1, 0), (2, 1), (3, 0)]), tree_of([(4, 0)]), tree_of([(5, 0), (6, 0), (7, 2)])]
    for tree, root in zip(trees, roots, strict=True):
        tree.tokens[0, 0] = ids[0, root]
    cache = DynamicCache(config=target.config)
    target(ids, **{CACHE: cache})
    scored = verification.score(target, cache, trees, roots)
    paths = [[[], [1], [1, 2], [3]], [[], [4]], [[], [5], [6], [6, 7]]]
    for logits, spelled, root in zip(scored, paths, roots, strict=True):
        for node, path in enumerate(spelled):
            text = torch.cat((ids[:, : root + 1], torch.tensor([path], dtype=torch.long)), dim=1)
            torch.testing.assert_close(logits[node], target(text).logits[0, -1], rtol=0, atol=1e-4)
    assert cache.get_seq_length() == 20


def test_the_warpers_are_those_of_generate(verification):
    target, options = tiny_target("llama"), {"temperature": 0.7, "top_p": 0.6}
    output = target.generate(
        prompt_of(5),
        do_sample=True,
        top_k=0,
        max_new_tokens=1,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **options,
    )
    warped = verification.processors_of(target, options)(None, output.logits[0].clone())
    assert warped.equal(output.scores[0]) and int(warped.isneginf().sum()) > 3


def test_every_method_meets_the_same_places(verification):
    target, ids = tiny_target("llama"), prompt_of(30)
    args = argparse.Namespace(budget=[4], every=5)
    kept = verification.kept_along(target, drafter_for(target), ids, 9, {"temperature": 0.7}, args)
    assert list(kept) == [f"4 {sampling} {rule}" for sampling, rule in verification.METHODS]
    assert {len(values) for values in kept.values()} == {4}  # places 9, 14, 19, 24
    assert all(0 < value <= 4 for values in kept.values() for value in values)


def test_tau_and_its_error(verification):
    rows = [{"kept": {"T": {"walk": kept}}} for kept in ([1.0, 2.0], [0.0, 0.0])]
    assert verification.summarise(rows)["T"]["walk"] == pytest.approx([1.75, 0.75])


def test_other_settings_are_not_mixed_into_a_report(verification, tmp_path):
    path = tmp_path / "report.json"
    report = verification.read(path, {"every": 8})
    report["prompts"].append({"suite": "s", "number": 0, "kept": {"T": {"walk": [0.123456]}}})
    verification.write(path, report)
    assert verification.read(path, {"every": 8})["summary"] == {"T": {"walk": [1.1235, 0.0]}}
    with pytest.raises(ValueError, match="made with other settings"):
        verification.read(path, {"every": 6})
