# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What is asked of CUDA before, while and after a graph is captured, without a GPU; and who else has to wait."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from threading import Event, Thread

import pytest
import torch
from conftest import prompt_of, tiny_target
from drafters_for_tests import GarbageDrafter
from graphs_for_tests import PretendedGraphs, recorders
from training_for_tests import tiny_drafter

from specblock_hf import DraftingPlan, compile_rounds
from specblock_hf.calibration import trial
from specblock_hf.devices import synchronize, undisturbed
from specblock_hf.drafting.drafter import TreeDrafter
from specblock_hf.generation import compilation
from specblock_hf.generation.compilation import KEPT, CompiledRounds, rounds_of
from specblock_hf.generation.rounds.graphs import CudaGraphs, Step


GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 40}
CPU = torch.device("cpu")


class Cuda:
    """In place of `torch.cuda`: which stream is the present one, and on which graphs were captured and how it went."""

    def __init__(self, monkeypatch):
        self.now, self.captures, self.pools = "main", [], 0
        for name in ("Stream", "stream", "current_stream", "graph", "graph_pool_handle", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    class Stream:
        def __init__(self, device, priority=0):
            self.device, self.priority = device, priority

        def wait_stream(self, other):
            pass

    class CUDAGraph:
        def replay(self):
            pass

    def current_stream(self, device):
        return self.Stream(device)

    def graph_pool_handle(self):
        self.pools += 1
        return self.pools

    @contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert undisturbed.locked()
        self.captures.append([pool, stream, "failed"])
        self.now = stream
        yield  # a capture that fails leaves everything as it is
        self.now, self.captures[-1][2] = "main", "ended"


def test_what_is_captured_runs_on_a_stream_on_which_nothing_else_does(monkeypatch):
    cuda = Cuda(monkeypatch)
    monkeypatch.setattr(torch, "zeros", lambda *args, **kwargs: None)
    graphs, ran = CudaGraphs(CPU), []
    graphs.warm(lambda: ran.append(cuda.now))
    graphs.record(lambda: ran.append(cuda.now))
    # Of one priority torch hands out the same streams again and again.
    assert [stream.priority for stream in ran] == [0, -1] and cuda.now == "main"
    assert cuda.captures == [[1, ran[1], "ended"]]
    with pytest.raises(RuntimeError, match="not permitted"):
        graphs.record(refuse)
    # The stream is left, and a capture has ended well after the one that did not.
    assert cuda.now == "main" and not undisturbed.locked()
    assert cuda.captures[1:] == [[1, ran[1], "failed"], [2, ran[1], "ended"]]


def refuse():
    raise RuntimeError("operation not permitted when stream is capturing")


def test_nobody_waits_for_a_device_on_which_a_graph_is_captured(monkeypatch):
    waited = Event()
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: waited.set())
    with undisturbed:
        waiting = Thread(target=synchronize, args=[torch.device("cuda")])
        waiting.start()
        assert not waited.wait(0.05)
    waiting.join()
    assert waited.is_set()


def test_steps_stop_capturing_together():
    """What the first could not be captured of is no place that another may go on from."""
    made = [PretendedGraphs()]
    first = Step(refuse_once(), lambda: made[0] if made else None, lambda error: made.clear())
    second = Step(lambda: torch.ones(1), lambda: made[0] if made else None, pytest.fail)
    assert not first.settled and not second.settled
    assert first().tolist() == second().tolist() == [1.0]
    assert (first.settled, second.settled, second.captured, second().tolist()) == (False, True, False, [1.0])
    first()
    assert first.settled


def refuse_once():
    calls = []

    def function() -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:  # the first runs as it is
            raise torch.OutOfMemoryError("no room in the pool")
        return torch.ones(1)

    return function


class FailsFirst(PretendedGraphs):
    failed: list[bool] = []

    def record(self, function):
        if not self.failed:
            self.failed.append(True)
            raise torch.OutOfMemoryError("no room in the pool")
        return super().record(function)


@pytest.mark.parametrize("helper", [GarbageDrafter, tiny_drafter], ids=["the target's", "a drafter's"])
def test_a_step_that_cannot_be_captured_leaves_the_text(helper, monkeypatch, llama):
    monkeypatch.setattr(FailsFirst, "failed", [])
    monkeypatch.setattr(compilation, "recorder_for", lambda device: FailsFirst)
    monkeypatch.setattr(compilation, "PATIENCE", 2)
    drafter = helper(llama.config.vocab_size) if helper is GarbageDrafter else helper()
    drafter.drafting_plan = DraftingPlan(6, 1)
    drafter.compiled_rounds = CompiledRounds(llama.device)
    prompt = prompt_of(9)
    plain = llama.generate(prompt, **GREEDY)
    for _ in range(2):
        assert torch.equal(
            llama.generate(prompt, **GREEDY, cache_implementation="static", assistant_model=drafter), plain
        )
    assert FailsFirst.failed and drafter.last_statistics.eager_because.startswith("a round could not be captured: no")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["as they are", "autocast"])
