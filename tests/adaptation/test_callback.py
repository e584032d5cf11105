# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Adaptation in service: texts never change, updates come when they should, and nothing that fails stops a call."""

from __future__ import annotations

import logging
import os
import threading
import time

import pytest
import torch
from baselines_for_tests import BASELINES, baseline
from conftest import prompt_of, tiny_target
from safetensors.torch import load_file
from serving_for_tests import GREEDY, adapted, plain, same, serve, weights_of
from training_for_tests import tiny_drafter

from specblock_hf import JoinedDrafter, LookupDrafter, SpecBlockDrafter
from specblock_hf.adaptation import AdaptationBandit, FallMonitor, OnlineAdaptationCallback, UpdateSettings
from specblock_hf.drafters.specblock.loss import SpecBlockObjective
from specblock_hf.drafting.drafter import DraftingCallback


FIRST_BLOCK = SpecBlockObjective(num_blocks=1)
FAST = UpdateSettings(learning_rate=3e-3, steps=1, drift_weight=0.0, objective=FIRST_BLOCK)
STRONG = UpdateSettings(
    learning_rate=5e-3, steps=8, warmup_steps=1, averaging=0.5, drift_weight=0.0, objective=FIRST_BLOCK
)


def eager_bandit(**constants) -> AdaptationBandit:
    defaults = {"warmup": 2, "interval": 2, "cooldown": 2, "epsilon": (1.0, 1.0)}
    return AdaptationBandit(**(defaults | constants))


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("policy", ["bandit", "always", "never"])
def test_texts_are_those_of_plain_decoding(policy, background):
    drafter = tiny_drafter()
    callback = adapted(drafter, policy, background=background, settings=FAST, bandit=eager_bandit(), fresh_tokens=0)
    assert serve(drafter, 10) == plain(10)
    drafter.remove_callback(callback)
    assert callback.failure is None
    assert (callback.updates > 0) == (policy != "never")


def test_sampled_texts_are_those_of_plain_sampling_with_the_same_seed():
    drafter = tiny_drafter()
    callback = adapted(drafter, settings=FAST, every=2)
    target = tiny_target("llama")
    for number in range(8):
        texts = []
        for assistant in (None, drafter):
            torch.manual_seed(number)
            options = GREEDY | {"do_sample": True, "assistant_model": assistant}
            texts.append(target.generate(prompt_of(6, number), **options))
        assert torch.equal(*texts)
    assert callback.updates == 4


def test_always_makes_a_full_update_every_so_many_queries():
    drafter = tiny_drafter()
    callback = adapted(drafter, every=3, settings=FAST)
    serve(drafter, 10)
    assert [d.query for d in callback.decisions if d.action != "skip"] == [2, 5, 8]
    assert {event.scope for event in callback.events} == {"full"}
    assert callback.updates == 3


def test_never_changes_no_weight_and_makes_no_copy():
    drafter = tiny_drafter()
    before = weights_of(drafter)
    callback = adapted(drafter, "never")
    serve(drafter, 10)
    assert same(weights_of(drafter), before)
    assert len(callback.decisions) == len(callback.buffer) == 0
    with pytest.raises(ValueError, match="has no drafter to adapt"):
        _ = callback.updater


def test_learning_raises_the_accepted_length_on_its_own_traffic():
    drafter = tiny_drafter()
    serve(drafter, 1)
    before = drafter.last_statistics.tau
    adapted(drafter, every=2, settings=STRONG)
    serve(drafter, 10, prompts=1)
    assert drafter.last_statistics.tau >= before + 1


def test_the_bandit_waits_for_enough_to_train_on():
    drafter = tiny_drafter()
    callback = adapted(drafter, "bandit", settings=FAST, bandit=eager_bandit(warmup=1), fresh_tokens=40)
    serve(drafter, 9)
    reasons = [decision.reason for decision in callback.decisions]
    # 12 tokens a query: four of them make 48.
    assert reasons[:5] == ["not ready"] * 3 + ["explored", "cool-down"]
    assert reasons.count("explored") == 2


def test_every_decision_is_logged_with_its_numbers():
    drafter = tiny_drafter()
    callback = adapted(drafter, "bandit", settings=FAST, bandit=eager_bandit(), fresh_tokens=0)
    serve(drafter, 8)
    assert [decision.query for decision in callback.decisions] == list(range(8))
    rewarded = [decision for decision in callback.decisions if decision.reward is not None]
    assert rewarded and all(decision.rewarded in ("head", "full") for decision in rewarded)
    assert all(decision.throughput > 0 for decision in list(callback.decisions)[1:])
    assert all(decision.signal > 0 for decision in callback.decisions)


