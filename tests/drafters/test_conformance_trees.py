# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The trees and the greedy acceptance of the authors' release, from recorded logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from specblock_hf.trees.expansion import BlockOutputs, Branching, Starts, rank_guided
from specblock_hf.trees.tree import DraftTree
from specblock_hf.trees.verification import sample_and_walk


FIXTURES = Path(__file__).parents[1] / "fixtures" / "conformance"
SYNTHETIC = ("all_correct", "giveup_mid", "giveup_first", "mixed", "last_small", "confident")
CASES = (*SYNTHETIC, "model")  # the logits of the last one need the network
BRANCHINGS = {
    "default": Branching((2, 4, 10, 0)),
    "slim_r2": Branching((2, 4, 6, 4)),
    "slim_r2_adaptive": Branching((2, 4, 6, 4), probability_cuts=True),
}
CANDIDATES = 10
TOLERANCE = 2e-4  # of a cumulative log-prob


class Golden:
    """One folder of recorded trees."""

    def __init__(self, name: str):
        folder = FIXTURES / name
        self.inputs = load_file(folder / "tree_inputs.safetensors")
        self.expected = load_file(folder / "tree_expected.safetensors")
        self.draft_to_target = load_file(folder / "checkpoint" / "model.safetensors")["d2t"]
        self.accept = json.loads((folder / "accept_greedy.json").read_text())

    def outputs(self, logits, rank_logits) -> BlockOutputs:
        """The drafter's outputs for `[S, K, D]` logits."""
        log_probs, ids = logits.log_softmax(-1).topk(CANDIDATES)
        tokens = ids + self.draft_to_target[ids]
        return BlockOutputs(tokens[None], log_probs[None], rank_logits.argmax(-1)[None])

    def grow(self, case: str, branching: Branching) -> DraftTree:
        """Two blocks of our own expansion from the recorded logits of a synthetic case."""
        recorded = {
            key.removeprefix(f"{case}/"): value for key, value in self.inputs.items() if key.startswith(f"{case}/")
        }
        row_of = {tuple(start): row for row, start in enumerate(recorded["block2_starts"].tolist())}
        tree = DraftTree.root(torch.tensor([5]))
        first = self.outputs(recorded["block1_logits"], recorded["block1_rank_logits"])
        tree, starts = rank_guided(tree, Starts.root(tree), first, branching, 0)
        rows = [
            row_of[slot, token] if node >= 0 else 0
            for node, slot, token in torch.stack((starts.node, starts.slot, starts.tokens), -1)[0].tolist()
        ]
        second = self.outputs(recorded["block2_logits"][rows], recorded["block2_rank_logits"][rows])
        return rank_guided(tree, starts, second, branching, 1)[0]

    def tree(self, name: str, root: int = 5) -> DraftTree:
        """A recorded list of nodes as a tree."""
        parents = torch.cat((torch.tensor([-1]), self.expected[f"{name}/parent"].long() + 1))
        cumulative = torch.cat((torch.zeros(1), self.expected[f"{name}/cum_logprob"]))
        log_probs = cumulative - cumulative[parents.clamp_min(0)]
        dropped = cumulative == -torch.inf
        return DraftTree(
            tokens=torch.cat((torch.tensor([root]), self.expected[f"{name}/token"].long()))[None],
            parents=parents.masked_fill(dropped, -2)[None],
            log_probs=log_probs.masked_fill(dropped, -torch.inf)[None],
            origin=torch.cat(
                (
                    torch.full((1, 2), -1),
                    torch.stack((self.expected[f"{name}/block"], self.expected[f"{name}/slot"]), -1).long(),
                )
            )[None],
        )


def listing(tree: DraftTree, with_origin: bool) -> tuple[list[tuple], torch.Tensor]:
    """The drafted nodes of row 0, sorted: token path (and origin), and cumulative log-prob."""
    tokens, parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
    origin, cumulative = tree.origin[0].tolist(), tree.cumulative_log_probs()[0].tolist()

    def path(node: int) -> tuple[int, ...]:
        return (*path(parents[node]), tokens[node]) if node else ()

    rows = sorted(
        (path(node), tuple(origin[node]) if with_origin else (), cumulative[node])
        for node in range(1, len(tokens))
        if parents[node] >= 0
    )
    return [row[:2] for row in rows], torch.tensor([row[2] for row in rows])


def same(ours: DraftTree, golden: DraftTree, with_origin: bool = True) -> bool:
    paths, cumulative = listing(ours, with_origin)
    golden_paths, golden_cumulative = listing(golden, with_origin)
    return paths == golden_paths and torch.allclose(cumulative, golden_cumulative, rtol=0, atol=TOLERANCE)


def report(results: dict[str, bool]) -> None:
    print(f"matched {sum(results.values())} of {len(results)}")
    assert results and [name for name, matched in results.items() if not matched] == []


@pytest.fixture(scope="module", params=["specblock_a", "specblock_b"])
def golden(request) -> Golden:
    return Golden(request.param)


def test_expansion_gives_the_recorded_trees(golden):
    results = {}
    for case in SYNTHETIC:
        for variant, branching in BRANCHINGS.items():
            tree = golden.grow(case, branching)
            results[f"{case}/{variant}"] = same(tree, golden.tree(f"{case}/{variant}/pre"))
    report(results)


def test_pruning_gives_the_recorded_trees(golden):
    results = {}
    for case in CASES:
        for variant, branching in BRANCHINGS.items():
            name = f"{case}/{variant}"
            tree = golden.grow(case, branching) if case in SYNTHETIC else golden.tree(f"{name}/pre")
            for budget in (60, 90):
                results[f"{name}/{budget}"] = same(tree.prune(budget), golden.tree(f"{name}/pruned{budget}"))
    report(results)


def test_merging_gives_the_recorded_trees(golden):
    results = {}
    for case in CASES:
        for variant in ("slim_r2", "slim_r2_adaptive"):
            name = f"{case}/{variant}"
            tree = golden.grow(case, BRANCHINGS[variant]) if case in SYNTHETIC else golden.tree(f"{name}/pre")
            merged = tree.merge_duplicates(recompute=False)
            results[name] = same(merged, golden.tree(f"{name}/dedup"), with_origin=False)
            for budget in (60, 90):
                pruned = golden.tree(f"{name}/dedup_pruned{budget}")
                results[f"{name}/{budget}"] = same(merged.prune(budget), pruned, with_origin=False)
    report(results)


def test_recomputing_only_lifts_children_of_merged_nodes(golden):
    results = {}
    for case in CASES:
        tree = golden.tree(f"{case}/slim_r2/pre")
        paths, cumulative = listing(tree.merge_duplicates(), with_origin=False)
        golden_paths, golden_cumulative = listing(tree.merge_duplicates(recompute=False), with_origin=False)
        results[case] = paths == golden_paths and bool((cumulative >= golden_cumulative - TOLERANCE).all())
    report(results)


def test_greedy_walk_accepts_what_the_release_accepts(golden):
    results = {}
    for number, case in enumerate(golden.accept):
        tree = golden.tree(case["tree"], case["root_token"])
        walk = sample_and_walk(tree, [True], lambda row, node, case=case: case["node_argmax"][node], lambda *_: False)
        kept = walk.nodes[0].tolist()
        results[f"{number} {case['tree']}"] = (
            walk.tokens[0].tolist() == [*case["accepted_tokens"], case["next_token"]]
            and walk.lengths.tolist() == [case["accept_length"] + 1]
            and tree.tokens[0, kept[1:]].tolist() == case["accepted_tokens"]
            and [-1, *kept[:-1]] == tree.parents[0, kept].tolist()
        )
    report(results)
