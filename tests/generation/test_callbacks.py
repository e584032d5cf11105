# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Callbacks are told what happens, in order and for the right call, and change nothing."""

from __future__ import annotations

import json
import logging
import threading

import pytest
import torch
from accelerate.tracking import GeneralTracker
from conftest import VOCAB, prompt_of
from drafters_for_tests import GarbageDrafter, OracleDrafter

from specblock_hf import JoinedDrafter, LookupDrafter
from specblock_hf.drafting.drafter import DraftingCallback
from specblock_hf.generation.callbacks import JsonlTrace, StatisticsLogger, TrackerCallback


GREEDY = {"do_sample": False, "max_new_tokens": 12}


class Told(DraftingCallback):
    """Writes down the name of every hook and what it was given."""

    def __init__(self):
        self.heard = []

    def _hear(self, *told):
        self.heard.append(told)

    def names(self):
        return [name for name, *_ in self.heard]

    def of(self, name):
        return [told[1:] for told in self.heard if told[0] == name]

    def on_add(self, drafter):
        self._hear("add", drafter)

    def on_remove(self, drafter):
        self._hear("remove", drafter)

    def on_generate_begin(self, call):
        self._hear("begin", call)

    def on_prompt(self, call, pairs):
        self._hear("prompt", call, pairs)

    def on_draft(self, call, tree):
        self._hear("draft", call, tree)

    def on_verify(self, call, tree, scored):
        self._hear("verify", call, tree, scored)

    def on_commit(self, call, tree, scored, walk, pairs):
        self._hear("commit", call, tree, scored, walk, pairs)

    def on_generate_end(self, call):
        self._hear("end", call, call.statistics.rounds, call.statistics.seconds)


@pytest.fixture
def drafter():
    return GarbageDrafter(VOCAB)


def test_hooks_come_in_the_order_of_a_round(llama, drafter):
    told = Told()
    drafter.add_callback(told)
    llama.generate(prompt_of(5), assistant_model=drafter, **GREEDY)
    rounds = drafter.last_statistics.rounds
    assert rounds > 1
    assert told.names() == ["add", "begin", "prompt", "commit"] + ["draft", "verify", "commit"] * rounds + ["end"]
    assert len({id(call) for call, *_ in (event[1:] for event in told.heard[1:])}) == 1


def test_hooks_see_what_the_loop_sees(llama, drafter):
    told = Told()
    drafter.add_callback(told)
    prompt = prompt_of(5)
    text = llama.generate(prompt, assistant_model=drafter, **GREEDY)
    emitted = [t for _, _, _, walk, _ in told.of("commit") for t in walk.tokens[0, : int(walk.lengths[0])].tolist()]
    assert emitted == text[0, 5:].tolist()
    ((_, prompt_pairs),) = told.of("prompt")
    assert prompt_pairs.tokens[0].tolist() == text[0, 1:6].tolist()
    for (_, drafted), (_, verified, scored) in zip(told.of("draft"), told.of("verify"), strict=True):
        assert drafted is verified
        assert scored.logits.shape[1] == drafted.tokens.shape[1]
    ((call, rounds, seconds),) = told.of("end")
    assert call.statistics is drafter.last_statistics
    assert (rounds, call.batch_size) == (len(told.of("draft")), 1)
    assert seconds > 0


def test_a_prompt_in_chunks_is_told_chunk_by_chunk(llama, drafter):
    told = Told()
    drafter.add_callback(told)
    text = llama.generate(prompt_of(7), assistant_model=drafter, prefill_chunk_size=3, **GREEDY)
    chunks = [pairs.tokens[0].tolist() for _, pairs in told.of("prompt")]
    assert [len(chunk) for chunk in chunks] == [3, 3, 1]
    assert sum(chunks, []) == text[0, 1:8].tolist()


def test_several_callbacks_in_order_and_removal(llama, drafter):
    first, second = Told(), Told()
    order = []
    first.on_generate_end = lambda call: order.append("first")
    second.on_generate_end = lambda call: order.append("second")
    drafter.add_callback(first)
    drafter.add_callback(second)
    llama.generate(prompt_of(5), assistant_model=drafter, **GREEDY)
    drafter.remove_callback(first)
    llama.generate(prompt_of(5), assistant_model=drafter, **GREEDY)
    assert order == ["first", "second", "second"]
    assert first.names().count("remove") == 1
    with pytest.raises(ValueError, match="was not added"):
        drafter.remove_callback(first)


def test_callbacks_belong_to_one_drafter(drafter):
    drafter.add_callback(Told())
    assert GarbageDrafter(VOCAB).callbacks == ()


def test_a_joined_drafter_keeps_the_callbacks_of_its_first_part(llama):
    part, told = GarbageDrafter(VOCAB), Told()
    part.add_callback(told)
    llama.generate(prompt_of(5), assistant_model=JoinedDrafter(part, LookupDrafter(llama.config)), **GREEDY)
    assert told.names()[-1] == "end"


