# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Rounds of fixed shapes as CUDA graphs would run them: the same trees, walks and texts, and little for the host."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from baselines_for_tests import baseline
from batches_for_tests import padded_batch
from block_drafters_for_tests import VARIANTS, block_drafter
from conftest import tiny_target
from graphs_for_tests import PretendedGraphs, operators_of, recorders
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_for_tests import tiny_drafter
from transfers_for_tests import DEVICE, HOST, TwoDevices

from specblock_hf import DraftingCallback, DraftingPlan, compile_rounds
from specblock_hf.drafters.joined import JoinedDrafter
from specblock_hf.drafters.lookup import LookupDrafter
from specblock_hf.drafting.drafter import TreeDrafter
from specblock_hf.drafting.pairs import Pairs, TokenTable
from specblock_hf.drafting.statistics import Clock, GenerationStatistics
from specblock_hf.generation import compilation, loop
from specblock_hf.generation.rounds.drafts import DraftRounds
from specblock_hf.generation.rounds.graphs import Step
from specblock_hf.target.fixed import TargetRounds


def joined() -> JoinedDrafter:
    return JoinedDrafter(tiny_drafter(), LookupDrafter(tiny_target("llama").config))


DRAFTERS = {
    "rank-guided": tiny_drafter,
    "best-first": partial(tiny_drafter, expansion="best_first"),
    "eagle3": partial(baseline, "eagle3"),
    "dflash": block_drafter,
    "joined": joined,
    "lookup": lambda: LookupDrafter(tiny_target("llama").config),
}
ALONE, TOGETHER = (9,), (4, 12, 7)
PLAN = DraftingPlan(12, 2, 4)
GREEDY = {"do_sample": False, "max_new_tokens": 22, "pad_token_id": 0}


@pytest.fixture
def graphs(monkeypatch) -> list[PretendedGraphs]:
    """Captures, in pretence, whatever is compiled: for each drafter an entry of the target's rounds and of its own."""
    made: list[PretendedGraphs] = []
    monkeypatch.setattr(compilation, "recorder_for", recorders(made))
    return made


class Rounds(DraftingCallback):
    """Keeps every tree without its padding, every walk, and what the drafter is told."""

    def __init__(self):
        self.seen = []

    def on_draft(self, call, tree):
        rows = zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True)
        self.seen.append([[pair for pair in zip(*row, strict=True) if pair[1] > -2] for row in rows])

    def on_commit(self, call, tree, scored, walk, pairs):
        told = [row[:length] for row, length in zip(pairs.tokens.tolist(), pairs.lengths.tolist(), strict=True)]
        self.seen.append((walk.nodes.tolist(), walk.tokens.tolist(), walk.stopped.tolist(), told))


def call(
    drafter: TreeDrafter, lengths: tuple[int, ...], seed: int | None = None, **options
) -> tuple[list, list, GenerationStatistics]:
    """The text, what its rounds were, and the figures."""
    rounds = Rounds()
    drafter.add_callback(rounds)
    if seed is not None:
        torch.manual_seed(seed)
    text = tiny_target("llama").generate(**padded_batch(lengths), **GREEDY | options, assistant_model=drafter)
    drafter.remove_callback(rounds)
    return text.tolist(), rounds.seen, drafter.last_statistics


def compiled(drafter: TreeDrafter, lengths: tuple[int, ...], plan: DraftingPlan = PLAN, most: int = 40) -> TreeDrafter:
    drafter.drafting_plan = plan
    compile_rounds(tiny_target("llama"), drafter, batch_size=len(lengths), max_length=most)
    return drafter


@pytest.mark.parametrize("options", [{}, {"eos_token_id": 5}, {"do_sample": True}], ids=["greedy", "eos", "sampled"])
@pytest.mark.parametrize("lengths", [ALONE, TOGETHER], ids=len)
@pytest.mark.parametrize("name", DRAFTERS)
def test_captured_rounds_are_the_eager_ones(name, lengths, options, graphs):
    drafter = DRAFTERS[name]()
    drafter.drafting_plan = PLAN
    eager = [call(drafter, lengths, seed, **options) for seed in range(2)]
    compiled(drafter, lengths)
    captured = [call(drafter, lengths, seed, **options) for seed in range(2)]
    for (text, seen, figures), (again, seen_again, now) in zip(eager, captured, strict=True):
        assert text == again and seen == seen_again
        assert figures.accepted == now.accepted and figures.cut == now.cut
        assert now.compiled_rounds == now.rounds and now.eager_because is None
    # All but the first rounds of each size replay; no step is captured twice.
    assert captured[1][2].captured_rounds == captured[1][2].rounds
    assert sum(made.captured for made in graphs) <= 1 + 2 * 3