def test_replays_read_the_weights_of_the_moment(dtype, monkeypatch):
    monkeypatch.setattr(compilation, "recorder_for", recorders([]))
    prompt, texts, captured = prompt_of(9), [], []
    for patience in (10**6, 1):  # never captured, but of the same shapes, which bfloat16 rounds by
        monkeypatch.setattr(compilation, "PATIENCE", patience)
        target = deepcopy(tiny_target("llama"))
        drafter = captured_drafter(target)
        for factor in (1.0, -0.5):
            with torch.no_grad():
                target.model.layers[0].mlp.down_proj.weight.mul_(factor)
            with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
                output = target.generate(prompt, **GREEDY, cache_implementation="static", assistant_model=drafter)
            texts.append(output.tolist())
        captured.append(drafter.last_statistics.captured_rounds > 0)
    assert captured == [False, True] and texts[:2] == texts[2:] and texts[0] != texts[1]


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_drafts_that_were_captured_after_the_targets_rounds_outlive_these(sampled, monkeypatch, llama):
    monkeypatch.setattr(compilation, "recorder_for", recorders([]))
    monkeypatch.setattr(compilation, "PATIENCE", 1)
    captured, eager = captured_drafter(llama), tiny_drafter()
    options = GREEDY | {"do_sample": sampled}
    for plan in (DraftingPlan(6, 1), DraftingPlan(7, 2)):
        captured.drafting_plan = eager.drafting_plan = plan
        for cache in ("static", None):
            torch.manual_seed(0)
            text = llama.generate(prompt_of(9), **options, cache_implementation=cache, assistant_model=captured)
            torch.manual_seed(0)
            expected = llama.generate(prompt_of(9), **options, assistant_model=eager)
            assert torch.equal(text, expected)
            assert captured.last_statistics.accepted == eager.last_statistics.accepted
            assert captured.last_statistics.captured_drafts


def test_rounds_are_of_one_device(llama):
    drafter = tiny_drafter()
    drafter.compiled_rounds = CompiledRounds(torch.device("meta"))
    assert rounds_of(drafter, CPU) is None and drafter.compiled_rounds is None
    rounds = compile_rounds(llama, drafter, max_length=32)
    assert rounds_of(drafter, torch.device("meta")) is rounds
    rounds.device = torch.device("meta")
    plain = llama.generate(prompt_of(9), **GREEDY | {"max_new_tokens": 8})
    assert torch.equal(llama.generate(prompt_of(9), **GREEDY | {"max_new_tokens": 8}, assistant_model=drafter), plain)
    assert drafter.last_statistics.eager_because == "rounds were compiled on meta"


def test_memory_of_rounds_is_free_before_there_are_others(monkeypatch, llama):
    monkeypatch.setattr(compilation, "recorder_for", recorders([]))
    monkeypatch.setattr(compilation, "STEP", 16)
    drafter = captured_drafter(llama)
    gone = []
    gc.disable()
    try:
        for length in (9, 60):
            llama.generate(prompt_of(length), **GREEDY, cache_implementation="static", assistant_model=drafter)
            rounds = drafter.compiled_rounds
            assert all(one() is None for one in gone)
            gone = [weakref.ref(rounds._target.memory), weakref.ref(rounds._drafts[-1])]
            del rounds
    finally:
        gc.enable()


def captured_drafter(target) -> TreeDrafter:
    drafter = tiny_drafter()
    drafter.drafting_plan = DraftingPlan(6, 1)
    drafter.compiled_rounds = CompiledRounds(target.device)
    return drafter


def test_plans_that_are_tried_in_turns_are_captured_once_each(monkeypatch, llama):
    made: list[PretendedGraphs] = []
    monkeypatch.setattr(compilation, "recorder_for", recorders(made))
    drafter = captured_drafter(llama)
    plans = [DraftingPlan(nodes, 1) for nodes in range(2, 6 + KEPT)]
    speeds = trial.try_plans(target=llama, drafter=drafter, plans=plans, prompts=[prompt_of(5), prompt_of(7)])
    assert len(speeds) == len(plans) and [graphs.captured for graphs in made] == [1] * len(plans)
    assert drafter.compiled_rounds.kept == len(drafter.compiled_rounds._drafts) == KEPT


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "reduce-overhead"},
        {"mode": "max-autotune"},
        {"backend": "cudagraphs"},
        {"options": {"triton.cudagraphs": True}},
    ],
    ids=str,
)
def test_graphs_within_graphs_are_refused(options, monkeypatch, llama):
    monkeypatch.setattr(type(llama), "device", property(lambda self: torch.device("cuda")))
    with pytest.raises(ValueError, match=r"^torch\.compile would capture graphs of its own within those of rounds"):
        compile_rounds(llama, GarbageDrafter(llama.config.vocab_size), **options)
