# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Plans that find themselves, in real calls: whatever is chosen, the text is plain decoding's and nothing is lost."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from batches_for_tests import RowWiseDrafter, padded_batch
from conftest import prompt_of, tiny_target
from drafters_for_tests import GarbageDrafter, OracleDrafter
from hybrids_for_tests import chain_oracles, hybrid_target
from training_for_tests import tiny_drafter

from specblock_hf import DraftingPlan, JoinedDrafter, LookupDrafter
from specblock_hf.drafters.eagle3 import Eagle3Config, Eagle3Drafter
from specblock_hf.drafting import state as drafting
from specblock_hf.drafting.drafter import DraftingCallback
from specblock_hf.drafting.pilot import offer_of, setting_of
from specblock_hf.planning.controller import PlanController
from specblock_hf.planning.offers import LOOKUPS, Choice, Way


pytestmark = pytest.mark.auto_plan

PLAIN, SMALL, LARGE = Choice(0), Choice(4, Way(1)), Choice(12, Way(2, 4))
SETTINGS = {"max_new_tokens": 40, "pad_token_id": 0}


class Scripted(PlanController):
    """Chooses what it is told to, again and again, and keeps what it hears."""

    def __init__(self, *choices):
        super().__init__()
        self.choices = itertools.cycle(choices)
        self.asked, self.heard = [], []

    def next(self, setting, offer):
        self.asked.append(next(self.choices))
        return self.asked[-1]

    def observe(self, setting, offer, seen):
        self.heard.append(seen)


class Watch(DraftingCallback):
    def __init__(self):
        self.nodes = []

    def on_draft(self, call, tree):
        self.nodes.append(tree.tokens.shape[1] - 1)


def eagle3():
    torch.manual_seed(0)
    return Eagle3Drafter(Eagle3Config.for_target(tiny_target("llama").config, draft_vocab_size=24)).eval()


def joined():
    return JoinedDrafter(tiny_drafter(), LookupDrafter(tiny_target("llama").config))


MAKERS = {
    "specblock": tiny_drafter,
    "eagle3": eagle3,
    "joined": joined,
    "look-ups": lambda: LookupDrafter(tiny_target("llama").config),
}
SCRIPTS = {
    "plain": (PLAIN,),
    "turns": (PLAIN, SMALL),
    "long waits": (PLAIN, PLAIN, PLAIN, PLAIN, PLAIN, LARGE, SMALL),
    "look-ups only": (Choice(6, LOOKUPS, enough_found=0.0), Choice(6, Way(1), enough_found=0.3), PLAIN),
    "cut": (Choice(12, Way(1), 0.01), Choice(12, Way(2, 4), 0.05)),
}


@pytest.mark.parametrize("family", ["qwen3_5", "falcon_h1", "lfm2"])
def test_the_controller_hears_what_a_recurrent_target_reads_again(family):
    target, batch, read = hybrid_target(family), padded_batch((7,)), []
    plain = target.generate(**batch, **SETTINGS, do_sample=False)
    plan = itertools.cycle((2, 5, 0, 8)).__next__
    drafter = chain_oracles(plain, batch["attention_mask"], [lambda number: plan()])
    drafter.controller, drafter.drafting_plan = Scripted(SMALL, SMALL, SMALL, PLAIN), "auto"
    handle = target.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        assert torch.equal(target.generate(**batch, **SETTINGS, do_sample=False, assistant_model=drafter), plain)
    finally:
        handle.remove()
    rounds = read[1:]
    heard = [seen.nodes if seen.columns is None else seen.columns for seen in drafter.controller.heard]
    plain_steps = [number for number, seen in enumerate(drafter.controller.heard) if not seen.choice.nodes]
    assert len(rounds) - len(heard) in (0, 1) and plain_steps
    for number, (columns, told) in enumerate(zip(rounds, heard, strict=False)):
        assert told == (1 if number in plain_steps else columns)
    again = [seen for seen in drafter.controller.heard if seen.columns is not None]
    assert bool(again) == (family != "lfm2") and all(seen.columns > seen.nodes for seen in again)


