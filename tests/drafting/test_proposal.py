# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Whatever a drafter proposes, the call lives, the text is the target's, and no more is scored than was asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from batches_for_tests import padded_batch
from conftest import VOCAB, prompt_of, tiny_target
from drafters_for_tests import ToldDrafter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, GPT2Config, set_seed

from specblock_hf import DraftingCallback, DraftingPlan, JoinedDrafter, compile_rounds
from specblock_hf.drafting.drafter import DraftState
from specblock_hf.drafting.pairs import Pairs, TokenTable
from specblock_hf.drafting.plan import Limits
from specblock_hf.drafting.proposal import scored_nodes, within
from specblock_hf.planning.controller import PlanController
from specblock_hf.planning.offers import Choice, Way
from specblock_hf.trees.distributions import DraftDistributions
from specblock_hf.trees.tree import DraftTree


GREEDY = {"do_sample": False}
LENGTH, LIMIT = 20, 32  # of a prompt, and of any text for a target with learned positions


def tree_of(tokens, parents, log_probs=None, **fields) -> DraftTree:
    """Trees of lists, one for each row."""
    tokens, parents = torch.tensor(tokens), torch.tensor(parents)
    log_probs = torch.full(tokens.shape, -0.1) if log_probs is None else torch.tensor(log_probs)
    return DraftTree(tokens, parents, log_probs, torch.zeros(*tokens.shape, 2, dtype=torch.long), **fields)


def pairs_of(rows: int) -> Pairs:
    """Pairs that end with token 7."""
    tokens = torch.full((rows, 1), 7)
    table = TokenTable.of(tiny_target("llama"))
    return Pairs(tokens, (), torch.zeros_like(tokens), torch.ones(rows, dtype=torch.long), table)


class Proposer(ToldDrafter):
    """Proposes what a function makes of the target's own text, from the root on, and of the limits."""

    def __init__(self, text: list[int], make: Callable[[list[int], Limits], DraftTree], **kwargs):
        super().__init__(VOCAB, **kwargs)
        self.text, self.make = text, make

    def draft(self, state, limits):
        root = state.positions()[-1] + 1
        return self.make(self.text[root:], limits)


class Sizes(DraftingCallback):
    """Keeps the nodes, depths and tokens of what is scored."""

    def __init__(self):
        self.trees: list[DraftTree] = []

    def on_draft(self, call, tree):
        self.trees.append(tree)


@cache
def learned_positions():
    """A target that fails beyond its last position."""
    torch.manual_seed(0)
    names = {"vocab_size": VOCAB, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None}
    return AutoModelForCausalLM.from_config(GPT2Config(**names, n_embd=32, n_layer=2, n_head=4, n_positions=LIMIT))


TARGETS = {
    "llama": lambda: tiny_target("llama"),
    "eager": lambda: tiny_target("llama", "eager"),
    "mistral": lambda: tiny_target("mistral"),
    "gpt2": lambda: learned_positions().eval(),
}


@cache
def plain_text(kind: str) -> list[int]:
    return TARGETS[kind]().generate(prompt_of(LENGTH), max_new_tokens=LIMIT - LENGTH, **GREEDY)[0].tolist()


def chain(text: list[int], count: int) -> tuple[list[int], list[int]]:
    """The right tokens one below the other, as many as there are."""
    tokens = (text + [0] * count)[: count + 1]
    return tokens, list(range(-1, len(tokens) - 1))


def branched(text: list[int]) -> tuple[list[int], list[int]]:
    """The right tokens, and wrong ones beside them."""
    a, b, c = [*text, 0, 0, 0, 0][1:4]
    return [text[0], a, (a + 1) % VOCAB, b, (b + 1) % VOCAB, c, c], [-1, 0, 0, 1, 1, 3, 4]


def too_many(text, limits):
    tokens, parents = chain(text, 4)
    wide = [(token + 1) % VOCAB for token in range(200)]
    return tree_of([tokens + wide], [parents + [0] * 200])


def too_deep(text, limits):
    tokens, parents = chain(text, 60)
    return tree_of([tokens], [parents])


def low(height):
    def make(text, limits):
        tokens, parents = chain(text, 5)
        return tree_of([tokens], [parents], height=height)

    return make


def with_parents(change: Callable[[list[int]], list[int]]):
    def make(text, limits):
        tokens, parents = branched(text)
        return tree_of([tokens], [change(parents)])

    return make


def with_tokens(change: Callable[[list[int]], list[int]]):
    def make(text, limits):
        tokens, parents = branched(text)
        return tree_of([change(tokens)], [parents])

    return make


def with_tree(change: Callable[[DraftTree], DraftTree]):
    def make(text, limits):
        tokens, parents = branched(text)
        return change(tree_of([tokens], [parents]))

    return make