@pytest.mark.parametrize("sampled", [False, True])
def test_the_text_is_the_same_with_callbacks(llama, drafter, tmp_path, sampled):
    options = GREEDY | {"do_sample": sampled}
    torch.manual_seed(3)
    plain = llama.generate(prompt_of(5), **options)
    drafter.add_callback(Told())
    drafter.add_callback(JsonlTrace(tmp_path / "trace.jsonl"))
    torch.manual_seed(3)
    assert torch.equal(llama.generate(prompt_of(5), assistant_model=drafter, **options), plain)


def test_what_a_hook_raises_ends_the_call(llama, drafter):
    class Broken(DraftingCallback):
        def on_draft(self, call, tree):
            raise RuntimeError("broken hook")

    drafter.add_callback(Broken())
    with pytest.raises(RuntimeError, match="broken hook"):
        llama.generate(prompt_of(5), assistant_model=drafter, **GREEDY)


def test_notes_stay_with_their_call(llama):
    class Counts(DraftingCallback):
        def __init__(self):
            self.results = {}

        def on_generate_begin(self, call):
            call.notes[self] = 0

        def on_commit(self, call, tree, scored, walk, pairs):
            call.notes[self] += int(walk.lengths.sum())

        def on_generate_end(self, call):
            self.results[threading.current_thread()] = call.notes[self]

    drafter, counts, lengths = GarbageDrafter(VOCAB), Counts(), {}
    drafter.add_callback(counts)

    def serve(tokens):
        llama.generate(prompt_of(5), assistant_model=drafter, do_sample=False, max_new_tokens=tokens)
        lengths[threading.current_thread()] = tokens

    threads = [threading.Thread(target=serve, args=(tokens,)) for tokens in (7, 11, 19)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(counts.results.values()) == [7, 11, 19]
    assert counts.results == lengths


def test_trace_has_a_line_for_every_round_and_call_and_no_token(llama, tmp_path):
    prompt = prompt_of(5)
    text = llama.generate(prompt, **GREEDY)[0].tolist()
    drafter, path = OracleDrafter(VOCAB, text), tmp_path / "logs" / "trace.jsonl"
    trace = JsonlTrace(path)
    drafter.add_callback(trace)
    llama.generate(prompt, assistant_model=drafter, **GREEDY)
    drafter.remove_callback(trace)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    statistics = drafter.last_statistics
    assert [row["event"] for row in rows] == ["commit"] * (statistics.rounds + 1) + ["end"]
    assert [row["emitted"][0] for row in rows[1:-1]] == [kept + 1 for kept in statistics.accepted]
    assert sum(row["nodes"][0] for row in rows[1:-1]) == statistics.nodes_verified
    assert rows[-1]["tau"] == statistics.tau
    assert {"emitted", "rounds", "seconds", "tokens_per_second", "draft_share"} < rows[-1].keys()


def test_a_trace_that_is_taken_off_hears_calls_under_way_and_other_drafters(llama, drafter, tmp_path):
    class Removes(DraftingCallback):
        def on_verify(self, call, tree, scored):
            if trace in drafter.callbacks:
                drafter.remove_callback(trace)

    other, trace = GarbageDrafter(VOCAB), JsonlTrace(tmp_path / "trace.jsonl")
    for one in (drafter, other):
        one.add_callback(trace)
    drafter.add_callback(Removes())
    rounds = []
    for one in (drafter, other):
        llama.generate(prompt_of(5), assistant_model=one, **GREEDY)
        rounds.append(one.last_statistics.rounds)
    events = [json.loads(line)["event"] for line in trace.path.read_text().splitlines()]
    assert events == [event for count in rounds for event in ["commit"] * (count + 1) + ["end"]]
    assert trace.failure is None


def test_a_call_without_rounds_has_no_tau(llama, drafter, tmp_path):
    trace = JsonlTrace(tmp_path / "trace.jsonl")
    drafter.add_callback(trace)
    llama.generate(prompt_of(5), assistant_model=drafter, do_sample=False, max_new_tokens=1)
    drafter.remove_callback(trace)
    last = json.loads((tmp_path / "trace.jsonl").read_text().splitlines()[-1])
    assert last["emitted"] == 1 and "tau" not in last


def test_logger_writes_one_line_a_call(llama, drafter, caplog):
    drafter.add_callback(StatisticsLogger(logging.WARNING))
    with caplog.at_level(logging.WARNING, logger="specblock_hf"):
        for _ in range(2):
            llama.generate(prompt_of(5), assistant_model=drafter, **GREEDY)
    lines = [record.getMessage() for record in caplog.records if record.name == "specblock_hf.generation.callbacks"]
    assert len(lines) == 2
    assert lines[0].startswith("12 tokens in ") and f"tau {drafter.last_statistics.tau:.2f}" in lines[0]


def test_tracker_gets_the_figures_of_every_call(llama, drafter):
    class Kept(GeneralTracker):
        name, requires_logging_directory, tracker = "kept", False, None

        def __init__(self):
            super().__init__(_blank=True)
            self.rows = []

        def log(self, values, step=None, **kwargs):
            self.rows.append((step, values))

    kept = Kept()
    drafter.add_callback(TrackerCallback(kept))
    for _ in range(2):
        llama.generate(prompt_of(5), assistant_model=drafter, **GREEDY)
    assert [step for step, _ in kept.rows] == [0, 1]
    assert kept.rows[1][1]["drafting/tau"] == drafter.last_statistics.tau