def test_rounds_in_which_a_row_may_end_say_nothing_of_acceptance():
    """They would be heard of only where little was accepted."""
    drafter, depths, left = tiny_drafter(), [], 14 - 1
    drafter.controller = Scripted(SMALL)

    class Depths(DraftingCallback):
        def on_draft(self, call, tree):
            depths.append(tree.max_depth)

    drafter.add_callback(Depths())
    tiny_target("llama").generate(
        prompt_of(6), assistant_model=drafter, do_sample=False, max_new_tokens=14, eos_token_id=None
    )
    said = []
    for seen, depth in zip(drafter.controller.heard, depths, strict=False):
        assert bool(seen.rows) == (left > depth + 1)
        said.append(bool(seen.rows))
        left -= int(seen.emitted)
    assert said[0] and not said[-1]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("lengths", [(7,), (7, 3, 5)], ids=len)
def test_the_text_is_plain_decodings(kind, script, lengths):
    target, drafter, batch = tiny_target("llama"), MAKERS[kind](), padded_batch(lengths)
    drafter.controller, watch = Scripted(*SCRIPTS[script]), Watch()
    drafter.add_callback(watch)
    plain = target.generate(**batch, **SETTINGS, do_sample=False)
    assert torch.equal(target.generate(**batch, **SETTINGS, do_sample=False, assistant_model=drafter), plain)
    asked = drafter.controller.asked
    assert len(asked) == len(watch.nodes) == drafter.last_statistics.rounds
    assert all(nodes <= choice.nodes for nodes, choice in zip(watch.nodes, asked, strict=True))
    # Everything is told but the last round, whose times were not there yet when the call ended, or were.
    assert len(drafter.controller.heard) in (len(asked), len(asked) - 1)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", ["specblock", "joined"])
def test_a_seed_gives_the_same_tokens_whatever_is_chosen(kind, script):
    target, drafter, prompt = tiny_target("llama"), MAKERS[kind](), prompt_of(7)
    drafter.controller = Scripted(*SCRIPTS[script])
    torch.manual_seed(3)
    plain = target.generate(prompt, **SETTINGS, do_sample=True)
    torch.manual_seed(3)
    assert torch.equal(target.generate(prompt, **SETTINGS, do_sample=True, assistant_model=drafter), plain)


@pytest.mark.parametrize("most", [1024, 4])
@pytest.mark.parametrize("chunk", [None, 3])
def test_a_drafter_is_told_everything_in_order_however_long_it_waits(most, chunk, monkeypatch):
    monkeypatch.setattr(drafting, "MOST_WAITING", most)
    target, prompt = tiny_target("llama"), prompt_of(9)
    plain = target.generate(prompt, max_new_tokens=40, do_sample=False)
    drafter = OracleDrafter(32, plain[0].tolist(), feature_layers=(1, 3))
    drafter.controller = Scripted(*SCRIPTS["long waits"])
    more = {} if chunk is None else {"prefill_chunk_size": chunk}
    output = target.generate(prompt, max_new_tokens=40, **more, do_sample=False, assistant_model=drafter)
    assert torch.equal(output, plain)
    (state,) = drafter.states
    told, text = state.tokens(), plain[0].tolist()
    assert told == text[1 : 1 + len(told)] and len(told) >= len(text) - 14
    assert state.positions() == list(range(len(told)))
    states = target(plain, output_hidden_states=True).hidden_states
    for place, layer in enumerate((1, 3)):
        torch.testing.assert_close(state.features(place), states[layer][0, : len(told)], rtol=1e-4, atol=1e-4)
    assert sum(waiting.tokens.shape[1] for waiting in state.waiting) <= most
    # An oracle that was told where it is drafts what is right: two of seven rounds take several tokens.
    assert max(drafter.last_statistics.accepted) > 2


