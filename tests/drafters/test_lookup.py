# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Look-up drafts: what they find, how they join another drafter's tree, and that they never change a token."""

import pytest
import torch
from baselines_for_tests import baseline
from conftest import VOCAB, prompt_of, tiny_target
from hypothesis import given
from hypothesis import strategies as st

from specblock_hf import DraftingCallback, DraftingPlan, SpecBlockConfig, SpecBlockDrafter
from specblock_hf.drafters.common.configuration import UNRECORDED_LAYER
from specblock_hf.drafters.joined import JoinedDrafter
from specblock_hf.drafters.lookup import LATEST_PLACES, LONGEST_MATCH, FoundText, LookupDrafter
from specblock_hf.drafting.drafter import TreeDrafter
from specblock_hf.drafting.pairs import Pairs, TokenTable
from specblock_hf.drafting.plan import Limits


TABLE = TokenTable(torch.nn.Embedding(VOCAB, 4), torch.nn.Identity(), VOCAB)


def pairs_of(rows: list[list[int]]) -> Pairs:
    """Pairs that tell some tokens; rows of different length are padded."""
    width = max(len(row) for row in rows)
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return Pairs(tokens, (), torch.zeros_like(tokens), torch.tensor([len(row) for row in rows]), TABLE)


def paths_of(tree, row: int = 0) -> set[tuple[int, ...]]:
    tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
    paths: list[tuple[int, ...]] = []
    for node, parent in enumerate(parents):
        paths.append(() if node == 0 or parent < 0 else (*paths[parent], tokens[node]))
    return {path for path in paths if path}


def naive_matches(text: list[int]) -> dict[int, int]:
    """Every earlier continuation's first token with the longest match before it, by comparing everything."""
    best: dict[int, int] = {}
    places = [p for p in range(2, len(text)) if text[p - 2 : p] == text[-2:]]
    for place in places[-LATEST_PLACES:]:
        length = max(n for n in range(2, min(LONGEST_MATCH, place) + 1) if text[place - n : place] == text[-n:])
        best[text[place]] = max(best.get(text[place], 0), length)
    return best


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 3), st.lists(st.integers(1, 7)))
def test_the_longest_matches_are_found(text, branches, cuts):
    found = FoundText()
    start = 0
    for cut in cuts:  # told in pieces, as rounds do
        found.append(text[start : start + cut])
        start += cut
    found.append(text[start:])
    chains = found.draft(5, branches)
    expected = naive_matches(text) if len(text) >= 2 else {}
    assert sorted((match for match, _ in chains), reverse=True) == sorted(expected.values(), reverse=True)[:branches]
    for match, chain in chains:
        assert expected[chain[0]] == match
        joined = [text[i : i + len(chain)] for i in range(2, len(text))]
        assert chain in joined


def test_a_draft_continues_the_text_and_no_further_than_asked():
    drafter = LookupDrafter(tiny_target("llama").config, branches=2, depth=4)
    state = drafter.begin(TABLE, 1, 100)
    drafter.extend(state, pairs_of([[1, 2, 3, 4, 5, 9, 1, 2, 7]]))
    tree = drafter.propose(state, pairs_of([[1, 2]]), Limits((8,), (8,)))
    assert paths_of(tree) == {(3,), (3, 4), (3, 4, 5), (3, 4, 5, 9), (7,), (7, 1), (7, 1, 2)}
    state = drafter.begin(TABLE, 1, 100)
    drafter.extend(state, pairs_of([[1, 2, 3, 4, 5, 9, 1, 2, 7]]))
    tree = drafter.propose(state, pairs_of([[1, 2]]), Limits((3,), (2,)))
    assert tree.tokens.shape[1] == 4 and all(len(path) <= 2 for path in paths_of(tree))


def test_a_token_is_as_likely_as_those_after_as_many_that_matched_were():
    found = FoundText()
    found.append([1, 2, 3, 4, 1, 2])
    assert found.draft(3, 2) == [(2, [3, 4, 1])]
    assert found.chances() == [pytest.approx([0.5, 0.53, 0.56])]
    assert found.promise() == pytest.approx(0.5 + 0.5 * 0.53 + 0.5 * 0.53 * 0.56)
    found.append([3, 4, 9])  # two right, then a wrong one
    assert found.tried == {2: 1, 3: 1, 4: 1} and found.right == {2: 1, 3: 1, 4: 0}
    found.append([5, 1, 2])  # nothing was drafted in between, so nothing is judged
    assert found.tried == {2: 1, 3: 1, 4: 1}
    assert found.draft(3, 2) == [(2, [3, 4, 9])]
    assert found.chances() == [pytest.approx([(1 + 8 * 0.5) / 9, (1 + 8 * 0.53) / 9, 8 * 0.56 / 9])]


