# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Numbers of the log from what a loss returns."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from specblock_hf.devices import PhaseClock
from specblock_hf.training.metrics import bucket_scores, describe_counts, flat, merge_outputs, report_of


def test_means_and_counts_are_told_apart_by_their_dimensions():
    outputs = [
        {"loss": torch.tensor(1.0), "counted": torch.tensor([[4, 2]])},
        {"loss": torch.tensor(4.0), "counted": torch.tensor([[1, 0]])},
    ]
    merged = merge_outputs(outputs)
    assert merged["loss"].item() == 2.5 and merged["counted"].tolist() == [[5, 2]]


def test_agreement_and_chain():
    counts = {"counted": torch.tensor([[10, 5], [4, 0]]), "agreed": torch.tensor([[5, 2], [1, 0]])}
    assert describe_counts(counts) == {"agreement": [[0.5, 0.4], [0.25, 0.0]], "chain": 0.7}


def test_scores_of_the_rank_head():
    """Bucket 0: 6 true, 5 said, 4 hit; bucket 2 never true; bucket 3 never said."""
    confusion = torch.tensor([[4, 1, 1, 0], [0, 3, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    scores = bucket_scores(confusion)
    assert list(scores) == ["1", "2-4", "5-10", "beyond"]
    assert scores["1"] == pytest.approx({"precision": 0.8, "recall": 0.6667, "f1": 0.7273, "frequency": 0.6})
    assert scores["2-4"] == pytest.approx({"precision": 0.75, "recall": 1.0, "f1": 0.8571, "frequency": 0.3})
    assert scores["5-10"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "frequency": 0.0}
    assert scores["beyond"] == pytest.approx({"precision": 0.0, "recall": 0.0, "f1": 0.0, "frequency": 0.1})


def test_a_line_of_the_log_counts_only_steps_with_all_forwards():
    """Where later forwards joined in the middle of a window."""
    early = {"loss": torch.tensor(8.0), "agreed": torch.tensor([[3]]), "counted": torch.tensor([[4]])}
    late = {"loss": torch.tensor(2.0), "agreed": torch.tensor([[1], [2]]), "counted": torch.tensor([[2], [2]])}
    row = report_of([early, late, late], Accelerator(cpu=True))
    assert row == {"loss": 4.0, "agreement": [[0.5], [1.0]], "chain": 0.5}


def test_every_number_of_a_line_has_a_name_of_its_own():
    row = {"step": 4, "agreement": [[0.5, 0.25], [1.0]], "depths": [0.75], "rank": {"2-4": {"f1": 0.5}}, "none": []}
    assert flat(row) == {
        "step": 4,
        "agreement/1/1": 0.5,
        "agreement/1/2": 0.25,
        "agreement/2/1": 1.0,
        "depths/1": 0.75,
        "rank/2-4/f1": 0.5,
    }


def test_the_clock_charges_phases_and_begins_anew(monkeypatch):
    now = iter([10.0, 11.0, 14.0, 20.0, 20.5, 21.0, 30.0, 31.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = PhaseClock(torch.device("cpu"))
    clock.start()  # 10
    clock.lap("target")  # 1
    clock.lap("forward")  # 3
    clock.start()  # 20, what lay between is nobody's
    clock.lap("target")  # 0.5
    clock.lap("forward")  # 0.5
    assert clock.shares() == {"target": 0.3, "forward": 0.7}
    clock.start()
    clock.lap("update")
    assert clock.shares() == {"update": 1.0}