def test_an_update_in_the_same_thread_is_paid_by_the_next_query():
    ticks = iter(range(10_000))
    drafter = tiny_drafter()
    callback = adapted(
        drafter, "bandit", settings=FAST, bandit=eager_bandit(), fresh_tokens=0, clock=lambda: float(next(ticks))
    )
    serve(drafter, 4)
    # Each call takes one tick; the update after the second one takes another, which is its own and not the usual.
    before, after = (callback.decisions[index] for index in (1, 3))
    assert before.action != "skip" and after.rewarded == before.action
    assert after.reward == pytest.approx(2 / 3 - 1)
    assert [seconds for _, seconds in callback.bandit._recent] == [1.0, 1.0]


def test_a_failing_update_is_logged_once_and_ends_only_the_adaptation(caplog):
    drafter = tiny_drafter()
    before = weights_of(drafter)
    callback = adapted(drafter, every=2, background=True)
    callback.updater.trained.loss = None
    with caplog.at_level(logging.ERROR, logger="specblock_hf"):
        texts = serve(drafter, 4)
        callback.wait()
        texts += serve(drafter, 4)
    assert texts == plain(8)
    assert isinstance(callback.failure, TypeError)
    assert len([record for record in caplog.records if record.name.startswith("specblock_hf")]) == 1
    assert [event.kind for event in callback.events] == ["failed"]
    assert same(weights_of(drafter), before)


def test_weights_that_are_not_finite_never_come_into_service():
    drafter = tiny_drafter()
    before = weights_of(drafter)
    callback = adapted(drafter, every=2)
    with torch.no_grad():
        callback.updater.trained.lm_head.weight.fill_(torch.nan)
    assert serve(drafter, 4) == plain(4)
    assert "not finite" in str(callback.failure)
    assert same(weights_of(drafter), before)


def poison(callback: OnlineAdaptationCallback) -> None:
    """From now on, teach that the target wants quite another token than it does."""
    add, wrong = callback.buffer.add, int(callback.updater.deployed.draft_to_target[0])

    def add_poisoned(window):
        window.top_ids[window.top_ids >= 0] = wrong
        add(window)

    callback.buffer.add = add_poisoned


def mean_tau(drafter, queries: int) -> float:
    taus = []
    for number in range(queries):
        serve(drafter, 1, first=number, prompts=queries)
        taus.append(drafter.last_statistics.tau)
    return sum(taus) / len(taus)


def test_a_poisoned_stream_is_rolled_back():
    drafter = tiny_drafter()
    # A drafter that knows these prompts has something to lose.
    teacher = adapted(drafter, every=2, settings=STRONG)
    serve(drafter, 16, prompts=2)
    drafter.remove_callback(teacher)
    start = mean_tau(drafter, 2)
    assert start > 2
    callback = adapted(
        drafter,
        every=2,
        monitor=FallMonitor(4),
        settings=UpdateSettings(learning_rate=2e-3, steps=1, warmup_steps=1, drift_weight=0.0, objective=FIRST_BLOCK),
    )
    poison(callback)
    worst = start
    for number in range(40):
        serve(drafter, 1, first=number, prompts=2)
        worst = min(worst, drafter.last_statistics.tau)
        if any(event.kind == "rolled back" for event in callback.events):
            break
    else:
        pytest.fail("no rollback")
    assert worst < 0.9 * start
    assert callback.bandit.values == {"head": 0.0, "full": 0.0}
    assert len(callback.buffer) <= 1  # the query that was just served
    drafter.remove_callback(callback)
    assert mean_tau(drafter, 2) == pytest.approx(start, rel=0.03)


def test_harder_texts_are_no_reason_to_roll_back():
    drafter = tiny_drafter()
    monitor = FallMonitor(2)
    callback = adapted(drafter, every=2, settings=STRONG, monitor=monitor)
    serve(drafter, 16, prompts=2)
    learned, updates = weights_of(drafter), callback.updates
    callback.every = 1000
    see, seen = monitor.see, []
    # Whatever the drafter does, the texts seem to yield less and less.
    monitor.see = lambda emitted, rounds: seen.append(len(seen)) or see(1000 - 60 * len(seen), 300)
    serve(drafter, 8, prompts=2)
    assert [event.kind for event in callback.events if event.kind != "updated"] == ["harder texts"]
    assert callback.updates == updates > 0 and same(weights_of(drafter), learned)
    assert len(callback.buffer) > 8