def test_another_continuation_begins_with_a_doubt_of_its_own():
    found = FoundText()
    found.append([1, 2, 3, 4, 5, 1, 2, 6, 7, 8, 1, 2])
    assert found.draft(2, 2) == [(2, [6, 7]), (2, [3, 4])]
    assert found.chances() == [pytest.approx([0.5, 0.53]), pytest.approx([0.15, 0.53])]
    assert found.promise() == pytest.approx(0.5 + 0.5 * 0.53)
    found.append([3, 4])
    assert found.right == {2: 0, 0: 1, 3: 1} and found.tried == {2: 1, 0: 1, 3: 1}


def test_no_chance_is_of_more_tokens_than_are_compared():
    found = FoundText()
    found.append([*range(20), 50, *range(1, 12)])
    ((match, chain),) = found.draft(8, 2)
    assert (match, chain) == (11, [12, 13, 14, 15, 16, 17, 18, 19])
    assert found.chances() == [pytest.approx([0.77, *[0.8] * 7])]


def test_rows_of_a_batch_are_texts_of_their_own():
    drafter = LookupDrafter(tiny_target("llama").config)
    texts = [[1, 2, 3, 1], [4, 5, 6, 7, 4, 5], []]
    ends = [[2], [6, 4, 5], []]
    limits = Limits((6, 6, 0), (6, 6, 0))
    state = drafter.begin(TABLE, 3, 100)
    drafter.extend(state, pairs_of(texts))
    together = drafter.propose(state, pairs_of(ends), limits)
    for row in range(2):
        alone = drafter.begin(TABLE, 1, 100)
        drafter.extend(alone, pairs_of([texts[row]]))
        tree = drafter.propose(alone, pairs_of([ends[row]]), Limits((6,), (6,)))
        assert paths_of(tree) == paths_of(together, row) != set()
    assert paths_of(together, 2) == set()


def specblock(target) -> SpecBlockDrafter:
    torch.manual_seed(2)
    return SpecBlockDrafter(SpecBlockConfig.for_target(target.config, draft_vocab_size=24)).eval()


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("joined", [False, True])
def test_generate_is_identical_and_look_ups_are_accepted(kind, joined):
    target = tiny_target(kind)
    prompt = prompt_of(5).repeat(1, 4)
    settings = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": 60}
    plain = target.generate(prompt, **settings)
    drafter = LookupDrafter(target.config)
    if joined:
        drafter = JoinedDrafter(specblock(target), drafter)
    assert torch.equal(plain, target.generate(prompt, assistant_model=drafter, **settings))
    if not joined:
        # Random targets repeat themselves now and then, which is all that a look-up needs.
        assert sum(drafter.last_statistics.accepted) > 0
        assert drafter.last_statistics.drafter_calls == 0


def test_a_joined_tree_holds_the_likeliest_of_both_within_the_budget():
    target = tiny_target("llama")
    main, table = specblock(target), TokenTable.of(target)
    joined = JoinedDrafter(main, LookupDrafter(target.config))
    text = [1, 2, 3, 4, 5, 6, 1, 2, 3, 4]

    def pairs(first: int, last: int) -> Pairs:
        states = torch.randn(1, last - first, 32, generator=torch.Generator().manual_seed(first))
        tokens = torch.tensor([text[first:last]])
        return Pairs(tokens, (states,) * 3, torch.arange(first, last)[None], torch.tensor([last - first]), table)

    trees = {}
    for budget in (4, 40):
        for name, drafter in (("main", main), ("joined", joined)):
            state = drafter.begin(table, 1, 50)
            drafter.extend(state, pairs(0, 8))
            with torch.no_grad():
                trees[name, budget] = drafter.propose(state, pairs(8, 10), Limits((budget,), (9,), 2, 4))
    found = {(5,), (5, 6), (5, 6, 1)}
    both = paths_of(trees["joined", 40])
    assert found <= both and both & paths_of(trees["main", 40]) and trees["joined", 40].tokens.shape[1] == 41
    assert trees["joined", 4].tokens.shape[1] == 5
    # An untrained drafter is unsure of everything and the text repeats itself: the look-up takes the small tree.
    assert (5, 6) in paths_of(trees["joined", 4]) and (5, 6) not in paths_of(trees["main", 4])


def test_a_second_reader_of_the_targets_states_is_refused():
    target = tiny_target("llama")
    with pytest.raises(ValueError, match="only the first drafter may; put it first"):
        JoinedDrafter(LookupDrafter(target.config), specblock(target))


def test_another_vocabulary_is_refused():
    config = tiny_target("llama").config.__class__(vocab_size=VOCAB + 1)
    prompt = prompt_of(4)
    with pytest.raises(ValueError, match=rf"vocabulary of {VOCAB + 1} tokens and the target's has {VOCAB}"):
        tiny_target("llama").generate(prompt, assistant_model=LookupDrafter(config), max_new_tokens=3)


def test_there_is_nothing_to_train():
    drafter = LookupDrafter(tiny_target("llama").config)
    assert drafter.parameters_of("full") == []
    with pytest.raises(TypeError, match="no weights to train"):
        drafter.loss(None)