def with_log_probs(*values: float):
    return with_tree(lambda tree: replace(tree, log_probs=torch.tensor(values * 7)[None, :7]))


def distribution(
    shape: tuple[int, int] = (1, VOCAB), value: float = 0.0, ids: torch.Tensor | None = None, row: int = 0
):
    def change(tree: DraftTree) -> DraftTree:
        rows = torch.full(tree.tokens.shape, row)
        rows[:, 0] = -1
        distributions = DraftDistributions(
            torch.full((1, *shape), value), torch.arange(shape[1]) if ids is None else ids, rows
        )
        return replace(tree, distributions=distributions)

    return with_tree(change)


FAULTS: dict[str, Callable[[list[int], Limits], DraftTree]] = {
    "too many nodes": too_many,
    "too deep": too_deep,
    "height 0": low(0),
    "height 1": low(1),
    "height 3": low(3),
    "height below 0": low(-2),
    "height beyond the nodes": low(10**6),
    "parents in front": with_parents(lambda p: [-1, 3, 0, 0, 1, 3, 4]),
    "parents in a circle": with_parents(lambda p: [-1, 0, 3, 2, 1, 3, 4]),
    "its own parent": with_parents(lambda p: [-1, 1, 0, 1, 1, 3, 4]),
    "parents beyond the tree": with_parents(lambda p: [-1, 0, 99, 1, 1, 3, 10**12]),
    "parents far below": with_parents(lambda p: [-1, 0, -7, 1, 1, 2, 4]),
    "parents that are padding": with_parents(lambda p: [-1, -2, 0, 1, 1, 3, 4]),
    "several roots": with_parents(lambda p: [-1, -1, -1, 1, 1, 3, 4]),
    "a root below a node": with_parents(lambda p: [3, 0, 0, 1, 1, 3, 4]),
    "a root that is padding": with_parents(lambda p: [-2, 0, 0, 1, 1, 3, 4]),
    "no child of the root": with_parents(lambda p: [-1, 2, 3, 4, 5, 6, 1]),
    "tokens below 0": with_tokens(lambda t: [t[0], -1, -(10**9), *t[3:]]),
    "tokens beyond the vocabulary": with_tokens(lambda t: [t[0], VOCAB, 2**40, *t[3:]]),
    "the same siblings": with_tokens(lambda t: [t[0], t[1], t[1], t[3], t[3], t[5], t[5]]),
    "another root": with_tokens(lambda t: [(t[0] + 1) % VOCAB, *t[1:]]),
    "int32": with_tree(lambda t: replace(t, tokens=t.tokens.int(), parents=t.parents.int())),
    "tokens that are floats": with_tree(lambda t: replace(t, tokens=t.tokens.float(), parents=t.parents.double())),
    "log-probs in bfloat16": with_tree(lambda t: replace(t, log_probs=t.log_probs.bfloat16())),
    "log-probs that are integers": with_tree(lambda t: replace(t, log_probs=t.log_probs.long())),
    "NaN": with_log_probs(math.nan),
    "NaN among numbers": with_log_probs(-1.0, math.nan, -0.5),
    "minus infinity": with_log_probs(-math.inf),
    "above 0": with_log_probs(math.inf, 3.0),
    "no node, no root": with_tree(lambda t: replace(t, **{n: getattr(t, n)[:, :0] for n in PARTS})),
    "more rows": with_tree(lambda t: replace(t, **{n: torch.cat((getattr(t, n),) * 2) for n in PARTS})),
    "fewer parents": with_tree(lambda t: replace(t, parents=t.parents[:, 1:])),
    "fewer log-probs": with_tree(lambda t: replace(t, log_probs=t.log_probs[:, :2])),
    "no axis of rows": with_tree(lambda t: replace(t, **{n: getattr(t, n)[0] for n in PARTS})),
    "an origin of three": with_tree(lambda t: replace(t, origin=torch.zeros(1, 7, 3))),
    "distributions of NaN": distribution(value=math.nan),
    "distributions of infinity": distribution(value=math.inf),
    "distributions of nothing": distribution(value=-math.inf),
    "distributions of other tokens": distribution((1, 8), ids=torch.arange(8) + VOCAB - 2),
    "distributions of fewer tokens": distribution((1, 8), ids=torch.arange(9)),
    "no distributions": distribution((0, VOCAB)),
    "another distribution than there is": distribution(row=5),
    "drawn twice without replacement": lambda text, limits: distribution()([text[0], *text[1:2] * 9], limits),
}
PARTS = ("tokens", "parents", "log_probs", "origin")


PLANS: tuple[DraftingPlan | str, ...] = (DraftingPlan(12, 1), DraftingPlan(12, 1, min_probability=0.01), "auto")