def test_rows_that_have_stopped_do_not_wait():
    target, batch = tiny_target("llama"), padded_batch((7, 3, 5))
    plain = target.generate(**batch, **SETTINGS, do_sample=False)
    eos = int(plain[1, 20])
    kwargs = SETTINGS | {"do_sample": False, "eos_token_id": eos}
    plain = target.generate(**batch, **kwargs)
    for script in ("turns", "long waits"):
        drafter = joined()
        drafter.controller = Scripted(*SCRIPTS[script])
        assert torch.equal(target.generate(**batch, **kwargs, assistant_model=drafter), plain)


def test_where_enough_is_found_the_drafter_does_without_its_forwards():
    target, prompt = tiny_target("llama"), prompt_of(5).repeat(1, 6)
    plain = target.generate(prompt, **SETTINGS, do_sample=False)
    forwards = {}
    for enough in (math.inf, 0.2, 0.0):
        drafter = joined()
        drafter.controller = Scripted(Choice(8, Way(1), enough_found=enough))
        assert torch.equal(target.generate(prompt, **SETTINGS, do_sample=False, assistant_model=drafter), plain)
        forwards[enough] = drafter.last_statistics.drafter_calls
        heard = drafter.controller.heard
        assert [seen.drafted for seen in heard] == [seen.found < enough for seen in heard]
    assert forwards[math.inf] >= forwards[0.2] and forwards[0.0] == 0


def test_what_the_controller_hears():
    target, prompt = tiny_target("llama"), prompt_of(9)
    plain = target.generate(prompt, max_new_tokens=40, do_sample=False)
    drafter = OracleDrafter(32, plain[0].tolist(), plan=lambda number: 2)
    drafter.controller = Scripted(PLAIN, Choice(60, Way(1)))
    target.generate(prompt, max_new_tokens=40, do_sample=False, assistant_model=drafter)
    first, second, third, fourth = drafter.controller.heard[:4]
    assert (first.nodes, first.emitted, first.rows, first.draft, first.drafted) == (1, 1, [], 0, False)
    assert second.emitted == 3 and second.nodes > 3 and second.drafted
    (row,) = second.rows
    assert len(row) == second.nodes - 1 and sum(kept for _, kept in row) == 2 and all(claim == 0 for claim, _ in row)
    assert second.draft > 0 and second.rest > 0 and first.rest > 0
    assert not second.usual and not fourth.usual  # the prompt had waited, then a plain step's pair


def test_rounds_that_could_not_draft_teach_no_times_of_drafting():
    target, drafter, drafted = tiny_target("llama"), tiny_drafter(), []
    drafter.controller = Scripted(SMALL)
    for count in range(2, 9):
        target.generate(prompt_of(9), max_new_tokens=count, do_sample=False, assistant_model=drafter)
        heard = drafter.controller.heard[1:]  # in the first one the prompt had waited
        assert [seen.usual for seen in heard] == [seen.nodes > 1 for seen in heard]
        drafted += [seen.nodes > 1 for seen in heard]
        drafter.controller.heard.clear()
    assert {*drafted} == {False, True}  # with one token left there is nothing to draft


@pytest.mark.parametrize("lengths", [(7,), (7, 3)], ids=len)
def test_the_default_is_a_plan_that_finds_itself(lengths):
    target, batch = tiny_target("llama"), padded_batch(lengths)
    drafter = RowWiseDrafter([GarbageDrafter(32, (2,)) for _ in lengths])
    assert drafter.drafting_plan == "auto"
    plain = target.generate(**batch, **SETTINGS, do_sample=False)
    for _ in range(2):
        output = target.generate(**batch, **SETTINGS, do_sample=False, assistant_model=drafter)
        assert torch.equal(output, plain)
    assert drafter.last_statistics.plan and drafter.last_statistics.plan in drafter.last_statistics.summary()


