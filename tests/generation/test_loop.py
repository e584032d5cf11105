# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The loop: greedy text, limits, stopping, streaming, returned scores."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import VOCAB, prompt_of, tiny_target
from drafters_for_tests import GarbageDrafter, OracleDrafter, Rounds
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    MaxLengthCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteria,
)
from transformers.generation.streamers import BaseStreamer

from specblock_hf import GenerationStatistics
from specblock_hf.compat import CACHE
from specblock_hf.drafting.plan import DraftingPlan, round_limits
from specblock_hf.generation.token_selector import _decided_on_host


GREEDY = {"do_sample": False}
OFFSETS = range(1, 10)  # where in the first block of 9 tokens (8 drafted, 1 of the target's own) something happens


def plain_text(target, length: int = 40, prompt: torch.LongTensor | None = None) -> list[int]:
    prompt = prompt_of(7) if prompt is None else prompt
    return target.generate(prompt, max_new_tokens=length, **GREEDY)[0].tolist()


def oracle(target, plan=lambda number: 8, text: list[int] | None = None, **kwargs) -> OracleDrafter:
    """An oracle whose every block is full."""
    return OracleDrafter(VOCAB, text or plain_text(target), plan=plan, **kwargs)


class KeepingStreamer(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self):
        self.puts: list[torch.Tensor] = []
        self.ends = 0

    def put(self, value):
        self.puts.append(value)

    def end(self):
        self.ends += 1


def test_the_oracle_reaches_every_accepted_length(target):
    text = plain_text(target, 60)
    drafter = OracleDrafter(VOCAB, text)
    output = target.generate(prompt_of(7), max_new_tokens=60, assistant_model=drafter, **GREEDY)
    assert output[0].tolist() == text
    statistics = drafter.last_statistics
    # One token from the prefill, then blocks of A + 1; the last block is what is left of 60.
    assert statistics.accepted == [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2, 3, 3]
    assert statistics.cut == [False] * 13 + [True]
    assert (statistics.emitted, statistics.rounds, statistics.target_calls, statistics.drafter_calls) == (
        60,
        14,
        15,
        14,
    )
    assert statistics.tau == 59 / 14 and statistics.tau_uncut == 55 / 13
    assert statistics.accepted_per_depth == [12, 10, 8, 5, 4, 3, 2, 1]


@pytest.mark.parametrize("seed", range(3))
def test_garbage_only_costs_time(target, seed):
    prompt = prompt_of(5 + 4 * seed, seed)
    drafter = GarbageDrafter(VOCAB)
    output = target.generate(prompt, max_new_tokens=40, assistant_model=drafter, **GREEDY)
    assert output[0].tolist() == plain_text(target, 40, prompt)
    assert drafter.last_statistics.emitted == 40


@pytest.mark.parametrize("new_tokens", range(1, 13))
@pytest.mark.parametrize("plan", [lambda number: 8, lambda number: number % 3], ids=["full", "partial"])
def test_max_new_tokens_is_never_overshot(llama, new_tokens, plan):
    text = plain_text(llama)
    drafter = oracle(llama, plan, text)
    output = llama.generate(prompt_of(7), max_new_tokens=new_tokens, assistant_model=drafter, **GREEDY)
    assert output[0].tolist() == text[: 7 + new_tokens]
    emitted, asked = 1, list(drafter.states[0].limits)
    for kept in drafter.last_statistics.accepted:
        # No deeper than could be emitted; not asked at all where one token is left.
        if new_tokens - emitted > 1:
            limits = asked.pop(0)
            assert (limits.nodes, limits.depth) == ((60,), (new_tokens - emitted - 1,))
        emitted += kept + 1
    assert not asked
    assert emitted == new_tokens


def test_a_round_without_drafts_is_one_row(llama):
    drafter = oracle(llama, tree_budget=60)
    llama.generate(prompt_of(7), max_new_tokens=2, assistant_model=drafter, **GREEDY)
    assert drafter.last_statistics.nodes_verified == 1


def test_limits_of_several_rows():
    limits = round_limits(DraftingPlan(16, 1), [5, 1, 0])
    assert (limits.nodes, limits.depth) == ((16, 0, 0), (4, 0, 0))


