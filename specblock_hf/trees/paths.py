# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Sums from every node of a tree up to its root."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


PATH_FACTOR = -7046029254386353131
"""An odd multiplier with well-mixed bits (2^64 divided by the golden ratio, as a signed number), to hash paths by."""


def path_sums(parents: torch.LongTensor, height: int, values: torch.Tensor) -> torch.Tensor:
    """
    Sum values from every node up to the root. A node's sum is its parent's plus one rounded addition, so sums of
    values <= 0 never grow towards the leaves.

    Args:
        parents (`torch.LongTensor` of shape `[B, N]`): Below 0 for the root and for padding.
        height (`int`): Edges on the longest path, or more.
        values (`torch.Tensor` of shape `[B, N]`): 0 at the root.
    """
    parent, sums = parents.clamp_min(0), values
    for _ in range(height - 1):
        sums = values + sums.gather(1, parent)
    return sums


def path_sums_on_host(parents: Sequence[int], log_probs: Sequence[float]) -> list[float]:
    """
    The log-prob of every path of one row: -inf for padding, never above the parent's. Those of a dozen nodes are added
    in less time than an operator takes.

    Args:
        parents (sequence of `int`):
            -1 for the root, -2 for padding; parents come before their children, and nothing is below others.
        log_probs (sequence of `float`): Of each node given its parent. What is none counts as impossible.

    Returns:
        `list[float]`: One for each node, natural logarithms.
    """
    sums: list[float] = []
    for parent, log_prob in zip(parents, log_probs, strict=True):
        if parent < 0 or parent >= len(sums):
            sums.append(0.0 if parent == -1 else -math.inf)
        else:
            sums.append(sums[parent] + (min(log_prob, 0.0) if log_prob == log_prob else -math.inf))
    return sums


def path_counts(parents: torch.LongTensor, height: int, values: torch.LongTensor, factor: int = 1) -> torch.LongTensor:
    """
    The same of whole numbers, the parent's sum times `factor`, modulo 2^64. They are not rounded, whatever they are
    added to first, so that a sum over twice as many nodes is made of two.
    """
    above, sums = parents.clamp_min(0), values
    for _ in range((height - 1).bit_length()):
        sums = torch.add(sums, sums.gather(1, above), alpha=factor)
        above, factor = above.gather(1, above), _signed(factor * factor)
    return sums


def _signed(number: int) -> int:
    """A whole number as 64 bits hold it."""
    return (number + 2**63) % 2**64 - 2**63
