# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Targets with recurrent layers: drafted as chains, whose state never goes back."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import transformers
from batches_for_tests import garbage, padded_batch
from conftest import SIZES, prompt_of, tiny_target
from hybrids_for_tests import BATCHED, BOUNDED, CORE, HYBRIDS, UNTAKEN, chain_oracles, hybrid_target, states_of
from interruptions_for_tests import Broken, Ended, Listener, Watch, interrupted
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache, set_seed

from specblock_hf import DraftingPlan, Eagle3Config, Eagle3Drafter, LookupDrafter, SpecBlockConfig, SpecBlockDrafter
from specblock_hf.compat import CACHE
from specblock_hf.target import model, recurrent
from specblock_hf.target.recurrent import Lag
from specblock_hf.trees.verification import Walk


GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 24}
ALL = list(HYBRIDS)
SOME = [family for family in CORE if family in BATCHED]


def lags(family: str) -> bool:
    return not family.startswith("lfm2")


def oracle(plain: torch.Tensor, mask: torch.Tensor, right, **kwargs):
    return chain_oracles(plain, mask, [right] * len(plain), **kwargs)


def close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(a.shape == b.shape and bool((a - b).abs().max() < 1e-3) for a, b in zip(ours, theirs, strict=True))


def test_every_family_of_the_list_is_tried():
    kinds = {hybrid_target(family).config.get_text_config(decoder=True).model_type for family in ALL}
    assert kinds == recurrent._GO_ON


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("cuts", [[1], [2], [9], [1, 2, 11, 12, 20]])
def test_a_forward_goes_on_from_a_state(family, cuts):
    target, ids = hybrid_target(family), prompt_of(24)

    def read(cuts: list[int]):
        cache, logits = DynamicCache(config=target.config), []
        for start, end in zip([0, *cuts], [*cuts, 24], strict=True):
            positions = torch.arange(start, end).unsqueeze(0)
            inputs = {"input_ids": ids[:, start:end], "position_ids": positions, CACHE: cache}
            logits.append(target(**inputs, use_cache=True).logits)
        return torch.cat(logits, dim=1), states_of(cache)

    with torch.no_grad():
        whole, cut = read([]), read(cuts)
    assert torch.allclose(whole[0], cut[0], rtol=0, atol=1e-3)
    assert close(cut[1], whole[1])
    # What is compared says something of the text.
    assert len(set(whole[0].argmax(-1)[0].tolist())) > 4


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("right", range(9))
def test_a_chain_of_which_so_many_are_right(family, right):
    target, batch = hybrid_target(family), padded_batch((7,))
    plain = target.generate(**batch, **GREEDY)
    drafter = oracle(plain, batch["attention_mask"], lambda number: right)
    assert torch.equal(target.generate(**batch, **GREEDY, assistant_model=drafter), plain)
    statistics = drafter.last_statistics
    assert statistics.target_calls == statistics.rounds + 1  # none for a rejection
    *accepted, _ = statistics.accepted
    assert set(accepted) <= {right, 0} and accepted[0] == right
    # Rounds that move the states up are few.
    assert lags(family) or 0 not in accepted[:-1] or right == 0
    assert accepted.count(0) <= 1 or right == 0


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("length", [1, 300])
def test_prompts_of_any_length(family, length):
    target, batch = hybrid_target(family), padded_batch((length,), seed=3)
    plain = target.generate(**batch, **GREEDY)
    for drafter in (
        oracle(plain, batch["attention_mask"], lambda number: (3 * number) % 7),
        oracle(plain, batch["attention_mask"], lambda number: 20, length=3, feature_layers=(0, 1, 2)),
        garbage(1),
        LookupDrafter(target.config),
    ):
        assert torch.equal(target.generate(**batch, **GREEDY, assistant_model=drafter), plain)


@pytest.mark.parametrize("family", [family for family in ALL if family not in CORE])
def test_other_families(family):
    target = hybrid_target(family)
    for lengths in ((1,), (7,), (7, 3, 12)):
        batch = padded_batch(lengths)
        plain = target.generate(**batch, **GREEDY)
        for right in (0, 2, 5):
            drafter = oracle(plain, batch["attention_mask"], lambda number, right=right: right, feature_layers=(0, 2))
            assert torch.equal(target.generate(**batch, **GREEDY, assistant_model=drafter), plain)
            statistics = drafter.last_statistics
            assert statistics.accepted[0] == right and statistics.target_calls == statistics.rounds + 1