def test_a_given_plan_stays_what_it_is():
    target, drafter, watch = tiny_target("llama"), tiny_drafter(), Watch()
    drafter.add_callback(watch)
    drafter.controller = Scripted(PLAIN)
    drafter.drafting_plan = DraftingPlan(5, 1)
    target.generate(prompt_of(7), **SETTINGS, do_sample=False, assistant_model=drafter)
    assert set(watch.nodes[:-5]) == {5} and not drafter.controller.asked
    assert drafter.last_statistics.plan == "5 nodes by 1 forward(s), as given"
    drafter.drafting_plan = None
    assert drafter.drafting_plan == drafter.default_plan(torch.device("cpu"))


def test_what_is_no_plan_is_refused():
    target, drafter = tiny_target("llama"), tiny_drafter()
    drafter.drafting_plan = "fast"
    with pytest.raises(ValueError, match=r"drafting_plan='fast' is no plan; give a DraftingPlan, \"auto\", or None"):
        target.generate(prompt_of(7), **SETTINGS, do_sample=False, assistant_model=drafter)


def test_a_frozen_controller_drafts_the_same_in_every_call():
    target, drafter = tiny_target("llama"), joined()
    device = torch.device("cpu")
    offer = offer_of(drafter, device)
    verify, draft = [(1, 0.02), (9, 0.021), (61, 0.03)], [(way, 0.001 * way.forwards) for way in offer.ways]
    drafter.controller.fill(setting_of(target, device), offer, verify, draft)
    drafter.controller.freeze()
    runs = []
    for _ in range(3):
        watch = Watch()
        drafter.add_callback(watch)
        target.generate(prompt_of(7), **SETTINGS, do_sample=False, assistant_model=drafter)
        drafter.remove_callback(watch)
        runs.append(watch.nodes)
    assert runs[0] == runs[1] == runs[2] and max(runs[0]) > 0


def test_offers_are_what_drafters_can_do():
    cpu, config = torch.device("cpu"), tiny_target("llama").config
    drafter = tiny_drafter()
    alone, both, lookups = (offer_of(one, cpu) for one in (drafter, joined(), LookupDrafter(config)))
    assert not alone.finds and both.finds and lookups.finds and not lookups.ways
    assert alone.ways == both.ways and set(alone.ways) == {
        Way(plan.num_forwards, plan.max_starts) for plan, _ in drafter.acceptance()
    }
    assert not alone.trusted and lookups.most == 16
    drafter.config.acceptance = [[8, 1, 0, 1.5, 2.0], [4, 1, 0, 1.25, 1.75]]
    measured = offer_of(drafter, cpu, (7, 13))
    assert measured.trusted and measured.ways == {Way(1): [(4, 1.25), (8, 1.5)]}
    assert measured.sizes == (6, 11) and not measured.cuts and measured.allowed(60) == [6, 11]


def test_offers_of_fixed_shapes_are_what_was_captured():
    cpu, drafter, plan = torch.device("cpu"), tiny_drafter(), DraftingPlan(60, 2)
    drafter.config.acceptance = [[8, 1, 0, 1.5, 2.0], [12, 2, 4, 1.75, 2.25], [60, 2, 0, 2.0, 2.5]]
    offer = offer_of(drafter, cpu, (1, 8, 16, 32, 64), plan)
    # The last size holds all that is drafted, and padding.
    assert offer.ways == {Way(2): [(60, 2.0)]} and offer.allowed(60) == [7, 15, 31, 60] and not offer.cuts
    # A plan without figures of its own has those of the one that is most like it.
    assert offer_of(drafter, cpu, (), DraftingPlan(20, 2, 8)).ways == {Way(2, 8): [(12, 1.75)]}
    assert offer_of(drafter, cpu, (), DraftingPlan(20, 1, 8)).ways == {Way(1, 8): [(8, 1.5)]}
    # Captured drafts leave no part out; look-ups alone have no other.
    both = JoinedDrafter(drafter, LookupDrafter(tiny_target("llama").config))
    assert offer_of(both, cpu, (1, 8)).finds and not offer_of(both, cpu, (1, 8), plan).finds
    alone = offer_of(both.parts[1], cpu, (1, 8, 16, 32), DraftingPlan(16, 1))
    assert alone.finds and not alone.ways and alone.allowed(60) == [7, 15, 16]