class Part(TreeDrafter):
    """A drafter whose methods are marks."""

    def begin(self, table, batch_size, max_length, *, first_position=0):
        raise NotImplementedError

    check_target = extend = propose = begin


ATTRIBUTES = {
    "acceptance_measured",
    "can_sample",
    "predicts_at_once",
    "captures_rounds",
    "prepacked_weights",
    "compiled_rounds",
    "config",
    "drafting_plan",
    "feature_layers",
    "lock",
    "objective_class",
}
METHODS = {
    "acceptance": ((True,), {}),
    "default_plan": (("cpu",), {}),
    "feature_layers_for": (("target",), {}),
    "loss": (("batch", "objective"), {"progress": 0.5, "generator": "generator"}),
    "parameters_of": (("head",), {}),
    "rounds_model": (("weights",), {}),
}
OWN = {"controller", "last_statistics", "attach"}
OF_ALL_PARTS = {"add_callback", "begin", "callbacks", "check_target", "extend", "label", "propose", "remove_callback"}
OF_ALL_PARTS |= {"begin_fixed", "deepest", "find", "has_fixed_rounds", "look_ups", "with_network"}


def test_nobody_forgets_what_a_joined_drafter_says():
    """A new name of the protocol has to be delegated, and to be named here."""
    public = {name for name in {*vars(TreeDrafter), *TreeDrafter.__annotations__} if not name.startswith("_")}
    assert public == {*ATTRIBUTES, *METHODS, *OF_ALL_PARTS, "network", *OWN}
    assert public - vars(JoinedDrafter).keys() == {*OWN, "add_callback"}


@pytest.mark.parametrize("name", sorted(ATTRIBUTES))
def test_what_is_set_on_a_part_after_joining_is_seen(name):
    part = Part()
    joined = JoinedDrafter(part, LookupDrafter(tiny_target("llama").config))
    for mark in (object(), object()):
        setattr(part, name, mark)
        assert getattr(joined, name) is mark


@pytest.mark.parametrize("name", METHODS)
def test_the_first_part_is_asked_with_the_very_arguments(name):
    part = Part()
    joined = JoinedDrafter(part, LookupDrafter(tiny_target("llama").config))
    setattr(part, name, lambda *given, **named: (given, named))
    given, named = METHODS[name]
    assert getattr(joined, name)(*given, **named) == METHODS[name]


def test_callbacks_of_the_parts_listen_to_the_joined_drafter():
    part, lookup = Part(), LookupDrafter(tiny_target("llama").config)
    joined, listeners = JoinedDrafter(part, lookup), [DraftingCallback() for _ in range(3)]
    assert joined.network is part
    for drafter, listener in zip((part, joined, lookup), listeners, strict=True):
        drafter.add_callback(listener)
    assert joined.callbacks == (listeners[0], listeners[2], listeners[1])
    assert part.callbacks == (listeners[0],) and lookup.callbacks == (listeners[2],)
    for listener in listeners:
        joined.remove_callback(listener)
    assert joined.callbacks == part.callbacks == lookup.callbacks == ()
    with pytest.raises(ValueError, match="was not added"):
        joined.remove_callback(listeners[0])


def test_what_a_joined_drafter_is_given_is_not_its_part_s():
    part = Part()
    joined = JoinedDrafter(part, LookupDrafter(tiny_target("llama").config))
    joined.drafting_plan, joined.compiled_rounds = DraftingPlan(5, 1), "compiled"
    part.drafting_plan = DraftingPlan(9, 1)
    assert joined.drafting_plan == DraftingPlan(5, 1) and part.drafting_plan == DraftingPlan(9, 1)
    assert part.compiled_rounds is None
    joined.compiled_rounds = None
    part.compiled_rounds = "compiled"
    assert joined.compiled_rounds is None


@pytest.mark.parametrize("name", ["medusa", "falcon_drafter", "eagle3"])
def test_a_joined_drafter_reads_the_layers_that_a_checkpoint_does_not_record(name):
    target, drafter = tiny_target("llama"), baseline(name)
    layers = drafter.feature_layers
    drafter.config.feature_layers = [UNRECORDED_LAYER] * len(layers)
    joined = JoinedDrafter(drafter, LookupDrafter(target.config))
    assert joined.feature_layers_for(target) == drafter.feature_layers_for(target) == layers
    settings = {"do_sample": False, "max_new_tokens": 12}
    plain = target.generate(prompt_of(9), **settings)
    assert torch.equal(target.generate(prompt_of(9), assistant_model=joined, **settings), plain)


def test_drafters_read_well():
    lookup = LookupDrafter(tiny_target("llama").config, branches=3)
    assert repr(lookup) == "LookupDrafter(branches=3, depth=8)"
    assert repr(JoinedDrafter(baseline("medusa"), lookup)) == "JoinedDrafter(MedusaDrafter + LookupDrafter)"