@pytest.mark.parametrize("chunk", [1, 5])
def test_a_prompt_in_chunks(chunk):
    for family in CORE:
        target, batch = hybrid_target(family), padded_batch((9,))
        options = GREEDY | {"prefill_chunk_size": chunk}
        plain = target.generate(**batch, **options)
        drafter = oracle(plain, batch["attention_mask"], lambda number: number % 4)
        assert torch.equal(target.generate(**batch, **options, assistant_model=drafter), plain)


def network(kind: str, target):
    torch.manual_seed(1)
    if kind == "specblock":
        return SpecBlockDrafter(SpecBlockConfig.for_target(target.config)).eval()
    return Eagle3Drafter(Eagle3Config.for_target(target.config)).eval()


@pytest.mark.parametrize("family", ["qwen3_5", "falcon_h1", "lfm2", "nemotron_h"])
@pytest.mark.parametrize("kind", ["specblock", "eagle3"])
def test_networks_that_read_its_states(family, kind):
    target, drafter = hybrid_target(family), network(kind, hybrid_target(family))
    for lengths in ((6,), (4, 6)) if family in BATCHED else ((6,),):
        batch = padded_batch(lengths)
        plain = target.generate(**batch, **GREEDY)
        assert torch.equal(target.generate(**batch, **GREEDY, assistant_model=drafter), plain)
        assert drafter.last_statistics.drafter_calls


