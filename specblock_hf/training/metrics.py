# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""From what a drafter's loss returns to the numbers of the log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator


BUCKETS = ("1", "2-4", "5-10", "beyond")
"""Ranks of the target's token that the rank head tells apart (section 3.2)."""


def merge_outputs(outputs: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Means of the 0-dimensional entries and sums of the counts of several outputs of `TreeDrafter.loss`."""
    merged = {}
    for name in outputs[0]:
        stacked = torch.stack([out[name] for out in outputs])
        merged[name] = stacked.float().mean() if stacked.ndim == 1 else stacked.sum(0)
    return merged


def report_of(window: Sequence[dict[str, torch.Tensor]], accelerator: Accelerator) -> dict:
    """
    A line of the log from the outputs of some steps, added up over all processes.

    Args:
        window (sequence of `dict[str, torch.Tensor]`): Of every step, as [`merge_outputs`] returns them.
        accelerator ([`~accelerate.Accelerator`]): Knows the processes.
    """
    largest = max(out["counted"].numel() for out in window)
    # Steps before later forwards joined count fewer of them; their means count, their counts do not.
    full = [out for out in window if out["counted"].numel() == largest]
    means = merge_outputs([{k: v for k, v in out.items() if v.ndim == 0} for out in window])
    counts = merge_outputs([{k: v for k, v in out.items() if v.ndim > 0} for out in full])
    row = {name: round(accelerator.reduce(value, "mean").item(), 4) for name, value in means.items()}
    return row | describe_counts({name: accelerator.reduce(value, "sum") for name, value in counts.items()})


def describe_counts(counts: dict[str, torch.Tensor]) -> dict:
    """
    Rates from counts.

    Args:
        counts (`dict[str, torch.Tensor]`): See [`TreeDrafter.loss`].

    Returns:
        `dict`: `agreement`, the share of right guesses of every forward and slot, given that all slots before were
        right; `chain`, the mean number of right guesses of the first forward in a row; with a rank head `rank`, its
        precision, recall and F1 for every bucket, and how often the bucket occurs.
    """
    agreed, counted = counts["agreed"], counts["counted"]
    row: dict = {
        "agreement": [[round(v, 4) for v in line] for line in (agreed / counted.clamp_min(1)).tolist()],
        "chain": round((agreed[0] / counted[0, 0].clamp_min(1)).sum().item(), 4),
    }
    if "rank_confusion" in counts and counts["rank_confusion"].any():
        row["rank"] = bucket_scores(counts["rank_confusion"])
    return row


def bucket_scores(confusion: torch.Tensor) -> dict[str, dict[str, float]]:
    """
    Precision, recall, F1 and frequency of every bucket (appendix B), each 0 where there is nothing to divide by.

    Args:
        confusion (`torch.Tensor` of shape `[buckets, buckets]`): Places by true (row) and predicted bucket.
    """
    hits, true, said = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    scores = {
        "precision": hits / said.clamp_min(1),
        "recall": hits / true.clamp_min(1),
        "f1": 2 * hits / (said + true).clamp_min(1),
        "frequency": true / confusion.sum().clamp_min(1),
    }
    return {
        bucket: {name: round(values[index].item(), 4) for name, values in scores.items()}
        for index, bucket in enumerate(BUCKETS)
    }


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """
    A line of the log with a name of its own for every number, as trackers want it: `agreement/1/2` is the second slot
    of the first block, `depths/1` the first depth.
    """
    numbers: dict[str, Any] = {}
    for name, value in row.items():
        parts = dict(enumerate(value, 1)) if isinstance(value, list) else value
        if isinstance(parts, dict):
            numbers |= {f"{name}/{rest}": number for rest, number in flat(parts).items()}
        else:
            numbers[name] = value
    return numbers