@pytest.fixture
def always_drafts(monkeypatch):
    """The plan that finds itself, once it has found that unlikely nodes do not pay."""
    monkeypatch.setattr(PlanController, "next", lambda self, setting, offer: Choice(12, Way(1), 0.01))


@pytest.mark.usefixtures("always_drafts")
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", TARGETS)
def test_a_broken_tree_costs_nothing_but_time(fault, name):
    target, prompt, text = TARGETS[name](), prompt_of(LENGTH), plain_text(name)
    options = {"max_new_tokens": LIMIT - LENGTH, **GREEDY}  # to the last position that there is
    for plan in PLANS:
        drafter, sizes = Proposer(text, FAULTS[fault]), Sizes()
        drafter.drafting_plan = plan
        drafter.add_callback(sizes)
        assert target.generate(prompt, assistant_model=drafter, **options)[0].tolist() == text
        assert all(tree.tokens.shape[1] <= 13 for tree in sizes.trees)


@pytest.mark.usefixtures("always_drafts")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_tree_in_fixed_shapes(fault):
    """Where the device itself walks."""
    target, prompt, text = TARGETS["llama"](), prompt_of(LENGTH), plain_text("llama")
    for plan in PLANS:
        drafter = Proposer(text, FAULTS[fault])
        drafter.drafting_plan = plan
        compile_rounds(target, drafter, max_length=LIMIT, tree_sizes=(4, 8))
        output = target.generate(prompt, max_new_tokens=LIMIT - LENGTH, assistant_model=drafter, **GREEDY)
        assert output[0].tolist() == text
        assert drafter.last_statistics.compiled_rounds == drafter.last_statistics.rounds


KEPT = ("too many nodes", "too deep", "several roots", "height 3", "int32", "NaN", "the same siblings", "another root")


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.startswith(KEPT)])
def test_what_is_right_in_it_is_kept(fault):
    target, prompt = tiny_target("llama"), prompt_of(LENGTH)
    text = target.generate(prompt, max_new_tokens=30, **GREEDY)[0].tolist()
    drafter = Proposer(text, FAULTS[fault])
    target.generate(prompt, max_new_tokens=30, assistant_model=drafter, **GREEDY)
    assert (sum(drafter.last_statistics.accepted) > 0) == (fault != "several roots")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_tree_beside_a_look_up(fault):
    target, prompt = tiny_target("llama"), prompt_of(5).repeat(1, 4)
    options = {"max_new_tokens": 12, "attention_mask": torch.ones_like(prompt), **GREEDY}
    text = target.generate(prompt, **options)[0].tolist()
    broken, good = Proposer(text, FAULTS[fault]), Proposer(text, low(5))
    for parts in ((broken, good), (good, broken)):
        drafter = JoinedDrafter(*parts)
        drafter.drafting_plan = DraftingPlan(12, 1)
        assert target.generate(prompt, assistant_model=drafter, **options)[0].tolist() == text


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("rule", ["token", "block"])
def test_a_broken_tree_under_rules_that_compare_distributions(fault, rule):
    target, prompt, text = tiny_target("llama"), prompt_of(LENGTH), plain_text("llama")
    drafter = Proposer(text, FAULTS[fault])
    drafter.can_sample = True
    drafter.drafting_plan = DraftingPlan(12, 1, draft_sampling="sampled", verification=rule)
    set_seed(0)
    # A distribution of one token: whatever else was emitted would be wrong.
    output = target.generate(prompt, max_new_tokens=12, assistant_model=drafter, do_sample=True, top_k=1)
    assert output[0].tolist() == text


def rows_of(fault: str, count: int) -> Callable[[list[int], Limits], DraftTree]:
    """The same tree for every row of a batch, of the first row's text."""

    def make(text, limits):
        tree = FAULTS[fault](text, limits)
        return replace(tree, **{name: torch.cat((getattr(tree, name),) * count) for name in PARTS})

    return make


class SameForAll(ToldDrafter):
    """Proposes a broken tree for every row of a batch."""

    def __init__(self, fault: str):
        super().__init__(VOCAB)
        self.fault = fault

    def propose(self, state: DraftState, pairs: Pairs, limits: Limits) -> DraftTree:
        last = pairs.last_tokens().tolist()
        text = [last[0], *(last * 9)[:9]]
        return rows_of(self.fault, len(last))(text, limits)

    def extend(self, state, pairs) -> None:
        """Nothing is kept."""


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if "distribution" not in fault and "row" not in fault])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_broken_tree_in_a_batch(fault, name):
    target, batch = TARGETS[name](), padded_batch((4, LENGTH, 11))
    options = {"max_new_tokens": LIMIT - LENGTH, "pad_token_id": 0, "eos_token_id": 5, **GREEDY}
    plain = target.generate(**batch, **options)
    assert torch.equal(target.generate(**batch, assistant_model=SameForAll(fault), **options), plain)