@pytest.mark.parametrize("family", CORE)
def test_what_a_drafter_is_told_of_its_states(family):
    target, batch = hybrid_target(family), padded_batch((5,))
    plain = target.generate(**batch, **GREEDY)
    drafter = oracle(plain, batch["attention_mask"], lambda number: (2, 5, 1)[number % 3], feature_layers=(0, 2))
    target.generate(**batch, **GREEDY, assistant_model=drafter)
    (told,) = drafter.drafters[0].states
    with torch.no_grad():
        states = target(input_ids=plain, output_hidden_states=True).hidden_states
    count = len(told.tokens())
    assert count > 20 and told.tokens() == plain[0, 1 : count + 1].tolist()
    assert told.positions() == list(range(count))
    for number, layer in enumerate((0, 2)):
        assert torch.allclose(told.features(number), states[layer][0, :count], rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("stop", ["eos", "string"])
def test_an_end_inside_a_chain(family, stop):
    from options_for_tests import tiny_tokenizer

    target, batch, tokenizer = hybrid_target(family), padded_batch((7,)), tiny_tokenizer()
    text = target.generate(**batch, **GREEDY)[0, 7:].tolist()
    for place in (4, 9):
        if stop == "eos":
            options = GREEDY | {"eos_token_id": text[place]}
        else:
            options = GREEDY | {
                "stop_strings": [tokenizer.decode(text[place - 1 : place + 1])],
                "tokenizer": tokenizer,
            }
        plain = target.generate(**batch, **options)
        for right in (3, 8):
            drafter = oracle(plain, batch["attention_mask"], lambda number, right=right: right)
            assert torch.equal(target.generate(**batch, **options, assistant_model=drafter), plain)
        assert plain.shape[1] < 7 + 24


def read_anew(target, ids: torch.LongTensor) -> DynamicCache:
    """A cache with a text that was read at once."""
    cache = DynamicCache(config=target.config)
    with torch.no_grad():
        target(input_ids=ids, position_ids=torch.arange(ids.shape[1]).unsqueeze(0), use_cache=True, **{CACHE: cache})
    return cache


def chat(target, prepare, lengths=(6,), turns=3, cache=None, **options) -> tuple[list[torch.Tensor], list]:
    """The texts of some turns with one cache, and its states after each; `prepare` makes each turn's drafter."""
    cache = DynamicCache(config=target.config) if cache is None else cache
    batch, texts, states = padded_batch(lengths), [], []
    for turn in range(turns):
        text = target.generate(
            **batch, **GREEDY | {"max_new_tokens": 7, CACHE: cache} | options, assistant_model=prepare(turn, batch)
        )
        texts.append(text)
        states.append([state.clone() for state in states_of(cache)])
        more = torch.cat([prompt_of(3, seed=turn + row) for row in range(len(text))])
        visible = torch.nn.functional.pad(
            batch["attention_mask"], (0, text.shape[1] - batch["input_ids"].shape[1] + 3), value=1
        )
        batch = {"input_ids": torch.cat((text, more), dim=1), "attention_mask": visible}
    return texts, states


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("store", ["dynamic", "static"])
def test_a_chat_of_three_turns_keeps_its_cache(family, store):
    target = hybrid_target(family)

    def cache():
        return DynamicCache(config=target.config) if store == "dynamic" else StaticCache(target.config, 60)

    plain, states = chat(target, lambda turn, batch: None, cache=cache())
    for right in (0, 2, 5):
        ours, own = chat(
            target,
            lambda turn, batch, right=right: oracle(plain[turn], batch["attention_mask"], lambda number: right),
            cache=cache(),
        )
        assert all(map(torch.equal, ours, plain))
        assert all(map(close, own, states))


@pytest.mark.parametrize("family", SOME)
def test_a_chat_with_a_batch(family):
    target = hybrid_target(family)
    plain, _ = chat(target, lambda turn, batch: None, lengths=(6, 3))
    plans = [lambda number: 2, lambda number: (0, 4, 1)[number % 3]]
    ours, _ = chat(
        target, lambda turn, batch: chain_oracles(plain[turn], batch["attention_mask"], plans), lengths=(6, 3)
    )
    assert all(map(torch.equal, ours, plain))


@pytest.mark.parametrize("family", ["qwen3_5", "falcon_h1", "lfm2", "kimi_linear"])
@pytest.mark.parametrize("by", ["streamer", "target", "drafter", "callback"])
@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_cache_goes_on_after_an_exception(family, by, at):
    target, batch = hybrid_target(family), padded_batch((6,))
    plain = target.generate(**batch, **GREEDY)
    cache, ended = DynamicCache(config=target.config), Ended(Broken, at)
    drafter = oracle(plain, batch["attention_mask"], lambda number: 2)
    listener = Listener(ended if by == "streamer" else None)
    if by == "callback":
        drafter.add_callback(Watch("on_verify", ended))
    with pytest.raises(Broken), interrupted(by, ended, drafter, target):
        target.generate(**batch, **GREEDY | {CACHE: cache}, streamer=listener, assistant_model=drafter)
    held = int(cache.get_seq_length())
    assert held <= 6 + len(listener.tokens or [])
    # All that was cached is the text's beginning.
    if held:
        assert close(states_of(cache), states_of(read_anew(target, plain[:, :held])))
    ids = plain[:, : max(held + 1, 6)]
    more = {CACHE: cache, "max_new_tokens": 30 - ids.shape[1], "attention_mask": torch.ones_like(ids)}
    rest = target.generate(ids, **GREEDY | more)
    assert torch.equal(rest, plain)


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("at", [1, 3])
def test_a_round_of_one_token_is_broken_off(family, at):
    target, batch = hybrid_target(family), padded_batch((6,))
    plain = target.generate(**batch, **GREEDY)
    cache, ended = DynamicCache(config=target.config), Ended(Broken, at)
    drafter = oracle(plain, batch["attention_mask"], lambda number: 0, length=0)
    drafter.add_callback(Watch("on_verify", ended))
    with pytest.raises(Broken):
        target.generate(**batch, **GREEDY | {CACHE: cache}, assistant_model=drafter)
    assert cache.get_seq_length() == 6 + at
    assert close(states_of(cache), states_of(read_anew(target, plain[:, : 6 + at])))


@pytest.mark.parametrize("family", CORE)
def test_the_same_seed_gives_the_same_sampled_text(family):
    target, batch = hybrid_target(family), padded_batch((7,))
    for seed in range(2):

        def run(drafter=None, seed=seed):
            set_seed(seed)
            options = GREEDY | {"do_sample": True, "temperature": 0.8, "top_p": 0.9}
            return target.generate(**batch, **options, assistant_model=drafter)

        plain = run()
        for drafter in (oracle(plain, batch["attention_mask"], lambda number: number % 5), garbage(1)):
            assert torch.equal(run(drafter), plain)


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("handed_back", [False, True])
def test_padded_batches_whose_rows_end_at_different_tokens(family, handed_back):
    target, batch = hybrid_target(family), padded_batch((7, 3, 12))
    text = target.generate(**batch, **GREEDY)
    options = GREEDY | {"eos_token_id": [int(text[0, 17]), int(text[1, 21])], "return_dict_in_generate": handed_back}
    plain = target.generate(**batch, **options)
    plain = plain.sequences if handed_back else plain
    plans = [lambda number: number % 4, lambda number: (3 * number) % 7, lambda number: 8]
    for drafter in (chain_oracles(plain, batch["attention_mask"], plans), garbage(3)):
        ours = target.generate(**batch, **options, assistant_model=drafter)
        assert torch.equal(ours.sequences if handed_back else ours, plain)
        statistics = drafter.last_statistics
        if not handed_back:
            assert statistics.target_calls == statistics.rounds + 1


@pytest.mark.parametrize("family", [family for family in [*SOME, "kimi_linear"] if lags(family)])
@pytest.mark.parametrize(("right", "length"), [((1, 3), 9), ((0, 0), 0)])
def test_a_batch_is_handed_back_at_the_last_token_of_each_row(family, right, length):
    target, batch = hybrid_target(family), padded_batch((7, 5), seed=2)
    text = target.generate(**batch, **GREEDY)
    end = next(token for token in text[0, 10:].tolist() if token not in text[1, 7:].tolist())
    options = GREEDY | {"eos_token_id": end, "return_dict_in_generate": True}
    plans = [lambda number, count=count: count for count in right]
    drafter = chain_oracles(text, batch["attention_mask"], plans, length=length)
    ours = target.generate(**batch, **options, assistant_model=drafter)
    for row, start in enumerate((0, 2)):
        # The row that ends first has its last token read, as it has in plain decoding.
        length = text[row, 7:].tolist().index(end) + 8 if row == 0 else text.shape[1] - 1
        alone = read_anew(target, text[row : row + 1, start:length])
        held = [state[row : row + 1] for state in states_of(ours[CACHE], keys=False)]
        assert close(held, states_of(alone, keys=False))


def test_states_of_a_batch_have_no_room_in_a_static_cache():
    for family in CORE:
        target, batch = hybrid_target(family), padded_batch((4, 4))
        with pytest.raises(ValueError, match=r"^the recurrent states of a batch lie at different tokens, .*; pass a"):
            target.generate(**batch, **GREEDY, cache_implementation="static", assistant_model=garbage(2))


@pytest.mark.parametrize("family", CORE)
def test_hidden_states_and_attentions(family):
    name, fields = HYBRIDS[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**SIZES | fields)
    target, batch = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval(), padded_batch((5,))
    options = GREEDY | {"return_dict_in_generate": True, "output_hidden_states": True, "output_attentions": True}
    plain = target.generate(**batch, **options)
    drafter = oracle(plain.sequences, batch["attention_mask"], lambda number: (2, 5, 1)[number % 3])
    ours = target.generate(**batch, **options, assistant_model=drafter)
    assert torch.equal(ours.sequences, plain.sequences)
    for name in ("hidden_states", "attentions"):
        assert len(ours[name]) == len(plain[name]) == 24
        for own, theirs in zip(ours[name], plain[name], strict=True):
            assert close(list(own), list(theirs)) and len(own) == len(theirs)


def test_a_target_is_left_as_it_was():
    target = hybrid_target("qwen3_5")
    before = [sorted(vars(module)) for module in target.modules()]
    target.generate(**padded_batch((5,)), **GREEDY, assistant_model=garbage(1))
    assert [sorted(vars(module)) for module in target.modules()] == before and type(target)._is_stateful


@pytest.mark.parametrize("family", UNTAKEN)
def test_a_family_that_does_not_go_on_is_refused(family):
    name, fields, why = UNTAKEN[family]
    target = AutoModelForCausalLM.from_config(getattr(transformers, name)(**SIZES | fields)).eval()
    drafter = garbage(1)
    with pytest.raises(ValueError, match=rf"^\w+ keeps a recurrent state and {why}, .+; drop assistant_model\.$"):
        target.generate(prompt_of(5), **GREEDY, assistant_model=drafter)
    assert not drafter.drafters[0].states


def test_transformers_own_assistants_are_refused_as_before():
    target = hybrid_target("qwen3_5")
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        target.generate(prompt_of(5), **GREEDY, assistant_model=tiny_target("llama"))


@pytest.mark.parametrize("family", BOUNDED)
@pytest.mark.parametrize("right", [0, 2, 8])
def test_time_steps_that_one_token_does_not_have_bounded(family, right):
    target, kind = hybrid_target(family), family.split(",")[0]
    for lengths in ((1,), (7,), (7, 3, 12)) if kind in BATCHED else ((1,), (7,)):
        batch = padded_batch(lengths)
        plain = target.generate(**batch, **GREEDY)
        # The prompt is read with bounds.
        assert torch.equal(target.generate(**batch, **GREEDY, assistant_model=garbage(len(lengths))), plain)
        drafter = oracle(plain, batch["attention_mask"], lambda number: right, feature_layers=(0, 2))
        assert torch.equal(target.generate(**batch, **GREEDY, assistant_model=drafter), plain)
        assert drafter.last_statistics.accepted[0] == right
    ours, own = chat(target, lambda turn, batch: garbage(1))
    plain, states = chat(target, lambda turn, batch: None)
    assert all(map(torch.equal, ours, plain)) and all(map(close, own, states))


@pytest.mark.parametrize("family", BOUNDED)
def test_what_bounds_time_steps_says_something_of_the_text(monkeypatch, family):
    monkeypatch.setattr(model, "stepwise", lambda target: target)
    target, batch = hybrid_target(family), padded_batch((7,))
    plain = target.generate(**batch, **GREEDY)
    drafter = oracle(plain, batch["attention_mask"], lambda number: 8)
    assert not torch.equal(target.generate(**batch, **GREEDY, assistant_model=drafter), plain)


def test_time_steps_of_a_forward_that_was_replaced():
    target = deepcopy(hybrid_target("falcon_h1, bounded"))
    forward, hooks = target.forward, [len(part._forward_hooks) for part in target.modules()]
    target.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    with pytest.raises(ValueError, match="was replaced by another, .* whose time steps a draft cannot have .*; load"):
        target.generate(prompt_of(5), **GREEDY, assistant_model=garbage(1, (1, 2)))
    assert [len(part._forward_hooks) for part in target.modules()] == hooks


def walk_of(*tokens: list[int], stopped=()) -> Walk:
    return Walk.of_rows([(list(range(len(row))), row, number in stopped) for number, row in enumerate(tokens)])


def test_how_far_states_are_behind():
    lag = Lag(2, budget=6)
    assert lag.commit(walk_of([1], [2]), [0, 1], 1).tolist() == [[0], [0]]
    assert (lag.lengths(), lag.width(4), lag.depths(4)) == ([0, 0], 4, [3, 3])
    # The first row keeps three of four, the second all.
    assert lag.commit(walk_of([3, 4, 5], [6, 7, 8, 9]), [0, 1], 4).tolist() == [[-1] * 4, [0, 1, 2, 3]]
    assert (lag.lengths(), lag.width(4), lag.depths(4), lag.rests()) == ([3, 0], 7, [3, 3], False)
    roots = torch.tensor([[5, 10, 11, 12], [9, 13, 14, 15]])
    assert lag.ids(roots).tolist() == [[1, 3, 4, 5, 10, 11, 12], [9, 13, 14, 15, 15, 15, 15]]
    assert lag.commit(walk_of([10], [13]), [0, 1], 7).tolist() == [[], []]
    # Three were read again and four would be, which is more than a draft: the row reads them once more alone.
    assert (lag.lengths(), lag.width(4), lag.depths(4), lag.rests()) == ([4, 1], 5, [0, 3], False)
    roots = torch.tensor([[10, 1, 1, 1], [13, 20, 21, 22]])
    assert lag.ids(roots).tolist() == [[1, 3, 4, 5, 10], [9, 13, 20, 21, 22]]
    assert lag.commit(walk_of([30], [20, 21], stopped=[1]), [0, 1], 5).tolist() == [[0, 1, 2, 3, 4], [-1] * 5]
    assert lag.lengths() == [0, 0]
    assert list(lag.catch_up()) == [([[0, 0, 0], [9, 13, 20]], [0, 3])]


def test_all_rows_rest_together():
    lag = Lag(1, budget=2)
    lag.commit(walk_of([1]), [0], 1)
    lag.commit(walk_of([2, 3, 4]), [0], 9)
    assert lag.rests() and lag.depths(9) == [0] and lag.ids(torch.tensor([[4]])).tolist() == [[1, 2, 3, 4]]


def test_the_plan_says_when_states_move_up():
    target, batch = hybrid_target("qwen3_5"), padded_batch((7,))
    plain = target.generate(**batch, **GREEDY)
    rounds = []
    for budget in (4, 60):
        drafter = oracle(plain, batch["attention_mask"], lambda number: 2, length=4)
        drafter.drafting_plan = DraftingPlan(budget, 1)
        assert torch.equal(target.generate(**batch, **GREEDY, assistant_model=drafter), plain)
        rounds.append(drafter.last_statistics.accepted.count(0))
    assert rounds[0] > rounds[1]
