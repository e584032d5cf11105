# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""EAGLE-3 against tensors made with the code of those who published it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from specblock_hf import AutoDrafter
from specblock_hf.drafters.common.cache import BlockCache
from specblock_hf.drafters.eagle3.drafting import Eagle3Drafter
from specblock_hf.drafting.pairs import Pairs, TokenTable
from specblock_hf.drafting.plan import Limits
from specblock_hf.trees.tree import DraftTree
from specblock_hf.trees.verification import sample_and_walk


FOLDER = Path(__file__).parents[1] / "fixtures" / "conformance" / "eagle3"
TOLERANCE = 5e-5  # absolute, as the fixtures state it; values are of order 1 to 10
TREE_TOLERANCE = 2e-4  # of a cumulative log-prob


class Golden:
    """A drafter with the golden weights, read from one layout; its inputs and what the authors' code made of them."""

    def __init__(self, layout: str):
        self.drafter = AutoDrafter.from_pretrained(FOLDER / f"checkpoint_{layout}").eval()
        self.inputs = load_file(FOLDER / "inputs.safetensors")
        self.expected = load_file(FOLDER / "expected.safetensors")
        self.facts = json.loads((FOLDER / "expected.json").read_text())
        embedding = torch.nn.Embedding.from_pretrained(self.inputs["target_embed_tokens.weight"])
        self.table = TokenTable(embedding, torch.nn.Identity(), self.drafter.config.vocab_size)

    def check(self, name: str, made: torch.Tensor) -> None:
        error = (made - self.expected[name]).abs().max().item()
        print(f"{name}: max abs error {error:.1e}")
        assert error <= TOLERANCE

    def pairs(self, first: int, last: int) -> Pairs:
        """Committed pairs `first` to `last - 1`."""
        return Pairs(
            tokens=self.inputs["tokens"][:, first + 1 : last + 1],
            features=self.inputs["target_hidden"][:, first:last].split(self.drafter.config.target_hidden_size, dim=-1),
            positions=torch.arange(first, last)[None],
            lengths=torch.tensor([last - first]),
            table=self.table,
        )

    def tree(self, name: str) -> dict[tuple[int, ...], float]:
        """A recorded tree: cumulative log-prob of each path of tokens."""
        tokens, parents = self.expected[f"{name}/tokens"].tolist(), self.expected[f"{name}/parent"].tolist()
        return by_path(tokens, parents, self.expected[f"{name}/cum_logprob"].tolist())


def by_path(tokens: list[int], parents: list[int], cumulative: list[float]) -> dict[tuple[int, ...], float]:
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tokens, parents, strict=True):
        paths.append((*paths[parent], token) if parent >= 0 else (token,))
    assert len(set(paths)) == len(paths)
    return dict(zip(paths, cumulative, strict=True))


def paths_of(tree: DraftTree, row: int = 0) -> dict[tuple[int, ...], float]:
    kept = int(tree.num_nodes[row])
    return by_path(
        tree.tokens[row, :kept].tolist(),
        tree.parents[row, :kept].tolist(),
        tree.cumulative_log_probs()[row, :kept].tolist(),
    )


@pytest.fixture(scope="module", params=["safeailab", "speculators"])
def golden(request) -> Golden:
    return Golden(request.param)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_forward_and_fed_back_steps(golden, attention):
    drafter, pairs = copy.deepcopy(golden.drafter), golden.facts["S"]
    drafter.set_attn_implementation(attention)
    tokens, features = golden.inputs["tokens"], golden.inputs["target_hidden"][:, :pairs]
    conditions = drafter.project_features(features)
    golden.check("prefix/fc_out", conditions)
    cache = BlockCache(drafter.config, 1, 4, torch.float32, torch.device("cpu"))
    cache.seek(0, pairs)
    rows = torch.arange(pairs)[None]
    hidden = drafter(golden.table.embed(tokens[:, 1 : pairs + 1]), conditions, rows, cache=cache)
    golden.check("prefix/hidden", hidden[:, :, 0])
    golden.check("prefix/logits", drafter.draft_logits(hidden)[1][:, :, 0])
    token, state = _best_token(drafter, hidden), hidden[:, -1:, 0]
    for step, (fed, position) in enumerate(
        zip(golden.facts["chain_tokens_fed"], golden.facts["chain_positions"], strict=True)
    ):
        assert token == fed
        cache.seek(position, position + 1)
        hidden = drafter(golden.table.embed(torch.tensor([[token]])), state, torch.tensor([[position]]), cache=cache)
        golden.check(f"chain/step{step}/hidden", hidden[:, :, 0])
        golden.check(f"chain/step{step}/logits", drafter.draft_logits(hidden)[1][:, 0, 0])
        token, state = _best_token(drafter, hidden), hidden[:, -1:, 0]


def _best_token(drafter: Eagle3Drafter, hidden: torch.Tensor) -> int:
    return int(drafter.draft_to_target[drafter.draft_logits(hidden[:, -1, 0])[1].argmax(-1)])


def use(golden: Golden, total: int, depth: int, top_k: int) -> Limits:
    """The authors' three numbers."""
    golden.drafter.config.beam_width = top_k
    return Limits(nodes=(total - 1,), depth=(100,), num_forwards=depth + 1)


