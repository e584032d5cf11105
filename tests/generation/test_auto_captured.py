# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Plans that find themselves in rounds of fixed shapes: what is captured is chosen, and only its cost counts."""

from __future__ import annotations

import copy
import itertools
from functools import cache

import pytest
import torch
from batches_for_tests import padded_batch
from conftest import tiny_target
from graphs_for_tests import PretendedGraphs
from test_fixed_rounds import DRAFTERS
from training_for_tests import tiny_drafter
from transformers import PreTrainedModel

from specblock_hf import DraftingCallback, DraftingPlan, compile_rounds
from specblock_hf.drafting import state as drafting
from specblock_hf.drafting.drafter import TreeDrafter
from specblock_hf.drafting.pilot import offer_of, setting_of
from specblock_hf.generation import compilation
from specblock_hf.generation.compilation import CompiledRounds
from specblock_hf.generation.rounds.graphs import PATIENCE
from specblock_hf.planning.controller import PlanController, Setting
from specblock_hf.planning.offers import LOOKUPS, Choice, Way


pytestmark = pytest.mark.auto_plan

PLAN = DraftingPlan(12, 2, 4)
WAY = Way(2, 4)
PLAIN, SMALL, LARGE = Choice(0), Choice(7, WAY), Choice(12, WAY)
SCRIPTS = {
    "plain": (PLAIN,),
    "turns": (PLAIN, LARGE),
    "long waits": (PLAIN, PLAIN, PLAIN, PLAIN, PLAIN, LARGE, LARGE),
}
SETTINGS = {"max_new_tokens": 32, "pad_token_id": 0}
GREEDY = {"do_sample": False}


@pytest.fixture(autouse=True)
def pretended(monkeypatch):
    monkeypatch.setattr(compilation, "recorder_for", lambda device: PretendedGraphs)


class Scripted(PlanController):
    """Chooses what it is told to, again and again, and keeps what it is offered and hears."""

    def __init__(self, *choices):
        super().__init__()
        self.choices = itertools.cycle(choices)
        self.offers, self.settings, self.heard = [], [], []

    def next(self, setting, offer):
        self.offers.append(offer)
        self.settings.append(setting)
        return next(self.choices)

    def observe(self, setting, offer, seen):
        self.heard.append(seen)


class Trees(DraftingCallback):
    """Keeps every tree without its padding, and without its root, which is any token in a row that has stopped."""

    def __init__(self):
        self.seen = []

    def on_draft(self, call, tree):
        rows = zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True)
        self.seen.append([[pair for pair in zip(*row, strict=True) if pair[1] >= 0] for row in rows])


@cache
def precise_target() -> PreTrainedModel:
    """In its rounding no two nodes are likely alike, whatever the shapes are that they come from."""
    return copy.deepcopy(tiny_target("llama")).double()


def call(drafter: TreeDrafter, lengths: tuple[int, ...], script: tuple[Choice, ...], **options) -> tuple[list, list]:
    """The text and the trees."""
    trees = Trees()
    drafter.add_callback(trees)
    drafter.controller, drafter.drafting_plan = Scripted(*script), "auto"
    torch.manual_seed(1)
    batch = padded_batch(lengths)
    text = precise_target().generate(**batch, **SETTINGS, **options, assistant_model=drafter)
    drafter.remove_callback(trees)
    return text.tolist(), trees.seen


def compiled(drafter: TreeDrafter, lengths: tuple[int, ...]) -> TreeDrafter:
    drafter.default_plan = lambda device: PLAN
    compile_rounds(precise_target(), drafter, batch_size=len(lengths), max_length=48)
    return drafter


@pytest.mark.parametrize("most", [1024, 4])
@pytest.mark.parametrize(
    "options", [{"do_sample": False}, {"do_sample": True}, {"do_sample": False, "eos_token_id": 5}]
)
@pytest.mark.parametrize("lengths", [(9,), (4, 12, 7)], ids=len)
@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
@pytest.mark.parametrize("kind", ["best-first", "joined"])
def test_rounds_are_the_eager_ones_however_long_a_drafter_waits(kind, script, lengths, options, most, monkeypatch):
    monkeypatch.setattr(drafting, "MOST_WAITING", most)
    drafter = DRAFTERS[kind]()
    drafter.network.double()
    eager = call(drafter, lengths, script, **options)
    compiled(drafter, lengths)
    for _ in range(2):
        assert call(drafter, lengths, script, **options) == eager
        figures = drafter.last_statistics
        assert figures.compiled_rounds == figures.rounds and figures.eager_because is None


