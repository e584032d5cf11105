# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What a call leaves behind: windows equal to what training computes, the signal, and bounded buffers."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from conftest import VOCAB, prompt_of, tiny_target
from drafters_for_tests import GarbageDrafter, make_tree
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_for_tests import GREEDY
from training_for_tests import example_of, table_of, tiny_drafter

from specblock_hf.adaptation.windows import CallRecorder, Window, WindowBuffer, collate, rejection_signal
from specblock_hf.drafting.drafter import DraftingCallback
from specblock_hf.training.batches import collate as collate_for_training
from specblock_hf.training.target_views import view_target
from specblock_hf.trees.verification import Walk


LAYERS = (0, 2, 4)
TOP_K = 5


class Record(DraftingCallback):
    """A recorder for the last call."""

    def __init__(self, window_tokens: int = 512):
        self.window_tokens = window_tokens

    def on_generate_begin(self, call):
        self.recorder = CallRecorder(call.batch_size, torch.float32, self.window_tokens, TOP_K)

    def on_prompt(self, call, pairs):
        self.recorder.add_prompt(pairs)

    def on_commit(self, call, tree, scored, walk, pairs):
        if call.statistics.rounds == 0:
            self.recorder.close_prompt(scored)
        else:
            self.recorder.add_round(tree, scored, walk, pairs)


def recorded(prompts, window_tokens: int = 512, **options):
    """The windows of a call and its texts."""
    drafter = GarbageDrafter(VOCAB, LAYERS) if len(prompts) == 1 else tiny_drafter()
    record = Record(window_tokens)
    drafter.add_callback(record)
    texts = tiny_target("llama").generate(prompts, assistant_model=drafter, **(GREEDY | options))
    return record.recorder, texts


def draft_ids() -> torch.LongTensor:
    drafter = tiny_drafter()
    ids = torch.full((VOCAB,), -1)
    ids[drafter.draft_to_target] = torch.arange(len(drafter.draft_to_target))
    return ids


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 3}], ids=["whole", "chunks"])
def test_windows_are_what_the_trainer_would_have_made_of_the_text(options):
    recorder, text = recorded(prompt_of(7), **options)
    (window,) = recorder.windows()
    example = example_of(text[0].tolist(), answer_start=7)
    expected = collate_for_training(
        [example], view_target(tiny_target("llama"), [example], LAYERS, TOP_K), table_of(), draft_ids()
    )
    batch = collate([window], draft_ids(), torch.float32)
    assert batch.lengths.tolist() == expected.lengths.tolist()
    assert torch.equal(batch.scored, expected.scored)
    assert torch.equal(batch.tokens[:, 1:], expected.tokens[:, 1:])
    torch.testing.assert_close(batch.embeds[:, 1:], expected.embeds[:, 1:])
    # The last token's own states are read by nobody.
    torch.testing.assert_close(batch.features[:, :-1], expected.features[:, :-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batch.top_probs, expected.top_probs, rtol=1e-3, atol=1e-5)
    assert torch.equal(batch.top_ids, expected.top_ids)


def test_both_give_the_same_loss():
    recorder, text = recorded(prompt_of(7))
    example = example_of(text[0].tolist(), answer_start=7)
    views = view_target(tiny_target("llama"), [example], LAYERS, TOP_K)
    drafter = tiny_drafter()
    losses = [
        drafter.loss(batch, generator=torch.Generator().manual_seed(1))["loss"]
        for batch in (
            collate(recorder.windows(), draft_ids(), torch.float32),
            collate_for_training([example], views, table_of(), draft_ids()),
        )
    ]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)


