# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
What a drafter proposes, made safe to score: a drafter costs speed at worst, whatever it proposes, and never the text.

What the host knows without asking the device is cut here. What only the numbers tell, the host finds when it reads a
tree along with its scores.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..trees.distributions import DraftDistributions
from ..trees.tree import DraftTree
from .drafter import DraftState, TreeDrafter
from .pairs import Pairs
from .plan import Limits


def propose(drafter: TreeDrafter, state: DraftState, pairs: Pairs, limits: Limits) -> DraftTree:
    """
    What a drafter, held by its lock, proposes within the limits; the arguments are those of [`~TreeDrafter.propose`].
    """
    with drafter.lock:
        tree = drafter.propose(state, pairs, limits)
    return within(tree, pairs, limits)


def within(tree: DraftTree, pairs: Pairs, limits: Limits) -> DraftTree:
    """
    A tree cut to its limits, of numbers that can be looked up: tokens of the vocabulary, parents in the tree. Of a
    drawn tree, too, only the shape decides what is cut. Reads nothing from the device.

    Args:
        tree ([`DraftTree`]): As proposed.
        pairs ([`Pairs`]): What it was proposed for.
        limits ([`Limits`]): What the drafter was told.

    Returns:
        [`DraftTree`]: On the device of the proposed tokens; only roots where the proposed tensors have other shapes.
    """
    if not _fits(tree, len(limits.nodes)):
        return DraftTree.root(pairs.last_tokens())
    tree = tree.to(tree.tokens.device)
    width = min(tree.tokens.shape[1], 1 + max(limits.nodes))
    # New tensors each, of which the root's entries are then set.
    parents = tree.parents[:, :width].long().clamp(-2, width - 1)
    log_probs = tree.log_probs[:, :width].float().nan_to_num(nan=-torch.inf, posinf=0.0, neginf=-torch.inf)
    parents[:, 0].fill_(-1)
    log_probs[:, 0].zero_()
    cut = DraftTree(
        tokens=tree.tokens[:, :width].long().clamp(0, pairs.table.vocab_size - 1),
        parents=parents,
        log_probs=log_probs,
        origin=tree.origin[:, :width],
        height=max(min(tree.max_depth, width - 1, max(limits.depth)), 0),
        distributions=None if limits.draft_sampling == "topk" else _distributions_within(tree, width),
    )
    return cut.limit_depth(limits.depth)


def scored_nodes(tree: DraftTree) -> DraftTree:
    """
    A scored tree without the nodes whose scores mean nothing, because they do not hang below the root or lie deeper
    than the tree was said to be high.

    Args:
        tree ([`DraftTree`]): On the host.
    """
    height, parents, struck = tree.max_depth, tree.parents.tolist(), False
    for row in parents:
        depths = [0]
        for node, parent in enumerate(row[1:], 1):
            depths.append(depths[parent] + 1 if 0 <= parent < node else height + 1)
            if depths[node] > height:
                struck |= parent != -2
                row[node] = -2
    return replace(tree, parents=torch.tensor(parents, device="cpu")) if struck else tree


def _fits(tree: DraftTree | None, batch_size: int) -> bool:
    """Whether the tensors are there and those of some nodes of so many rows."""
    if tree is None or any(part is None for part in (tree.tokens, tree.parents, tree.log_probs, tree.origin)):
        return False
    shape = tree.tokens.shape
    return (
        len(shape) == 2
        and shape[0] == batch_size
        and shape[1] > 0
        and tree.parents.shape == tree.log_probs.shape == shape
        and tree.origin.shape == (*shape, 2)
    )


def _distributions_within(tree: DraftTree, width: int) -> DraftDistributions | None:
    """
    What the first `width` nodes were drawn from; `None` if that cannot be read. Then they count as tokens that follow
    from the text before, which every rule verifies exactly.
    """
    distributions = tree.distributions
    if distributions is None or any(
        part is None for part in (distributions.log_probs, distributions.token_ids, distributions.rows)
    ):
        return None
    count = distributions.log_probs.shape[1] if distributions.log_probs.ndim == 3 else 0
    shape = (len(tree.tokens), count, *distributions.token_ids.shape)
    if not count or distributions.log_probs.shape != shape or distributions.rows.shape != tree.tokens.shape:
        return None
    return replace(distributions, rows=distributions.rows[:, :width].long().clamp(-1, count - 1))