KINDS = {
    "markov": partial(tiny_drafter, markov_rank=4),
    "markov, best-first": partial(tiny_drafter, markov_rank=4, expansion="best_first"),
    **{name: partial(block_drafter, name) for name in VARIANTS if name != "dflash"},
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_block_has_rounds_of_fixed_shapes(name, graphs):
    drafter = KINDS[name]()
    drafter.drafting_plan = PLAN
    eager = call(drafter, TOGETHER)
    for _ in range(2):  # the second one replays all of its rounds but the first
        again = call(compiled(drafter, TOGETHER) if drafter.compiled_rounds is None else drafter, TOGETHER)
        assert eager[:2] == again[:2]
    assert again[2].captured_drafts >= again[2].rounds - 1 and again[2].eager_because is None


def test_what_a_probability_cuts_off(graphs):
    plan = DraftingPlan(12, 3, 4, min_probability=1e-3, min_start_probability=1e-2)
    drafter = tiny_drafter()
    drafter.drafting_plan = plan
    eager = call(drafter, TOGETHER)
    assert eager[:2] == call(compiled(drafter, TOGETHER, plan), TOGETHER)[:2]
    assert {len(row) for tree in eager[1][1::2] for row in tree} > {1}


class OffDevice(TorchDispatchMode):
    """Refuses whatever is not on the device alone."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        used = {leaf.device.type for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)}
        assert used <= {"meta"}, f"{function} works on {used}"
        return result


@pytest.mark.parametrize("name", [name for name in DRAFTERS if name not in ("joined", "lookup")])
@pytest.mark.parametrize("rows", [1, 3])
def test_captured_steps_touch_nothing_on_the_host(name, rows):
    target, drafter = (copy.deepcopy(model).to("meta") for model in (tiny_target("llama"), DRAFTERS[name]()))
    table, layers, plan = TokenTable.of(target), drafter.feature_layers_for(target), DraftingPlan(12, 2, 4, 0, 0.1)

    def step(function):
        return Step(function, lambda: None, pytest.fail)

    with torch.no_grad():
        sized = TargetRounds(target, layers, rows, 40, (1, 16), step).sized(13)
        drafts = DraftRounds(drafter, table, rows, 40, plan, step)
        ids = torch.zeros(rows, 3, dtype=torch.long, device="meta")
        features = tuple(torch.zeros(rows, 3, target.config.hidden_size, device="meta") for _ in layers)
        drafts.load(Pairs(ids, features, ids, ids[:, 0], table))
        with OffDevice():
            tree = drafts.step()
            sized.judged = sized.score()
            sized.walk()
            sized.commit()
    assert tree.tokens.shape == (rows, 13) and sized.judged.logits.shape[1] == 16


class Marks(DraftingCallback):
    """How much had been moved at the end of every round."""

    def __init__(self, devices: TwoDevices):
        self.devices, self.moved = devices, []

    def on_commit(self, call, tree, scored, walk, pairs):
        self.moved.append(len(self.devices.transfers))


@pytest.mark.parametrize("lengths", [ALONE, TOGETHER], ids=len)
@pytest.mark.parametrize("name", DRAFTERS)
def test_a_round_is_few_operators_and_one_wait(name, lengths, graphs, monkeypatch):
    drafter, devices = compiled(DRAFTERS[name](), lengths), TwoDevices()
    call(drafter, lengths)  # captures
    monkeypatch.setattr(loop, "Clock", lambda device: Clock(HOST))
    counts = operators_of_rounds(drafter, lengths)
    steady = counts[2:-2]
    assert len(steady) > 8 and max(steady) <= 60, steady
    marks = Marks(devices)
    drafter.add_callback(marks)
    drafter.compiled_rounds.device = DEVICE
    with devices:
        tiny_target("llama").generate(**padded_batch(lengths), **GREEDY, assistant_model=drafter)
    for first, last in list(zip(marks.moved[1:], marks.moved[2:], strict=False))[:7]:
        waits = [part for part in devices.transfers[first:last] if part.kind != "quiet upload"]
        assert [(wait.kind, wait.line.split(":")[0]) for wait in waits] == [("download", "fixed.py")]


def operators_of_rounds(drafter: TreeDrafter, lengths: tuple[int, ...]) -> list[int]:
    """Operators that the host dispatches in each round of a call, a replay being one."""
    marks = []
    with operators_of() as counter, pytest.MonkeyPatch.context() as patch:
        add = GenerationStatistics.add_round

        def marking(self, *args):
            marks.append(counter.count)
            add(self, *args)

        patch.setattr(GenerationStatistics, "add_round", marking)
        tiny_target("llama").generate(**padded_batch(lengths), **GREEDY, assistant_model=drafter)
    return [last - first for first, last in zip(marks, marks[1:], strict=False)]