def compare(golden: Golden, name: str, tree: DraftTree) -> None:
    ours, theirs = paths_of(tree), golden.tree(name)
    matched = len(ours.keys() & theirs.keys())
    error = max(abs(ours[path] - theirs[path]) for path in ours.keys() & theirs.keys())
    print(f"{name}: {matched} of {len(theirs)} nodes, max abs error of a cumulative log-prob {error:.1e}")
    assert ours.keys() == theirs.keys() and error <= TREE_TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("chunk", [None, 5])
def test_trees(golden, chunk):
    drafter, pairs = golden.drafter, golden.facts["S"]
    limits = use(golden, golden.facts["total_token"], golden.facts["depth"], golden.facts["top_k"])
    state = drafter.begin(golden.table, 1, 4)
    start = 0
    if chunk:
        drafter.extend(state, golden.pairs(0, chunk))
        start = chunk
    tree = drafter.propose(state, golden.pairs(start, pairs), limits)
    compare(golden, "tree_first/greedy", tree)
    assert state.committed == golden.facts["kv_len_after_first_greedy"]
    assert state.calls == (2 if chunk else 1) + golden.facts["depth"]
    tree = drafter.propose(state, golden.pairs(pairs, pairs + 3), limits)
    compare(golden, "tree_second/greedy", tree)
    assert state.committed == golden.facts["kv_len_after_second_greedy"]

    limits = use(golden, 60, 7, 10)
    tree = drafter.propose(drafter.begin(golden.table, 1, 4), golden.pairs(0, pairs), limits)
    compare(golden, "tree_first_60_7_10/greedy", tree)


@torch.no_grad()
def test_the_recorded_logits_accept_the_recorded_tokens(golden):
    limits = use(golden, golden.facts["total_token"], golden.facts["depth"], golden.facts["top_k"])
    tree = golden.drafter.propose(golden.drafter.begin(golden.table, 1, 4), golden.pairs(0, golden.facts["S"]), limits)
    # The recorded rows are in the recorded tree's order.
    rows = {path: row for row, path in enumerate(golden.tree("tree_first/greedy"))}
    ours = list(paths_of(tree))
    argmax = golden.inputs["verify/target_logits"].argmax(-1).tolist()
    walk = sample_and_walk(tree, [True], lambda _, node: argmax[rows[ours[node]]], lambda *_: False)
    verify = golden.facts["verify"]
    assert walk.tokens[0].tolist() == [*verify["accepted"], verify["bonus"]]
    assert walk.lengths.tolist() == [verify["accept_length"] + 1]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_of_a_batch_are_drafted_alone(golden, attention):
    limits = use(golden, 20, 4, 4)
    drafter = copy.deepcopy(golden.drafter)
    drafter.set_attn_implementation(attention)
    lengths = (9, 14)
    alone = [
        paths_of(drafter.propose(drafter.begin(golden.table, 1, 4), golden.pairs(0, length), limits))
        for length in lengths
    ]
    pairs = golden.pairs(0, 14)
    both = Pairs(
        tokens=pairs.tokens.expand(2, -1),
        features=tuple(f.expand(2, -1, -1) for f in pairs.features),
        positions=pairs.positions.expand(2, -1),
        lengths=torch.tensor(lengths),
        table=golden.table,
    )
    double = replace(limits, nodes=limits.nodes * 2, depth=limits.depth * 2)
    tree = drafter.propose(drafter.begin(golden.table, 2, 4), both, double)
    for row, expected in enumerate(alone):
        ours = paths_of(tree, row)
        assert ours.keys() == expected.keys()
        assert max(abs(ours[path] - expected[path]) for path in ours) <= TREE_TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize(("nodes", "depth", "levels"), [(0, 5, 0), (5, 0, 0), (5, 1, 1), (3, 2, 2), (19, 99, 5)])
def test_limits_bound_the_tree_and_the_work(golden, nodes, depth, levels):
    use(golden, 20, 4, 4)
    state = golden.drafter.begin(golden.table, 1, 4)
    tree = golden.drafter.propose(state, golden.pairs(0, 6), Limits((nodes,), (depth,), num_forwards=5))
    assert tree.num_nodes.item() - 1 == min(nodes, 4 + (levels - 1) * 16 if levels else 0)
    assert tree.depths().max() <= depth
    assert state.calls == max(levels, 1)


@torch.no_grad()
def test_a_plan_narrows_the_beam(golden):
    limits = use(golden, 200, 2, 4)
    wide = golden.drafter.propose(golden.drafter.begin(golden.table, 1, 4), golden.pairs(0, 6), limits)
    narrow = replace(limits, max_starts=1)
    tree = golden.drafter.propose(golden.drafter.begin(golden.table, 1, 4), golden.pairs(0, 6), narrow)
    assert (wide.num_nodes.item(), tree.num_nodes.item()) == (1 + 4 + 16 + 16, 1 + 4 + 4 + 4)
    assert paths_of(tree).keys() < paths_of(wide).keys()
    on_gpu = golden.drafter.default_plan(torch.device("cuda"))
    assert (on_gpu.tree_budget, on_gpu.num_forwards, on_gpu.max_starts) == (59, 8, 4)
