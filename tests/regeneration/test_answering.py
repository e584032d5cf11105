# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import random

import pytest
import torch
from conftest import KINDS, VOCAB, prompt_of, tiny_target
from hypothesis import given
from hypothesis import strategies as st
from targets_for_tests import TargetKind, make_target
from transformers import LlamaConfig

from specblock_hf.regeneration import answering, slot_cache
from specblock_hf.regeneration.answering import Answering, Prompt, choose, groups_of
from specblock_hf.regeneration.slot_cache import SlotCache


LENGTHS = (3, 11, 6, 1, 20, 8, 2, 5, 9)


def prompts(temperature: float = 0.0, lengths: tuple[int, ...] = LENGTHS) -> list[Prompt]:
    return [
        Prompt("", "", f"{number:04d}", tuple(prompt_of(length, number)[0].tolist()), temperature)
        for number, length in enumerate(lengths)
    ]


def answers(target, waiting: list[Prompt], slots: int, tokens: int, stop_ids: set[int], seed: int = 0) -> dict:
    """By key; and every prompt is answered once."""
    longest = max(len(p.input_ids) for p in waiting)
    pairs = [pair for part in Answering(target, slots, longest, tokens, stop_ids, seed)(waiting) for pair in part]
    assert sorted(p.name for p, _ in pairs) == sorted(p.name for p in waiting)
    return {p.name: answer for p, answer in pairs}


def plain(target, prompt: Prompt, tokens: int) -> list[int]:
    ids = torch.tensor([prompt.input_ids])
    return target.generate(ids, do_sample=False, max_new_tokens=tokens)[0, ids.shape[1] :].tolist()


def cut(answer: list[int], stop_ids: set[int]) -> list[int]:
    return answer[: next((i + 1 for i, token in enumerate(answer) if token in stop_ids), len(answer))]


def counted(target):
    """Rows and columns of every forward of the target, and the hook's handle."""
    shapes = []
    hook = target.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes, hook


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("slots", "spare", "refill"), [(1, 1, 0.1), (2, 2, 1.0), (3, 1, 0.1), (4, 64, 0.5), (9, 3, 0.1)]
)
def test_greedy_answers_equal_generate(kind, slots, spare, refill, monkeypatch):
    """However slots are refilled, shifted and dropped, and whatever stays in the columns of others."""
    monkeypatch.setattr(slot_cache, "SPARE_COLUMNS", spare)
    monkeypatch.setattr(answering, "REFILL_SHARE", refill)
    target = tiny_target(kind)
    whole = {p.name: plain(target, p, 14) for p in prompts()}
    first, second = list(whole.values())[:2]
    stop_ids = {first[4], second[7]}
    expected = {name: cut(answer, stop_ids) for name, answer in whole.items()}
    assert len({len(answer) for answer in expected.values()}) >= 3
    assert answers(target, prompts(), slots, 14, stop_ids) == expected


def test_a_latent_cache_has_values_of_another_width():
    target = make_target(TargetKind("deepseek_v3"))
    whole = {p.name: plain(target, p, 6) for p in prompts()}
    assert answers(target, prompts(), 3, 6, set()) == whole


def test_slots_are_refilled_and_at_last_dropped(llama, monkeypatch):
    waiting = prompts()
    whole = {p.name: plain(llama, p, 14) for p in waiting}
    stop_ids = {whole[waiting[0].name][4], whole[waiting[1].name][7]}
    monkeypatch.setattr(answering, "REFILL_SHARE", 0.25)
    shapes, hook = counted(llama)
    made = answers(llama, waiting, 4, 14, stop_ids)
    hook.remove()
    reading = [shape for number, shape in enumerate(shapes) if number == 0 or shape[0] < 4 and shape[1] > 1]
    assert reading[0] == (4, 11) and sum(rows for rows, _ in reading) <= 9 and len(reading) > 1
    steps = [rows for rows, columns in shapes if columns == 1]
    assert steps[0] == 4 and steps[-1] < 4
    # Slots that are refilled at once waste no step: with none left empty the tokens would take at least so many.
    tokens = sum(len(answer) for answer in made.values())
    assert len(steps) < 1.8 * tokens / 4 < sum(len(a) for a in made.values())


def test_prompts_are_read_in_parts(llama, monkeypatch):
    monkeypatch.setattr(answering, "PREFILL_TOKENS", 24)
    shapes, hook = counted(llama)
    whole = answers(llama, prompts(), 9, 3, set())
    hook.remove()
    reading = shapes[: len(shapes) - 2]
    assert len(reading) > 3 and sum(rows for rows, _ in reading) == 9
    assert all(rows == 1 or rows * columns <= 24 for rows, columns in reading)
    assert whole == {p.name: plain(llama, p, 3) for p in prompts()}