def test_a_round_drafts_as_little_as_it_is_told():
    drafter = compiled(tiny_drafter(expansion="best_first").double(), (9,))
    text, trees = call(drafter, (9,), (PLAIN, LARGE, SMALL), do_sample=False)
    assert text == call(drafter, (9,), (PLAIN,), do_sample=False)[0]
    assert [len(row) for (row,) in trees[:-6]] == ([0, 12, 7] * len(trees))[: len(trees) - 6]


class Noting(PlanController):
    """Keeps what it has chosen."""

    def __init__(self):
        super().__init__()
        self.chosen = set()

    def next(self, setting, offer):
        choice = super().next(setting, offer)
        self.chosen.add((choice.nodes, choice.way))
        return choice


@pytest.mark.parametrize("lengths", [(9,), (4, 12, 7)], ids=len)
@pytest.mark.parametrize("kind", DRAFTERS)
def test_only_what_is_captured_is_chosen(kind, lengths):
    target, batch, drafter = precise_target(), padded_batch(lengths), DRAFTERS[kind]()
    if kind != "lookup":
        drafter.network.double()
    compiled(drafter, lengths)
    drafter.drafting_plan, drafter.controller = "auto", Noting()
    setting = setting_of(target, target.device, len(lengths), compiled=True, compiled_drafts=True)
    offer = offer_of(drafter, target.device, (1, 8, 16), PLAN)
    # As on a GPU: a tree costs hardly more than a plain step.
    drafter.controller.fill(setting, offer, [(1, 10.0), (13, 10.1)], [(way, 0.1) for way in offer.ways])
    plain = target.generate(**batch, **SETTINGS, do_sample=False)
    for _ in range(3):
        assert torch.equal(target.generate(**batch, **SETTINGS, do_sample=False, assistant_model=drafter), plain)
        figures = drafter.last_statistics
        assert figures.compiled_rounds == figures.rounds and figures.plan == drafter.controller.describe(setting)
    (record,) = drafter.controller.to_dict()["records"]
    assert Setting(**record["setting"]) == setting
    way = LOOKUPS if kind == "lookup" else WAY
    assert {(7, way)} < drafter.controller.chosen <= {(0, LOOKUPS), (7, way), (12, way)}


def test_a_round_that_is_not_captured_yet_says_nothing_of_later_ones():
    drafter = tiny_drafter(expansion="best_first").double()
    drafter.default_plan = lambda device: PLAN
    drafter.compiled_rounds = CompiledRounds(torch.device("cpu"))  # as the first call on CUDA leaves it
    settled = []
    for _ in range(3):
        call(drafter, (9,), (PLAIN, SMALL), do_sample=False, cache_implementation="static")
        heard = drafter.controller.heard
        settled += [(seen.choice.nodes, seen.settled) for seen in heard]
        assert all(setting.compiled and setting.compiled_drafts for setting in drafter.controller.settings)
    for nodes in (0, 7):
        of_size = [is_settled for size, is_settled in settled if size == nodes]
        first = of_size.index(True)
        # Those that wait, and the one that captures; the last round of a call may not be heard of.
        assert PATIENCE - 2 <= first <= PATIENCE + 1 and all(of_size[first:])


def test_drafts_alone_are_captured_for_one_way():
    drafter = tiny_drafter(expansion="best_first").double()
    drafter.default_plan = lambda device: PLAN
    drafter.compiled_rounds = CompiledRounds(torch.device("cpu"))
    for _ in range(2):
        call(drafter, (9,), (PLAIN, SMALL), do_sample=False)
    controller = drafter.controller
    assert {(setting.compiled, setting.compiled_drafts) for setting in controller.settings} == {(False, True)}
    assert all(set(offer.ways) == {WAY} and offer.sizes == () for offer in controller.offers)
    assert drafter.last_statistics.captured_drafts and not drafter.last_statistics.compiled_rounds


def test_long_texts_do_not_have_every_draft_attend_to_all_that_may_come():
    target, drafter, batch = tiny_target("llama"), tiny_drafter(), padded_batch((5,))
    drafter.drafting_plan, drafter.compiled_rounds = PLAN, CompiledRounds(torch.device("cpu"))
    text = target.generate(**batch, max_new_tokens=3, pad_token_id=0, **GREEDY)
    options = GREEDY | {"pad_token_id": 0, "eos_token_id": int(text[0, -1])}
    reason = (
        f"drafts for a text of up to {compilation.LONGEST + 1} tokens would attend to as many from the first one on"
    )
    for most, said in ((compilation.LONGEST - 5, None), (compilation.LONGEST - 4, reason)):
        target.generate(**batch, **options, max_new_tokens=most, assistant_model=drafter)
        assert drafter.last_statistics.eager_because == said
