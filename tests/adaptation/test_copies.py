# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Copies of a drafter that somebody listens to: by `copy`, by pickle, in new and in forked processes."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import threading

import pytest
import torch
from baselines_for_tests import BASELINES, baseline
from block_drafters_for_tests import block_drafter
from conftest import tiny_target
from serving_for_tests import adapted, plain, same, serve, weights_of
from training_for_tests import tiny_drafter

from specblock_hf import JoinedDrafter, LookupDrafter
from specblock_hf.adaptation import OnlineAdaptationCallback, UpdateSettings
from specblock_hf.drafting.drafter import DrafterLock
from specblock_hf.generation.callbacks import JsonlTrace, StatisticsLogger


NO_DRIFT = UpdateSettings(steps=1, drift_weight=0.0)
DRAFTERS = {
    "specblock": tiny_drafter,
    **{name: lambda name=name: baseline(name) for name in BASELINES},
    "dflash": block_drafter,
    "lookup": lambda: LookupDrafter(tiny_target("llama").config),
    "joined": lambda: JoinedDrafter(tiny_drafter(), LookupDrafter(tiny_target("llama").config)),
}


def through_a_file(drafter):
    file = io.BytesIO()
    torch.save(drafter, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda drafter: pickle.loads(pickle.dumps(drafter)),
    "torch.save": through_a_file,
}


@pytest.fixture(params=DRAFTERS)
def busy(request, tmp_path):
    """A drafter with everything that hangs on one, in service."""
    drafter = DRAFTERS[request.param]()
    learning = bool(drafter.parameters_of("full"))
    if learning:
        callback = adapted(drafter, every=2, background=True, settings=NO_DRIFT)
    drafter.add_callback(JsonlTrace(tmp_path / "trace.jsonl"))
    drafter.add_callback(StatisticsLogger())
    serve(drafter, 3)
    if learning:
        callback.wait()  # or its weights would change between the copy and the look at both
    yield drafter
    for callback in drafter.callbacks:
        drafter.remove_callback(callback)


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_drafts_alike_and_nobody_listens_to_it(busy, way):
    listening, calls = busy.callbacks, busy.last_statistics
    drafts = COPIES[way](busy)
    assert type(drafts) is type(busy) and drafts.callbacks == () and drafts.last_statistics is None
    assert same(weights_of(drafts), weights_of(busy))
    assert serve(drafts, 2) == plain(2)
    assert busy.callbacks == listening and busy.last_statistics is calls
    drafts.add_callback(StatisticsLogger())
    assert busy.callbacks == listening


def test_what_was_compiled_for_a_drafter_stays_with_it():
    drafter = tiny_drafter()
    drafter.compiled_rounds = threading.Lock()  # no more to be copied than compiled code is
    for way in COPIES.values():
        assert way(drafter).compiled_rounds is None
    assert drafter.compiled_rounds is not None


def test_a_shallow_copy_shares_weights_and_lock_and_a_deep_one_neither():
    drafter = tiny_drafter()
    shallow, deep = copy.copy(drafter), copy.deepcopy(drafter)
    assert shallow.lm_head is drafter.lm_head and shallow.lock is drafter.lock
    assert deep.lm_head is not drafter.lm_head and deep.lock is not drafter.lock
    joined = copy.deepcopy(JoinedDrafter(drafter, LookupDrafter(tiny_target("llama").config)))
    assert joined.lock is joined.parts[0].lock


def test_a_callback_at_work_is_not_copied():
    fresh = copy.deepcopy(OnlineAdaptationCallback(every=3))
    assert fresh.every == 3
    callback = adapted(tiny_drafter())
    for way in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(
            TypeError, match=r"^this callback adapts a drafter and cannot be copied or pickled along; "
        ):
            way(callback)


# Other processes.


def serve_in_child(answers, drafter, callback, texts: int) -> None:
    torch.set_num_threads(1)
    served = serve(drafter, texts)
    figures = None
    if callback is not None:
        figures = (callback.learns, callback.queries, callback.updates)
        callback.wait()
        callback.state_dict()
        drafter.remove_callback(callback)
    answers.put((served, len(drafter.callbacks), figures))


def in_process(method: str, drafter, callback, texts: int):
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    child = context.Process(target=serve_in_child, args=(answers, drafter, callback, texts), daemon=True)
    child.start()
    try:
        return answers.get(timeout=600)
    finally:
        child.kill()
        child.join()


def test_a_new_process_gets_a_drafter():
    drafter = tiny_drafter()
    callback = adapted(drafter, every=2, background=True, settings=NO_DRIFT)
    serve(drafter, 3)
    assert in_process("spawn", drafter, None, 2) == (plain(2), 0, None)
    drafter.remove_callback(callback)


def test_a_forked_process_serves_without_learning_and_lets_go_of_the_callback():
    drafter = tiny_drafter()
    callback = adapted(drafter, every=1, background=True, settings=NO_DRIFT)
    release, holding = threading.Event(), threading.Event()
    train = callback.updater.train
    callback.updater.train = lambda *args: release.wait(300) and train(*args)
    serve(drafter, 2)
    assert not callback._pending.done()

    def hold() -> None:
        with drafter.lock, callback._lock:
            holding.set()
            release.wait(300)

    holder = threading.Thread(target=hold)
    holder.start()
    holding.wait()
    # Neither the thread that trains nor the one that holds the locks is there in the child.
    try:
        assert in_process("fork", drafter, callback, 2) == (plain(2), 0, (False, 2, 0))
    finally:
        release.set()
        holder.join()
    callback.wait()
    assert callback.learns and callback.updates == 1
    assert serve(drafter, 1) == plain(1)
    drafter.remove_callback(callback)


def test_the_lock_of_a_process_is_one_lock():
    lock, order = DrafterLock(), []

    def work(number: int) -> None:
        for _ in range(50):
            with lock, lock:
                order.append(number)
                order.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(order) == 400 and order[::2] == order[1::2]
