# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What a call leaves behind: windows equal to what training computes, the signal, and bounded buffers."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import VOCAB, prompt_of, tiny_target
from drafters_for_tests import GarbageDrafter, make_tree
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_for_tests import GREEDY
from torch._subclasses.fake_tensor import FakeTensorMode
from training_for_tests import Told, example_of, table_of, tiny_drafter

from specblock_hf.adaptation.windows import CallRecorder, Window, WindowBuffer, collate, rejection_signal
from specblock_hf.drafting.drafter import DraftingCallback
from specblock_hf.drafting.pairs import Pairs, Scored
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
        self.recorder = CallRecorder(call.batch_size, torch.float32, self.window_tokens, TOP_K, 2**20)

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
    recorder = CallRecorder(1, torch.float32, 4, TOP_K, 2**20)
    pairs = Told(1, 101).pairs([0], [100])
    for _ in range(5):
        recorder.add_prompt(pairs)
    assert storage(recorder._rows[0]) == sum(window.num_bytes for window in recorder._rows[0])
    assert sum(map(len, recorder._rows[0])) == 4 == recorder._held[0]


def storage(windows) -> int:
    """Bytes that windows keep alive."""
    return sum(part.untyped_storage().nbytes() for window in windows for part in window._parts())


@pytest.mark.parametrize(("bound", "length"), [(14, 14), (512, 18)])
def test_windows_keep_no_more_alive_than_they_count(bound, length):
    recorder = recorded(prompt_of(7), window_tokens=bound)[0]
    windows = recorder.windows()
    assert list(map(len, windows)) == [length]
    assert storage(windows) == sum(window.num_bytes for window in windows) > 0
    assert not any(recorder._rows)


@pytest.mark.parametrize(("room", "rows"), [(0, 1), (2.9, 2), (100, 4)])
def test_no_more_rows_are_recorded_than_the_buffer_would_keep(room, rows):
    (one,) = recorded(prompt_of(7))[0].windows()
    recorder = CallRecorder(4, torch.float32, 8, TOP_K, int(room * 8 * one.num_bytes / len(one)))
    told = Told(4, 20)
    for first, last in ((0, 4), (4, 19)):
        recorder.add_prompt(told.pairs([first] * 4, [last] * 4))
    logits = torch.eye(VOCAB)[:8].view(4, 2, VOCAB)
    recorder.close_prompt(Scored(logits[:, :1], (), range(4)))
    walk = Walk(
        torch.tensor([[0, 1]] * 4),
        told.tokens[:, 19:] + torch.arange(2),
        torch.tensor([2] * 4),
        torch.tensor([False] * 4),
    )
    tree = make_tree([0, 1], [-1, 0])
    tree = type(tree)(
        *(part.expand(4, *part.shape[1:]) for part in (tree.tokens, tree.parents, tree.log_probs, tree.origin))
    )
    recorder.add_round(tree, Scored(logits, (), range(4)), walk, told.pairs([0] * 4, [2] * 4))
    windows = recorder.windows()
    assert [len(window) for window in windows] == [8] * rows
    assert [window.tokens[-3].item() for window in windows] == told.tokens[:rows, 19].tolist()


def test_what_is_kept_alone_is_embedded():
    told, embedded = Told(3, 20), []
    recorder = CallRecorder(3, torch.float32, 8, TOP_K, 2**20)
    count = told.table.embedding.register_forward_hook(lambda module, args, output: embedded.append(args[0].numel()))
    with count:
        recorder.add_prompt(told.pairs([0] * 3, [19, 10, 5]))
    assert embedded == [8, 8, 5]


def test_states_and_logits_may_lie_on_several_devices():
    here, there = torch.device("cpu"), torch.device("cpu:1")

    def fake(*shape: int, device: torch.device = here, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    recorder, lengths = CallRecorder(1, torch.float32, 8, TOP_K, 2**20), torch.tensor([2])
    with FakeTensorMode(allow_non_fake_inputs=True):
        ids = fake(1, 2, dtype=torch.long)
        features = (fake(1, 2, 32), fake(1, 2, 32, device=there))
        pairs = Pairs(ids, features, ids, lengths, None, given_embeds=fake(1, 2, 32))
        recorder.add_prompt(pairs)
        scored = Scored(fake(1, 2, VOCAB, device=there), (), [0])
        recorder.close_prompt(Scored(scored.logits[:, :1], (), [0]))
        walk = Walk(ids, ids, lengths, torch.tensor([False]))
        recorder.add_round(make_tree([0, 1], [-1, 0]), scored, walk, pairs)
        window = Window.joined(list(recorder._rows[0]))
    assert len(window) == 4 and {part.device for part in window._parts()} == {here}


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