def test_sampled_answers_follow_the_distribution_at_their_temperature(llama):
    prompt = prompts()[1]
    with torch.no_grad():
        distribution = (llama(torch.tensor([prompt.input_ids])).logits[0, -1] / 0.7).softmax(-1)
    waiting = [Prompt("", "", "k", prompt.input_ids, 0.7, number) for number in range(4000)]
    draws = torch.tensor(list(answers(llama, waiting, 500, 1, set()).values())).flatten()
    found = torch.bincount(draws, minlength=VOCAB) / 4000
    assert (found - distribution).abs().sum() / 2 < 0.04  # total variation; 32 tokens and 4000 draws give about 0.02


def test_a_prompts_draws_are_its_own(llama):
    """They depend on the seed, the prompt, the temperature and the number, and on nothing that is in the batch."""
    waiting = prompts(1.0) + prompts() + [Prompt("", "", "0001", prompts()[1].input_ids, 1.0, 1)]
    before = torch.get_rng_state()
    alone = answers(llama, waiting, 1, 9, {4})
    assert torch.equal(before, torch.get_rng_state())
    assert answers(llama, waiting[::-1], 5, 9, {4}) == alone
    assert alone["0001", 1.0, 0] != alone["0001", 1.0, 1] and alone["0001", 1.0, 0] != alone["0001", 0.0, 0]
    assert all(alone[p.name] == cut(plain(llama, p, 9), {4}) for p in prompts())
    assert answers(llama, waiting, 3, 9, {4}, seed=1) != alone


def test_draws_at_the_borders_choose_possible_tokens():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).repeat(4, 1)
    last = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()
    draws = torch.tensor([0.0, 0.5, last, 0.2])
    chosen = choose(logits, torch.tensor([1.0, 1.0, 1.0, 0.0]), draws)
    assert chosen.tolist() == [1, 3, 3, 1]


@pytest.mark.parametrize("shape", [(40, 30), (7, 49152)])
def test_choices_follow_the_cumulated_distribution(shape):
    generator = torch.Generator().manual_seed(0)
    logits, draws = torch.randn(shape, generator=generator) * 3, torch.rand(shape[0], generator=generator)
    chosen = choose(logits, torch.full((shape[0],), 0.5), draws)
    cumulated = (logits.double() / 0.5).softmax(-1).cumsum(-1)
    for row, (token, draw) in enumerate(zip(chosen.tolist(), draws.tolist(), strict=True)):
        below = cumulated[row, token - 1].item() if token else 0.0
        assert below - 1e-5 <= draw <= cumulated[row, token].item() + 1e-5


def test_layers_with_a_state_are_refused():
    target = tiny_target("llama")
    config = LlamaConfig(**{**target.config.to_dict(), "layer_types": ["full_attention", "linear_attention"] * 2})
    model = type(target)(config)
    with pytest.raises(ValueError, match="LlamaForCausalLM has layers of linear_attention, .* with --server"):
        SlotCache(model, 2, 10)


def prompt(length: int, key: int) -> Prompt:
    return Prompt("", "", f"{key:04d}", tuple(range(length)), 0.0)


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=80),
    st.integers(1, 8),
    st.integers(1, 2000),
    st.integers(0, 3),
)
def test_groups_keep_to_their_limits(lengths, batch_size, batch_tokens, seed):
    waiting = [prompt(length, key) for key, length in enumerate(lengths)]
    groups = groups_of(waiting, batch_size, batch_tokens, 20, seed)
    assert sorted(p.key for _, group in groups for p in group) == [p.key for p in waiting]
    for slots, group in groups:
        sizes = [len(p.input_ids) + 20 for p in group]
        assert 1 <= slots <= min(batch_size, len(group))
        assert slots == 1 or slots * sizes[0] <= batch_tokens
        assert sizes == sorted(sizes, reverse=True) and 2 * sizes[-1] >= sizes[0]
    assert groups_of(waiting[::-1], batch_size, batch_tokens, 20, seed) == groups


def test_groups_come_in_random_order_and_a_long_prompt_keeps_others_from_nothing():
    waiting = [prompt(length, length) for length in range(1, 600)] + [prompt(5000, 5000)]
    random.Random(0).shuffle(waiting)
    groups = groups_of(waiting, 4, 4000, 20)
    slots = {len(group[0].input_ids): slots for slots, group in groups}
    assert slots[5000] == 1 and slots[599] == 4 and max(len(group) for _, group in groups) == 64
    firsts = [group[0].key for _, group in groups]
    assert firsts != sorted(firsts) and firsts != sorted(firsts, reverse=True)
    assert firsts != [group[0].key for _, group in groups_of(waiting, 4, 4000, 20, seed=1)]
