# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Whatever fails in adaptation, or in a callback of ours: the text comes, and what is in service is finite."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
import torch
from conftest import prompt_of, tiny_target
from serving_for_tests import FAST, GREEDY, KINDS, adapted, plain, same, serve, trainable, weights_of
from test_saving import FULL, contents, room_for
from test_updater import filled_buffer, updater_of
from training_for_tests import tiny_drafter
from transformers import LlamaConfig, LlamaForCausalLM

from specblock_hf.adaptation import OnlineAdaptationCallback, UpdateSettings
from specblock_hf.adaptation import callback as callback_module
from specblock_hf.adaptation.windows import CallRecorder
from specblock_hf.drafters.specblock.loss import SpecBlockObjective
from specblock_hf.drafting.drafter import DraftingCallback
from specblock_hf.generation.callbacks import JsonlTrace, StatisticsLogger, TrackerCallback


HOOKS = ("on_generate_begin", "on_prompt", "on_draft", "on_verify", "on_commit", "on_generate_end")


def finite(drafter) -> bool:
    return all(bool(weight.isfinite().all()) for weight in drafter.parameters_of("full"))


def records_of_ours(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.name.startswith("specblock_hf")]


# What is learned is checked before it comes into service.


def spoil_step(callback, number: int, value: float) -> None:
    """From its step of this number on, an update leaves such a weight behind, after a loss that was finite."""
    updater, steps = callback.updater, []
    step = updater.optimizer.step

    def spoiled(*args, **kwargs):
        step(*args, **kwargs)
        steps.append(None)
        if len(steps) >= number:
            with torch.no_grad():
                updater.trained.lm_head.weight[0, 0] = value

    updater.optimizer.step = spoiled


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("averaging", [0.0, 0.9])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_a_last_step_that_ends_badly_never_comes_into_service(value, averaging, background, caplog):
    drafter = tiny_drafter()
    settings = UpdateSettings(steps=2, averaging=averaging, objective=SpecBlockObjective(num_blocks=1))
    callback = adapted(drafter, every=2, background=background, settings=settings)
    spoil_step(callback, 4, value)
    with caplog.at_level(logging.ERROR, logger="specblock_hf"):
        texts = serve(drafter, 2)
        callback.wait()
        good = weights_of(drafter)  # of the update before
        texts += serve(drafter, 4, first=2)
        callback.wait()
    assert texts == plain(6)
    assert callback.updates == 1 and "what was learned is not finite, or absurdly large, in lm_head" in str(
        callback.failure
    )
    assert same(weights_of(drafter), good)
    # Rolled back with all copies, so that what is kept for a restart is good as well.
    for learning in (callback.updater.trained, callback.updater.averaged):
        assert learning is None or same(weights_of(learning), good)
    assert len(records_of_ours(caplog)) == 1
    drafter.remove_callback(callback)
    assert finite(drafter) and serve(drafter, 2) == plain(2)


def test_what_the_drafters_precision_cannot_hold_never_comes_into_service():
    drafter = tiny_drafter(dtype=torch.float16)
    callback = adapted(drafter, every=2, settings=FAST)
    with torch.no_grad():
        for learning in (callback.updater.trained, callback.updater.averaged):
            learning.layers[0].mlp.down_proj.weight[0, 0] = 7e4  # finite in float32, where training goes on
    assert serve(drafter, 2) == plain(2)
    assert "in layers.0.mlp.down_proj.weight" in str(callback.failure) and finite(drafter)


