# Copyright 2026 The specblock_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Batched answers equal `generate()` prompt by prompt; sampled ones follow the target's law."""

from __future__ import annotations

import pytest
import torch
from conftest import KINDS, VOCAB, prompt_of, tiny_target
from hypothesis import given
from hypothesis import strategies as st

from specblock_hf.training import answering
from specblock_hf.training.answering import Prompt, answer_batch, batches_of


LENGTHS = (3, 11, 6, 1, 8)


def prompts() -> list[list[int]]:
    return [prompt_of(length, seed)[0].tolist() for seed, length in enumerate(LENGTHS)]


def counted(target):
    """Rows of every forward of the target, and the hook's handle."""
    rows = []
    hook = target.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return rows, hook


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_equal_generate(kind):
    target = tiny_target(kind)
    plain = []
    for prompt in prompts():
        ids = target.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=14)
        plain.append(ids[0, len(prompt) :].tolist())
    assert answer_batch(target, prompts(), 14, set()) == plain
    # Two frequent tokens as ends: rows finish one after another and are dropped.
    stop_ids = {plain[0][4], plain[1][7]}
    expected = []
    for answer in plain:
        end = next((i + 1 for i, token in enumerate(answer) if token in stop_ids), len(answer))
        expected.append(answer[:end])
    assert len({len(answer) for answer in expected}) >= 3
    rows, hook = counted(target)
    assert answer_batch(target, prompts(), 14, stop_ids) == expected
    hook.remove()
    assert rows[0] == 5 and len(rows) == max(len(answer) for answer in expected)
    assert rows == sorted(rows, reverse=True) and rows[-1] < 5


def test_rows_are_dropped_in_groups(monkeypatch, llama):
    """A few finished rows run on, unheard, because dropping them copies the cache."""
    (answer,) = answer_batch(llama, [prompts()[1]], 12, set())
    batch = [prompts()[1]] * 4 + [prompts()[0]]
    stop_ids = {answer[5]}
    sizes = {}
    for share in (0.25, 1.0):
        monkeypatch.setattr(answering, "DROP_SHARE", share)
        rows, hook = counted(llama)
        sizes[share] = (answer_batch(llama, batch, 12, stop_ids), min(rows))
        hook.remove()
    assert sizes[0.25][0] == sizes[1.0][0]
    assert sizes[0.25][1] < 5 and sizes[1.0][1] == 5


def test_sampled_answers_follow_the_law_at_their_temperature(llama):
    prompt = prompts()[1]
    with torch.no_grad():
        law = (llama(torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(-1)
    generator = torch.Generator().manual_seed(0)
    draws = answer_batch(llama, [prompt] * 4000, 1, set(), 0.7, generator)
    found = torch.bincount(torch.tensor(draws).flatten(), minlength=VOCAB) / 4000
    assert (found - law).abs().sum() / 2 < 0.04  # total variation; 32 tokens and 4000 draws give about 0.02


def test_the_generator_alone_decides_sampled_answers(llama):
    def draw(seed: int) -> list[list[int]]:
        return answer_batch(llama, prompts(), 9, {4}, 1.0, torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    assert draw(0) == draw(0) != draw(1)
    assert torch.equal(before, torch.get_rng_state())


def prompt(length: int, temperature: float, key: int) -> Prompt:
    return Prompt("", "", f"{key:04d}", tuple(range(length)), temperature)


@given(
    st.lists(st.tuples(st.integers(1, 50), st.sampled_from([0.0, 1.0])), min_size=1, max_size=60),
    st.integers(1, 8),
    st.integers(1, 400),
    st.integers(0, 3),
)
def test_batches_keep_to_their_limits(given_prompts, batch_size, batch_tokens, seed):
    waiting = [prompt(length, temperature, key) for key, (length, temperature) in enumerate(given_prompts)]
    batches = batches_of(waiting, batch_size, batch_tokens, 20, seed)
    assert sorted(p.key for batch in batches for p in batch) == [p.key for p in waiting]
    for batch in batches:
        assert len({p.temperature for p in batch}) == 1 and len(batch) <= batch_size
        longest = max(len(p.input_ids) for p in batch)
        assert len(batch) == 1 or len(batch) * (longest + 20) <= batch_tokens
    assert batches_of(waiting[::-1], batch_size, batch_tokens, 20, seed) == batches


def test_batches_hold_similar_lengths_in_random_order():
    waiting = [prompt(length, 0.0, length) for length in range(1, 41)]
    batches = batches_of(waiting, 4, 10**6, 20)
    assert [len(batch) for batch in batches] == [4] * 10
    assert all(len(batch[-1].input_ids) - len(batch[0].input_ids) == 3 for batch in batches)
    firsts = [batch[0].key for batch in batches]
    assert firsts != sorted(firsts) and firsts != [b[0].key for b in batches_of(waiting, 4, 10**6, 20, seed=1)]
