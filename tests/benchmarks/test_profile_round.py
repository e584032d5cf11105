# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/profile_round.py` times what there is, and the parts add up to rounds."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from conftest import VOCAB, prompt_of, tiny_target
from drafters_for_tests import GarbageDrafter

from specblock_hf import DraftingPlan


SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "profile_round.py"))


def test_every_part_is_a_function_of_the_library():
    for owner, attribute, _ in SCRIPT["parts"](tiny_target("llama")):
        assert callable(vars(owner)[attribute]), (owner, attribute)


def test_parts_are_booked_once(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(SCRIPT["time"], "perf_counter", lambda: float(next(clock)))
    watch = SCRIPT["Stopwatch"]()
    start = watch._since
    with watch.part("outer"), watch.part("inner"):
        pass
    assert watch.calls == {"outer": 1, "inner": 1}
    assert sum(watch.seconds.values()) == watch._since - start - 1  # what ran before the first part is nobody's


def test_a_call_is_taken_apart():
    target, drafter = tiny_target("llama"), GarbageDrafter(VOCAB)
    drafter.drafting_plan = DraftingPlan(3, 1)
    whole = SCRIPT["profile"](target, drafter, [prompt_of(6)], 9)
    parts = SCRIPT["watched_profile"](target, drafter, [prompt_of(6)], 9)
    assert whole["rounds"] == drafter.last_statistics.rounds and whole["tau"] == pytest.approx(1, abs=1.5)
    assert {"verify: target", "verify: inputs", "host: processors", "host: commit", "host: rest"} <= set(parts)
    assert min(parts.values()) > 0