NUMBERS = st.sampled_from([0.0, -0.1, -3.0, 2.0, math.nan, math.inf, -math.inf, 1e38])


@st.composite
def any_tree(draw) -> Callable[[list[int], Limits], DraftTree]:
    """Random numbers in the place of a tree, many of them right."""
    count = draw(st.integers(1, 16))

    def row(values):
        return draw(st.lists(values, min_size=count, max_size=count))

    ahead, parents = row(st.integers(0, 4)), row(st.integers(-3, count + 1))
    # Most nodes hang below one of the nodes before.
    parents = [draw(st.integers(0, node - 1)) if node and draw(st.booleans()) else p for node, p in enumerate(parents)]
    odd, log_probs, height = row(st.integers(-40, 80)), row(NUMBERS), draw(st.sampled_from([None, -1, 0, 1, 2, 5, 99]))

    def make(text: list[int], limits: Limits) -> DraftTree:
        text = text + [0] * 5
        depths = [0] * count
        for node, parent in enumerate(parents):
            if 0 <= parent < node:
                depths[node] = depths[parent] + 1
        tokens = [text[min(depths[n], 4)] if ahead[n] else odd[n] for n in range(count)]
        return tree_of([tokens], [parents], [log_probs], height=height)

    return make


@settings(deadline=None)
@given(make=any_tree(), kind=st.sampled_from(["llama", "gpt2", "mistral"]), least=st.sampled_from([0.0, 0.5]))
def test_any_numbers_in_the_place_of_a_tree(make, kind, least):
    target, prompt = TARGETS[kind](), prompt_of(LENGTH)
    options = {"max_new_tokens": LIMIT - LENGTH, **GREEDY}
    drafter = Proposer(plain_text(kind), make)
    drafter.drafting_plan = DraftingPlan(9, 1, min_probability=least)
    assert target.generate(prompt, assistant_model=drafter, **options)[0].tolist() == plain_text(kind)


def test_a_tree_within_its_limits_stays_as_it_is():
    tree = tree_of([[5, 1, 2, 3, 0]], [[-1, 0, 0, 1, -2]], [[0.0, -1.0, -2.0, -0.5, -math.inf]], height=2)
    cut = within(tree, pairs_of(1), Limits((6,), (2,)))
    for name in PARTS:
        assert torch.equal(getattr(cut, name), getattr(tree, name))
    assert cut.height == 2 and cut.distributions is None
    assert scored_nodes(cut) is cut


def test_log_probs_are_numbers_that_can_be_compared():
    values = [[math.nan, math.nan, math.inf, -math.inf, -2.0]]
    cut = within(tree_of([[5, 1, 2, 3, 4]], [[-1, 0, 0, 0, 0]], values), pairs_of(1), Limits((6,), (2,)))
    assert cut.log_probs.tolist() == [[0.0, -math.inf, 0.0, -math.inf, -2.0]]


def test_parts_on_several_devices_meet_on_that_of_the_tokens():
    with FakeTensorMode():
        here, there = torch.device("cpu"), torch.device("cpu:1")
        tokens = torch.empty(1, 4, dtype=torch.long, device=there)
        parents, log_probs = torch.empty(1, 4, dtype=torch.int32, device=here), torch.empty(1, 4, device=here)
        tree = DraftTree(tokens, parents, log_probs, torch.empty(1, 4, 2, device=here))
        cut = within(tree, pairs_of(1), Limits((2,), (3,)))
        assert {getattr(cut, name).device for name in PARTS} == {there}
        assert cut.tokens.shape == (1, 3) and cut.parents.dtype == torch.long


def test_rows_are_cut_to_their_own_depths():
    tree = tree_of([[5, 1, 2, 3]] * 2, [[-1, 0, 1, 2]] * 2)
    cut = within(tree, pairs_of(2), Limits((3, 3), (3, 1)))
    assert cut.parents.tolist() == [[-1, 0, 1, 2], [-1, 0, -2, -2]]


def test_tensors_that_fit_nothing_are_no_draft():
    tree = within(
        replace(tree_of([[5, 1]], [[-1, 0]]), parents=torch.zeros(1, 3)), pairs_of(2), Limits((3, 3), (3, 3))
    )
    assert tree.tokens.tolist() == [[7], [7]] and tree.parents.tolist() == [[-1], [-1]]


@pytest.mark.parametrize("part", ["tokens", "parents", "log_probs", "origin"])
def test_a_tree_without_a_part_is_no_draft(part):
    for proposed in (None, replace(tree_of([[5, 1]], [[-1, 0]]), **{part: None})):
        assert within(proposed, pairs_of(1), Limits((3,), (3,))).tokens.tolist() == [[7]]
