# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Chains for targets whose attention takes no mask; masks themselves are tested with the forwards that read them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specblock_hf.target.masks import likeliest_chain
from specblock_hf.trees.tree import DraftTree


@st.composite
def batches(draw) -> DraftTree:
    """Trees of several rows with distinct likelihoods, padded to the widest."""
    size = draw(st.integers(1, 9))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        used = draw(st.integers(1, size))
        rows.append([-1] + [draw(st.integers(0, node - 1)) for node in range(1, used)] + [-2] * (size - used))
    parents = torch.tensor(rows)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    log_probs = -torch.rand(parents.shape, generator=generator).masked_fill(parents == -1, 0)
    return DraftTree(
        tokens=torch.arange(size).expand_as(parents).clone(),  # so that a token names its node
        parents=parents,
        log_probs=log_probs.masked_fill(parents == -2, -torch.inf),
        origin=torch.full((*parents.shape, 2), -1),
    )


@settings(max_examples=100, deadline=None)
@given(tree=batches())
def test_a_chain_is_the_path_of_likeliest_children(tree):
    chain = likeliest_chain(tree)
    lengths = []
    for row in range(len(tree.tokens)):
        path = [0]
        while children := [n for n in range(tree.tokens.shape[1]) if tree.parents[row, n] == path[-1]]:
            path.append(max(children, key=lambda node: float(tree.log_probs[row, node])))
        lengths.append(len(path))
        padding = [-2] * (chain.tokens.shape[1] - len(path))
        assert chain.tokens[row, : len(path)].tolist() == path
        assert chain.parents[row].tolist() == [*range(-1, len(path) - 1), *padding]
        assert torch.equal(chain.log_probs[row, : len(path)], tree.log_probs[row, path])
        assert chain.depths()[row, : len(path)].tolist() == list(range(len(path)))
    assert chain.tokens.shape[1] == max(lengths)