@pytest.mark.parametrize(
    ("taus", "verdicts"),
    [
        ([3.0, 2.8, 2.6, 2.4], ["held", "fell", "fell", "fallen"]),
        ([3.0, 2.99, 2.98, 2.97], ["held", "fell", "fell", "fell"]),  # too little to matter
        ([3.0, 2.8, 2.9, 2.4], ["held", "fell", "fell", "fell"]),  # better than before is not yet good
        ([3.0, 2.8, 2.97, 2.6], ["held", "fell", "held", "fell"]),
        ([3.0, 2.5, 2.4, 2.6, 2.2, 2.0, 1.8], ["held"] + ["fell"] * 5 + ["fallen"]),
        ([2.0] + [1.5] * 9 + [1.6], ["held"] + ["fell"] * 9 + ["held"]),  # traffic that is harder for good
    ],
)
def test_three_falls_in_a_row_are_needed(taus, verdicts):
    monitor = FallMonitor(2)
    seen = []
    for tau in taus:
        seen += [monitor.see(round(tau * 100), 100), monitor.see(round(tau * 100), 100)]
    assert seen == [verdict for last in verdicts for verdict in ("open", last)]


def test_a_service_goes_on_after_a_restart(tmp_path):
    drafter = tiny_drafter()
    callback = adapted(drafter, every=3, settings=FAST)
    serve(drafter, 9)
    torch.save(callback.state_dict(), tmp_path / "service.pt")
    again = tiny_drafter()
    resumed = adapted(again, every=3, settings=FAST)
    resumed.load_state_dict(torch.load(tmp_path / "service.pt", weights_only=True))
    assert same(weights_of(again), weights_of(drafter))
    assert (resumed.queries, resumed.updates) == (9, 3)
    callback.buffer.clear()
    for one in (drafter, again):
        serve(one, 3, first=9)
    assert same(weights_of(again), weights_of(drafter))


def tensors_in(state) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else []
    return [tensor for value in values for tensor in tensors_in(value)]


def test_nothing_that_anybody_wrote_is_saved(tmp_path):
    drafter = tiny_drafter()
    drafter.save_pretrained(tmp_path / "before")
    callback = adapted(drafter, every=2, settings=FAST)
    serve(drafter, 6)
    callback.save_pretrained(tmp_path / "after")
    names = [sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in ("before", "after")]
    assert names[0] == names[1]
    assert (tmp_path / "after/config.json").read_text() == (tmp_path / "before/config.json").read_text()
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("before", "after"))
    assert {name: tensor.shape for name, tensor in before.items()} == {n: t.shape for n, t in after.items()}
    loaded = SpecBlockDrafter.from_pretrained(tmp_path / "after")
    assert same(weights_of(loaded), weights_of(drafter))
    # All that a resumed service gets in tensors: weights, the optimiser's two moments and steps, a generator's state.
    state = callback.state_dict()
    parameters = {tuple(parameter.shape) for parameter in drafter.parameters()}
    others = {(), tuple(state["updater"]["generator"].shape), tuple(drafter.d2t.shape), tuple(drafter.t2d.shape)}
    assert {tuple(tensor.shape) for tensor in tensors_in(state)} <= parameters | others


def test_a_joined_drafter_learns_where_it_has_weights():
    part = tiny_drafter()
    joined = JoinedDrafter(part, LookupDrafter(tiny_target("llama").config))
    before = weights_of(part)
    callback = adapted(joined, every=2, settings=FAST)
    assert serve(joined, 4) == plain(4)
    assert callback.updates == 2
    assert not same(weights_of(part), before)


@pytest.mark.parametrize("name", BASELINES)
def test_other_drafters_learn_as_well(name):
    drafter = baseline(name)
    before, weight = weights_of(drafter), 0.1 if name == "eagle3" else 0.0
    callback = adapted(drafter, every=2, settings=UpdateSettings(steps=1, drift_weight=weight))
    assert serve(drafter, 4) == plain(4)
    assert callback.failure is None and callback.updates == 2
    assert not same(weights_of(drafter), before)