def test_predictions_that_are_not_finite_never_come_into_service():
    updater, buffer = updater_of(tiny_drafter(dtype=torch.float16)), filled_buffer()
    before = weights_of(updater.deployed)
    with torch.no_grad():
        # Every weight is fine; what they make of a text is not.
        updater.trained.lm_head.weight.fill_(6e4)
        updater.trained.norm.weight.fill_(6e4)
    updater.publish()
    assert not same(weights_of(updater.deployed), before)
    updater.restore(before)
    with torch.no_grad():
        updater.trained.lm_head.weight.fill_(6e4)
        updater.trained.norm.weight.fill_(6e4)
    with pytest.raises(ValueError, match=r"^what was learned predicts values that are not finite\.$"):
        updater.publish(buffer.newest(1))
    assert same(weights_of(updater.deployed), before)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, 1e30])
@pytest.mark.parametrize("part", ["trained", "averaged", "optimizer", "good"])
def test_a_state_that_is_not_finite_is_refused(part, value, tmp_path):
    drafter = tiny_drafter()
    callback = adapted(drafter, every=2, settings=FAST)
    serve(drafter, 4)
    callback.save_state(tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    tensors = {
        "trained": state["updater"]["trained"]["lm_head.weight"],
        "averaged": state["updater"]["averaged"]["lm_head.weight"],
        "optimizer": state["updater"]["optimizer"]["state"][0]["exp_avg"],
        "good": state["good"][0],
    }
    tensors[part].view(-1)[0] = value
    again = tiny_drafter()
    resumed = adapted(again, every=2, settings=FAST)
    before = weights_of(again)
    with pytest.raises(ValueError, match=r"^this state is not finite, or absurdly large, in .*; load one that was"):
        resumed.load_state_dict(state)
    assert same(weights_of(again), before) and resumed.queries == 0
    resumed.load_state(tmp_path / "state.pt")
    assert same(weights_of(again), weights_of(drafter)) and resumed.queries == 4


@pytest.mark.parametrize("room", [0, 3000])
def test_a_full_disk_leaves_the_state_and_the_drafter_before(room, tmp_path):
    drafter = tiny_drafter()
    callback = adapted(drafter, every=2, settings=FAST)
    callback.save_state(tmp_path / "state.pt")
    callback.save_pretrained(tmp_path / "drafter")
    before = contents(tmp_path)
    serve(drafter, 2)
    with pytest.raises(FULL), room_for(room):
        callback.save_state(tmp_path / "state.pt")
    with pytest.raises(FULL), room_for(room):
        callback.save_pretrained(tmp_path / "drafter")
    assert contents(tmp_path) == before


def test_a_state_is_of_the_moment_at_which_it_was_taken():
    drafter = tiny_drafter()
    callback = adapted(drafter, every=1, settings=FAST)
    serve(drafter, 2)
    state = callback.state_dict()
    heads = [state["updater"][name]["lm_head.weight"] for name in ("trained", "averaged")]
    taken = [head.clone() for head in heads]
    serve(drafter, 2)
    assert callback.updates == 4 and same(heads, taken)
    assert not torch.equal(callback.updater.trained.lm_head.weight, taken[0])
    callback.load_state_dict(state)
    state["good"][0].fill_(torch.nan)
    assert finite(drafter) and all(bool(weight.isfinite().all()) for weight in callback._good)


def test_a_state_of_another_drafter_is_refused():
    callback = adapted(tiny_drafter(), settings=FAST)
    state = callback.state_dict()
    for other, named in (
        (tiny_drafter(seed=2), "d2t, t2d"),
        (tiny_drafter(rank_hidden_size=8), r".*rank_head\.0\.weight"),
    ):
        resumed = adapted(other, settings=FAST)
        before = weights_of(other)
        with pytest.raises(ValueError, match=rf"^this state is another drafter's: they differ in {named}"):
            resumed.updater.load_state_dict(state["updater"])
        assert same(weights_of(other), before)
        with pytest.raises(ValueError, match="another drafter's"):
            resumed.load_state_dict(state)
    with pytest.raises(ValueError, match=r"^this is not the state of an adaptation: it lacks bandit, good, queries, "):
        callback.load_state_dict(tiny_drafter().state_dict())


def test_an_update_leaves_no_gradients_in_the_target():
    target = tiny_target("llama")
    drafter = trainable("dflash", target)
    callback = adapted(drafter, every=2, settings=FAST)
    serve(drafter, 2)
    assert callback.updates == 1 and all(weight.requires_grad for weight in target.parameters())
    assert all(weight.grad is None for weight in target.parameters())


# Every kind learns.


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("vocab_size", [32, 20])
def test_every_kind_that_can_be_trained_learns_whatever_the_vocabulary(name, vocab_size):
    config = LlamaConfig(**tiny_target("llama").config.to_dict() | {"vocab_size": vocab_size})
    torch.manual_seed(0)
    target = LlamaForCausalLM(config).eval()
    drafter = trainable(name, target)
    before = weights_of(drafter)
    # No more tokens are kept of each distribution than there are.
    callback = adapted(drafter, every=2, settings=UpdateSettings(steps=1, drift_weight=0.1 * drafter.predicts_at_once))
    for number in range(4):
        prompt = prompt_of(6, number) % vocab_size
        output = target.generate(prompt, assistant_model=drafter, **GREEDY)
        assert torch.equal(output, target.generate(prompt, **GREEDY))
    assert callback.failure is None and callback.updates == 2 and finite(drafter)
    assert not same(weights_of(drafter), before)


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_whose_drift_is_not_known_says_so(name):
    drafter = trainable(name, tiny_target("llama"))
    if drafter.predicts_at_once:
        adapted(drafter)
        return
    with pytest.raises(ValueError, match=rf"^the drift of a {type(drafter).__name__} from what it was cannot be mea"):
        adapted(drafter)


# Nobody's text is lost to a callback of ours.


class Failing(DraftingCallback):
    """Raises in one hook."""

    def __init__(self, hook: str, error: BaseException, optional: bool):
        self.optional, self.told = optional, []
        for name in HOOKS:
            setattr(self, name, lambda *args, name=name: self._hear(name, hook, error))

    def _hear(self, name: str, hook: str, error: BaseException) -> None:
        self.told.append(name)
        if name == hook:
            raise error


@pytest.mark.parametrize("hook", HOOKS)
def test_an_optional_callback_that_raises_is_switched_off_and_logged_once(hook, caplog):
    drafter, failing, other = tiny_drafter(), Failing(hook, OSError("full"), True), Failing("", OSError(), False)
    drafter.add_callback(failing)
    drafter.add_callback(other)
    with caplog.at_level(logging.ERROR, logger="specblock_hf"):
        assert serve(drafter, 3) == plain(3)
    assert failing.told.count(hook) == 1 and failing.told[-1] == hook
    assert other.told.count("on_generate_end") == 3
    assert isinstance(failing.failure, OSError)
    assert records_of_ours(caplog) == ["Failing has failed and is off from now on; calls go on."]


@pytest.mark.parametrize("hook", HOOKS)
def test_somebody_elses_callback_that_raises_ends_the_call(hook):
    drafter = tiny_drafter()
    drafter.add_callback(Failing(hook, OSError("theirs"), False))
    with pytest.raises(OSError, match="theirs"):
        serve(drafter, 1)


def test_an_interrupt_is_nobodys_failure():
    drafter, failing = tiny_drafter(), Failing("on_draft", KeyboardInterrupt(), True)
    drafter.add_callback(failing)
    with pytest.raises(KeyboardInterrupt):
        serve(drafter, 1)
    assert failing.failure is None


def break_it(callback: OnlineAdaptationCallback, where: str, monkeypatch) -> None:
    def fail(*args, **kwargs):
        raise RuntimeError(f"{where} is out of memory")

    owner, name = {
        "recorder": (CallRecorder, "__init__"),
        "prompt": (CallRecorder, "add_prompt"),
        "first tokens": (CallRecorder, "close_prompt"),
        "rounds": (CallRecorder, "add_round"),
        "windows": (CallRecorder, "windows"),
        "watcher": (callback.monitor, "see"),
        "snapshot": (callback.updater, "snapshot"),
        "bandit": (callback.bandit, "step"),
        "starter": (callback.updater, "draw"),
        "thread": (callback_module.ThreadPoolExecutor, "submit"),
        "training": (callback.updater, "train"),
        "publishing": (callback.updater, "publish"),
        "clock": (callback, "clock"),
    }[where]
    monkeypatch.setattr(owner, name, fail)


IN_ITS_THREAD = ("thread", "training", "publishing")


@pytest.mark.parametrize(
    ("where", "background"),
    [
        *((part, False) for part in ("recorder", "prompt", "first tokens", "rounds", "windows", "clock")),
        *((part, False) for part in ("watcher", "snapshot", "bandit", "starter", "training", "publishing")),
        *((part, True) for part in IN_ITS_THREAD),
    ],
)
def test_no_part_of_adaptation_costs_a_text(where, background, monkeypatch, caplog):
    drafter = tiny_drafter()
    policy = "bandit" if where == "bandit" else "always"
    callback = adapted(drafter, policy, every=2, background=background, settings=FAST)
    callback.monitor.interval = 4
    serve(drafter, 2)
    callback.wait()
    break_it(callback, where, monkeypatch)
    before = weights_of(drafter)
    with caplog.at_level(logging.ERROR, logger="specblock_hf"):
        assert serve(drafter, 6) == plain(6)
        callback.wait()
        assert serve(drafter, 2) == plain(2)
    assert "is out of memory" in str(callback.failure) and not callback.learns
    assert len(records_of_ours(caplog)) == 1
    # The weights of before; the watcher looks later, after other updates.
    assert finite(drafter) and (same(weights_of(drafter), before) or where in ("watcher", "snapshot"))
    monkeypatch.undo()
    drafter.remove_callback(callback)


def test_a_full_disk_costs_no_text(tmp_path, caplog):
    drafter, trace = tiny_drafter(), JsonlTrace(tmp_path / "trace.jsonl")
    drafter.add_callback(trace)
    serve(drafter, 1)
    trace.path = Path("/dev/full")
    with caplog.at_level(logging.ERROR, logger="specblock_hf"):
        assert serve(drafter, 2) == plain(2)
    assert isinstance(trace.failure, OSError) and len(records_of_ours(caplog)) == 1


def test_what_ended_a_callback_keeps_nothing_of_its_call_alive(caplog):
    class Fails(DraftingCallback):
        optional = True

        def on_verify(self, call, tree, scored):
            try:
                _ = {}["no such key"]
            except KeyError as error:
                raise OSError("full") from error

    drafter, failing = tiny_drafter(), Fails()
    drafter.add_callback(failing)
    with caplog.at_level(logging.ERROR, logger="specblock_hf"):
        serve(drafter, 1)
    failure = failing.failure
    assert str(failure) == "full"
    assert failure.__traceback__ is failure.__cause__ is failure.__context__ is None
    assert "no such key" in caplog.text and "in on_verify" in caplog.text


def test_a_tracker_that_is_down_costs_no_text():
    class Down:
        def log(self, values, step=None):
            raise ConnectionError("down")

    drafter, tracking = tiny_drafter(), TrackerCallback(Down())
    drafter.add_callback(tracking)
    assert serve(drafter, 2) == plain(2)
    assert isinstance(tracking.failure, ConnectionError)
    assert StatisticsLogger.optional and OnlineAdaptationCallback.optional and not DraftingCallback.optional


def test_several_calls_at_once_survive_the_same_failure():
    drafter, failing = tiny_drafter(), Failing("on_commit", OSError("full"), True)
    drafter.add_callback(failing)
    texts = {}

    def work(number: int) -> None:
        texts[number] = serve(drafter, 3)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(text == plain(3) for text in texts.values()) and len(texts) == 3
