# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What a callback that adapts keeps from query to query: texts of one target, weights that held, one stream."""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from types import SimpleNamespace

import torch
from conftest import prompt_of, tiny_target
from serving_for_tests import FAST, GREEDY, adapted, serve
from training_for_tests import tiny_drafter

from specblock_hf.adaptation import FallMonitor
from specblock_hf.drafting.drafter import DraftingCallback


def test_memory_is_bounded():
    drafter = tiny_drafter()
    callback = adapted(drafter, every=1000, buffer_bytes=20_000)
    serve(drafter, 10)
    assert 0 < callback.buffer.num_bytes <= 20_000
    assert len(callback.buffer) < 10


def test_what_an_older_policy_said_is_forgotten():
    drafter, target = tiny_drafter(), deepcopy(tiny_target("llama"))
    callback = adapted(drafter, every=100, settings=FAST)
    for number in range(3):
        target.generate(prompt_of(6, number), assistant_model=drafter, **GREEDY)
    assert len(callback.buffer) == 3
    optimizer = torch.optim.AdamW(target.parameters(), lr=1e-3)
    target(prompt_of(6), labels=prompt_of(6)).loss.backward()
    optimizer.step()
    for kept in (1, 2):
        target.generate(prompt_of(6, kept), assistant_model=drafter, **GREEDY)
        assert len(callback.buffer) == kept


def test_what_another_target_said_is_forgotten():
    drafter, targets = tiny_drafter(), [deepcopy(tiny_target("llama")) for _ in range(2)]
    callback = adapted(drafter, every=100, settings=FAST)
    kept = []
    for target in (0, 0, 1, 1, 0):
        targets[target].generate(prompt_of(6), assistant_model=drafter, **GREEDY)
        kept.append(len(callback.buffer))
    assert kept == [1, 2, 1, 2, 1]


def test_of_calls_to_two_targets_at_once_those_of_the_later_target_are_kept():
    drafter, targets = tiny_drafter(), [deepcopy(tiny_target("llama")) for _ in range(2)]

    class AsksAnother(DraftingCallback):
        asked = False

        def on_verify(self, call, tree, scored):
            if not self.asked:
                self.asked = True
                targets[1].generate(prompt_of(9), assistant_model=drafter, **GREEDY)

    callback = adapted(drafter, every=2, settings=FAST)
    drafter.add_callback(AsksAnother())
    targets[0].generate(prompt_of(6), assistant_model=drafter, **GREEDY)
    assert callback.queries == 2 and callback.failure is None
    # The second query would be due for an update, but has no table for what the other target wrote.
    assert [decision.action for decision in callback.decisions] == ["skip", "skip"]
    assert [len(window) - window.scored + 1 for window in callback.buffer.newest(9)] == [9]


def test_weights_are_copied_for_a_rollback_when_some_came_into_service(monkeypatch):
    drafter, taken = tiny_drafter(), []
    callback = adapted(drafter, every=4, settings=FAST, monitor=FallMonitor(2))
    snapshot = callback.updater.snapshot
    monkeypatch.setattr(callback.updater, "snapshot", lambda: taken.append(callback.queries) or snapshot())
    # The monitor looks at every second query, before an update that the fourth one triggers.
    serve(drafter, 6)
    assert callback.updates == 1 and taken == [5]
    callback.every = 1000
    serve(drafter, 8)
    assert taken == [5]
    callback.load_state_dict(callback.state_dict())
    del taken[:]
    serve(drafter, 4)
    assert taken == [15]


def test_updates_on_cuda_share_one_stream(monkeypatch):
    made, waited = [], []

    class Stream:
        def __init__(self, device):
            made.append(device.type)

        def wait_event(self, event):
            waited.append(event)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(record_event=object))
    drafter = tiny_drafter()
    callback = adapted(drafter, every=1, background=True, settings=FAST)
    callback.updater.device = torch.device("cuda")
    callback.updater.update = lambda *work: {"loss": 0.0, "drift": 0.0}
    for _ in range(3):
        serve(drafter, 1)
        callback.wait()
    assert callback.updates == len(waited) == 3 and made == ["cuda"]