def test_rows_of_a_batch_have_windows_of_their_own():
    prompts, lengths = [prompt_of(4, 1), prompt_of(7, 2)], [4, 7]
    padded = torch.cat([torch.cat((torch.zeros(1, 3, dtype=torch.long), prompts[0]), 1), prompts[1]])
    mask = torch.ones_like(padded)
    mask[0, :3] = 0
    recorder, _ = recorded(padded, attention_mask=mask, pad_token_id=0)
    for window, prompt, length in zip(recorder.windows(), prompts, lengths, strict=True):
        alone = recorded(prompt)[0].windows()[0]
        assert torch.equal(window.tokens, alone.tokens)
        assert window.scored == GREEDY["max_new_tokens"] == len(window) - length + 1
        torch.testing.assert_close(window.features, alone.features, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(window.top_probs, alone.top_probs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bound", [1, 3, 9, 14])
def test_of_a_long_text_the_last_tokens_are_kept(bound):
    (whole,) = recorded(prompt_of(7))[0].windows()
    windows = recorded(prompt_of(7), window_tokens=bound)[0].windows()
    if bound == 1:
        assert not windows  # one token says nothing about what a drafter could have guessed
        return
    for part, other in zip(windows[0]._parts(), whole.last(bound)._parts(), strict=True):
        assert torch.equal(part, other)


def test_recording_holds_no_more_than_the_window():
    recorder = CallRecorder(1, torch.float32, 4, TOP_K)
    state = torch.zeros(1, 100, 8)
    pairs = SimpleNamespace(
        tokens=torch.zeros(1, 100, dtype=torch.long),
        features=(state,),
        lengths=torch.tensor([100]),
        embeds=lambda: state,
    )
    for _ in range(5):
        recorder.add_prompt(pairs)
    held = sum(part.untyped_storage().nbytes() for window in recorder._rows[0] for part in window._parts())
    assert held == sum(window.num_bytes for window in recorder._rows[0])
    assert sum(map(len, recorder._rows[0])) == 4


@pytest.mark.parametrize(
    ("probs", "parents", "nodes", "token", "expected"),
    [
        ([1.0, 0.5, 0.3], [-1, 0, 0], [0], 9, 1 - 0.2),  # what the siblings leave
        ([1.0, 0.5, 0.1], [-1, 0, 0], [0], 9, 1 - 0.1),  # the least likely sibling
        ([1.0, 0.6, 0.5], [-1, 0, 1], [0, 1], 9, 1 - 0.5),
        ([1.0, 0.6, 0.5], [-1, 0, 1], [0, 1, 2], 9, 0.0),  # down to a leaf
        ([1.0, 0.6, 0.5], [-1, 0, 1], [0], 1, 0.0),  # stopped at a drafted token
        ([1.0], [-1], [0], 9, 0.0),  # nothing drafted
    ],
)
def test_signal_is_what_q_at_least_lacks(probs, parents, nodes, token, expected):
    tree = make_tree([0, *range(1, len(probs))], parents)
    tree.log_probs = torch.tensor([probs]).log()
    tokens = [*nodes[1:], token]
    walk = Walk(torch.tensor([nodes]), torch.tensor([tokens]), torch.tensor([len(nodes)]), torch.tensor([False]))
    assert rejection_signal(tree, walk).tolist() == pytest.approx([expected])


def test_finished_rows_give_no_signal():
    tree = make_tree([0, 1], [-1, 0])
    nothing = torch.tensor([[-1]])
    walk = Walk(nothing, nothing, torch.tensor([0]), torch.tensor([False]))
    assert rejection_signal(tree, walk).tolist() == [0.0]


def window_of(length: int, number: int = 0) -> Window:
    return Window(
        torch.full((length,), number),
        torch.zeros(length, 2),
        torch.zeros(length, 3),
        torch.zeros(length, 1, dtype=torch.long),
        torch.ones(length, 1),
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=30), st.integers(1, 2000))
def test_the_buffer_never_exceeds_its_bytes(lengths, bound):
    buffer = WindowBuffer(bound)
    for number, length in enumerate(lengths):
        buffer.add(window_of(length, number))
        kept = list(buffer._windows)
        assert buffer.num_bytes == sum(window.num_bytes for window in kept) <= bound
    # The newest of those that fit at all.
    fitting = [number for number, length in enumerate(lengths) if window_of(length).num_bytes <= bound]
    kept = [int(window.tokens[0]) for window in buffer._windows]
    assert kept == fitting[len(fitting) - len(kept) :]
    assert not fitting or kept


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(0, 12), st.integers(1, 5), st.integers(1, 60))
def test_fresh_windows_are_dealt_out_and_older_ones_fill_up(old, fresh, steps, tokens):
    buffer = WindowBuffer(10**6)
    for number in range(old):
        buffer.add(window_of(5, number))
    buffer.draw(1, 1, random.Random(0))
    assert buffer.fresh_tokens == 0
    for number in range(old, old + fresh):
        buffer.add(window_of(5, number))
    assert buffer.fresh_tokens == 5 * fresh
    dealt = [[int(window.tokens[0]) for window in step] for step in buffer.draw(steps, tokens, random.Random(1))]
    assert buffer.fresh_tokens == 0
    assert len(dealt) == steps
    for step in dealt:
        assert len(set(step)) == len(step) == min(max(tokens // 5, 1), old + fresh)
    if tokens >= 5 * -(-fresh // steps):
        assert set(range(old, old + fresh)) <= {number for step in dealt for number in step}


def test_clear_forgets_everything():
    buffer = WindowBuffer(10**6)
    buffer.add(window_of(5))
    buffer.clear()
    assert (len(buffer), buffer.num_bytes, buffer.fresh_tokens) == (0, 0, 0)