@pytest.mark.parametrize("offset", range(10))
def test_eos_stops_at_every_offset_of_a_block(target, offset):
    text = plain_text(target)
    eos = text[7 + offset]
    length = text.index(eos, 7) + 1
    for drafter in (oracle(target, text=text), GarbageDrafter(VOCAB)):
        output = target.generate(prompt_of(7), max_new_tokens=40, assistant_model=drafter, eos_token_id=eos, **GREEDY)
        assert output[0].tolist() == text[:length]
        assert torch.equal(output, target.generate(prompt_of(7), max_new_tokens=40, eos_token_id=eos, **GREEDY))
        assert drafter.last_statistics.emitted == length - 7


def test_several_eos_tokens(llama):
    text = plain_text(llama)
    eos = [text[7 + 12], text[7 + 5]]
    output = llama.generate(prompt_of(7), max_new_tokens=40, assistant_model=oracle(llama), eos_token_id=eos, **GREEDY)
    assert output[0].tolist() == text[: min(text.index(token, 7) for token in eos) + 1]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Every id is a word of two letters, one of four and one of eight others: none hides between two words."""
    words = {
        first + second: 8 * row + column
        for row, first in enumerate("aceg")
        for column, second in enumerate("bdfhjlnp")
    }
    backend = Tokenizer(WordLevel(words, unk_token="ab"))
    backend.pre_tokenizer = Split(Regex(".."), "isolated")
    backend.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("offset", OFFSETS)
def test_a_stop_string_ends_at_every_offset_of_a_block(llama, tokenizer, offset):
    # No pair of neighbours repeats at this text's start, so each stop string ends where it is meant to.
    prompt = prompt_of(7, seed=3)
    text = plain_text(llama, 40, prompt)
    pairs = list(zip(text[7:17], text[8:18], strict=True))
    assert len(set(pairs)) == len(pairs)
    stop = tokenizer.decode(text[7 + offset - 1 : 7 + offset + 1])
    options = {"stop_strings": [stop], "tokenizer": tokenizer, "max_new_tokens": 40, **GREEDY}
    for drafter in (oracle(llama, text=text), GarbageDrafter(VOCAB)):
        output = llama.generate(prompt, assistant_model=drafter, **options)
        assert output[0].tolist() == text[: 7 + offset + 1]
        assert torch.equal(output, llama.generate(prompt, **options))


class Witness(StoppingCriteria):
    """Keeps what it is called with and stops at a length."""

    def __init__(self, length: int):
        self.length = length
        self.seen: list[tuple[list[int], int | None]] = []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append((input_ids[0].tolist(), None if scores is None else len(scores)))
        return torch.tensor([input_ids.shape[1] >= self.length])


@pytest.mark.parametrize("length", [8, 11, 16, 20])
@pytest.mark.parametrize("with_scores", [False, True])
def test_custom_criteria_are_called_as_plain_decoding_calls_them(llama, length, with_scores):
    def seen(drafter):
        witness = Witness(length)
        output = llama.generate(
            prompt_of(7),
            max_new_tokens=40,
            stopping_criteria=[witness],
            assistant_model=drafter,
            return_dict_in_generate=with_scores,
            output_scores=with_scores,
            **GREEDY,
        )
        assert (output.sequences if with_scores else output).shape[1] == length
        return witness.seen

    assert seen(oracle(llama)) == seen(GarbageDrafter(VOCAB)) == seen(None)


def test_a_custom_criterion_does_not_outvote_eos(llama):
    text = plain_text(llama)
    eos = text[7 + 5]
    options = {"stopping_criteria": [Witness(30)], "eos_token_id": eos, "max_new_tokens": 40, **GREEDY}
    output = llama.generate(prompt_of(7), assistant_model=oracle(llama), **options)
    assert output[0].tolist() == text[: text.index(eos, 7) + 1]


def test_max_time_stops_after_the_token_under_way(llama):
    output = llama.generate(prompt_of(7), max_new_tokens=40, max_time=0.0, assistant_model=oracle(llama), **GREEDY)
    assert output.shape[1] == 8


def test_the_reminder_about_the_longest_position_is_not_lost():
    # Decided without a tensor only where plain decoding would have nothing to say.
    assert _decided_on_host(MaxLengthCriteria(10)) and _decided_on_host(MaxLengthCriteria(10, 9))
    assert not _decided_on_host(MaxLengthCriteria(11, 9))


@pytest.mark.parametrize("new_tokens", [1, 2, 10, 21])
def test_a_streamer_gets_every_token_once_and_alone(llama, new_tokens):
    def streamed(drafter):
        streamer = KeepingStreamer()
        output = llama.generate(
            prompt_of(7), max_new_tokens=new_tokens, assistant_model=drafter, streamer=streamer, **GREEDY
        )
        assert torch.cat([put.flatten() for put in streamer.puts]).tolist() == output[0].tolist()
        return [put.shape for put in streamer.puts], streamer.ends

    assert streamed(oracle(llama)) == streamed(GarbageDrafter(VOCAB)) == streamed(None)


@pytest.mark.parametrize(
    "options", [{}, {"repetition_penalty": 1.3}, {"do_sample": True, "temperature": 0.7, "top_k": 9}]
)
def test_scores_and_logits_are_plain_decodings(target, options):
    def run(drafter):
        torch.manual_seed(3)
        return target.generate(
            prompt_of(7),
            max_new_tokens=24,
            assistant_model=drafter,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
            **GREEDY | options,
        )

    plain = run(None)
    for drafter in (OracleDrafter(VOCAB, plain.sequences[0].tolist()), GarbageDrafter(VOCAB)):
        output = run(drafter)
        assert type(output) is type(plain) and torch.equal(output.sequences, plain.sequences)
        assert len(output.scores) == len(output.logits) == 24
        for name in ("scores", "logits"):
            for ours, theirs in zip(output[name], plain[name], strict=True):
                assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
                torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-4)
        assert output.hidden_states is None and output.attentions is None


def test_nothing_is_recorded_that_was_not_asked_for(llama):
    output = llama.generate(
        prompt_of(7), max_new_tokens=9, assistant_model=oracle(llama), return_dict_in_generate=True, **GREEDY
    )
    assert output.scores is None and output.logits is None
    assert output[CACHE].get_seq_length() == 7 + 9 - 1


def test_two_threads_share_a_target_and_a_drafter():
    target = tiny_target("gemma3")
    layers = (0, 2, 4)
    prompts = [prompt_of(5 + seed, seed) for seed in range(12)]
    expected = [plain_text(target, 30, prompt) for prompt in prompts]
    drafter = GarbageDrafter(VOCAB, layers)
    with ThreadPoolExecutor(2) as pool:
        calls = [
            pool.submit(target.generate, prompt, max_new_tokens=30, assistant_model=drafter, **GREEDY)
            for prompt in prompts
        ]
        outputs = [call.result()[0].tolist() for call in calls]
    assert outputs == expected
    assert len(drafter.states) == len(prompts)
    for told in drafter.states:
        known = len(told.tokens())
        (text,) = {tuple(text) for text in expected if text[1 : known + 1] == told.tokens()}
        with torch.no_grad():
            states = target(torch.tensor([text]), output_hidden_states=True).hidden_states
        for layer, index in enumerate(layers):
            torch.testing.assert_close(told.features(layer), states[index][0, :known], rtol=0, atol=5e-4)


def test_statistics_of_a_call_without_a_round(llama):
    drafter = oracle(llama)
    llama.generate(prompt_of(7), max_new_tokens=1, assistant_model=drafter, **GREEDY)
    statistics = drafter.last_statistics
    assert (statistics.rounds, statistics.emitted, statistics.target_calls, statistics.drafter_calls) == (0, 1, 1, 0)
    assert math.isnan(statistics.tau) and math.isnan(statistics.draft_share)
    assert "tau" not in statistics.summary()


def test_statistics_read_well(llama):
    drafter = oracle(llama)
    rounds = Rounds(drafter)
    llama.generate(prompt_of(7), max_new_tokens=30, assistant_model=drafter, **GREEDY)
    statistics, (tree, walk) = drafter.last_statistics, rounds.seen[0]
    assert walk.lengths.tolist() == [9] and tree.tokens[0, walk.nodes[0, 1:]].tolist() == walk.tokens[0, :8].tolist()
    phases = (statistics.prefill_seconds, statistics.draft_seconds, statistics.verify_seconds, statistics.host_seconds)
    assert min(phases) > 0 and statistics.seconds == sum(phases)
    statistics = GenerationStatistics(3, 8, [2, 2, 0], [False, False, True], 27, 4, 3, 0.5, 0.3, 0.6, 0.1)
    assert statistics.summary().splitlines() == [
        "8 tokens in 1.50 s: 5.3 tokens/s",
        "prefill 0.50 s, draft 0.30 s, verify 0.60 s, host 0.10 s",
        "4 calls of the target, 3 of the drafter",
        "draft share 30% of the rounds' time",
        "tau 2.33 over 3 rounds (3.00 where nothing cut it short)",
        "9.0 nodes verified a round",
        "accepted by depth: 67%, 67%",
    ]