def test_an_unknown_drift_is_refused():
    drafter = baseline("medusa")
    with pytest.raises(ValueError, match="drift of a MedusaDrafter"):
        adapted(drafter)
    assert drafter.callbacks == ()


def test_a_call_that_ends_after_its_callback_was_removed_changes_nothing():
    drafter = tiny_drafter()
    callback = adapted(drafter, every=1, settings=FAST)

    class Removes(DraftingCallback):
        def on_verify(self, call, tree, scored) -> None:
            if callback in drafter.callbacks:
                drafter.remove_callback(callback)

    serve(drafter, 1)
    callback.wait()
    before, updates = weights_of(drafter), callback.updates
    drafter.add_callback(Removes())
    serve(drafter, 1)
    assert callback.updates == updates == 1 and callback.failure is None
    assert same(before, weights_of(drafter))


def test_a_state_is_taken_of_no_update_under_way(monkeypatch):
    drafter = tiny_drafter()
    callback = adapted(drafter, every=1, background=True, settings=FAST)
    serve(drafter, 1)
    held = []
    monkeypatch.setattr(callback, "wait", lambda: held.append(callback._lock._by_process[os.getpid()]._is_owned()))
    callback.load_state_dict(callback.state_dict())
    assert held == [True, True]


def test_several_threads_may_serve_while_it_learns():
    drafter = tiny_drafter()
    callback = adapted(drafter, every=2, background=True, settings=FAST)
    texts = {}

    def work(number: int) -> None:
        texts[number] = serve(drafter, 4)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    callback.wait()
    assert all(answers == plain(4) for answers in texts.values())
    assert callback.queries == 12
    assert callback.failure is None and callback.updates > 0


def test_calls_go_on_while_an_update_runs():
    drafter = tiny_drafter()
    callback = adapted(drafter, every=1, background=True)
    release, train = threading.Event(), callback.updater.train

    def slow(*args):
        release.wait(60)
        return train(*args)

    callback.updater.train = slow
    serve(drafter, 5)
    assert callback.updates == 0 and callback.queries == 5
    # While one update is under way no other is started.
    assert [decision.action for decision in callback.decisions] == ["full"] + ["skip"] * 4
    release.set()
    callback.wait()
    assert callback.updates == 1


def test_no_draft_sees_half_of_an_update():
    drafter = tiny_drafter()
    callback = adapted(drafter, every=1000, background=True)
    parameters = drafter.parameters_of("full")
    marks, drafting, stop = set(), threading.Event(), threading.Event()

    def publish_forever() -> None:
        value = 0.0
        while not stop.is_set():
            value += 1.0
            callback.updater._write(drafter, [torch.full_like(p, value) for p in parameters])

    propose = drafter.propose

    def watch(*args):
        marks.add(tuple({float(p.flatten()[0]) for p in parameters}))
        time.sleep(0.001)
        marks.add(tuple({float(p.flatten()[-1]) for p in parameters}))
        drafting.set()
        return propose(*args)

    callback.updater._write(drafter, [torch.zeros_like(p) for p in parameters])
    drafter.propose = watch
    thread = threading.Thread(target=publish_forever)
    thread.start()
    serve(drafter, 2)
    stop.set()
    thread.join()
    assert len(marks) > 2 and all(len(mark) == 1 for mark in marks)


def test_one_callback_serves_one_drafter():
    callback = adapted(tiny_drafter())
    other = tiny_drafter()
    with pytest.raises(ValueError, match="adapts a drafter already"):
        other.add_callback(callback)
    assert other.callbacks == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"policy": "sometimes"}, "there is no policy"), ({"every": 0}, "every is 0"), ({"top_k": 0}, "top_k 0")],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        OnlineAdaptationCallback(**options)


@pytest.mark.parametrize(("kind", "drift"), [("specblock", 0.1), ("eagle3", 0.1), ("falcon_drafter", 0.0)])
def test_updates_draw_on_the_host_whatever_the_default_device_is(kind, drift):
    drafter = tiny_drafter() if kind == "specblock" else baseline(kind)
    settings = UpdateSettings(learning_rate=1e-3, steps=1, drift_weight=drift)
    callback = adapted(drafter, background=False, every=1, settings=settings)
    batch = {"input_ids": prompt_of(6), "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    with torch.device("meta"):
        for _ in range(2):
            tiny_target("llama").generate(**batch, **GREEDY, assistant_model=drafter)
    assert callback.failure is None and callback.updates == 2
