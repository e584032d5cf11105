# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""`first_divergence`: nothing where both answers agree; position, tokens and margin where they do not."""

from __future__ import annotations

import pytest
import torch
from conftest import VOCAB, prompt_of
from drafters_for_tests import GarbageDrafter

from specblock_hf.evaluation.divergence import Divergence, divergence_between, first_divergence


SETTINGS = {"max_new_tokens": 12, "do_sample": False}


@pytest.mark.parametrize("do_sample", [False, True])
def test_the_same_answer_gives_none_and_leaves_the_random_state_alone(llama, do_sample):
    before = torch.get_rng_state()
    for seed in range(3):
        prompt = prompt_of(7, seed)
        drafter = GarbageDrafter(VOCAB)
        assert first_divergence(llama, drafter, prompt, seed=seed, max_new_tokens=12, do_sample=do_sample) is None
        assert drafter.last_statistics.emitted == 12
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("position", [0, 5, 11])
@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_position_tokens_and_margin(llama, position, penalty):
    prompt = prompt_of(7)
    settings = SETTINGS | {"repetition_penalty": penalty}
    plain = llama.generate(prompt, **settings, output_scores=True, return_dict_in_generate=True)
    drafted = plain.sequences.clone()
    drafted[0, 7 + position] = (drafted[0, 7 + position] + 1) % VOCAB
    drafted[0, 7 + position + 1 :] = 0
    best, second = plain.scores[position][0].topk(2).values.tolist()
    found = divergence_between(llama, prompt, plain.sequences, drafted, **settings)
    plain_token, drafted_token = plain.sequences[0, 7 + position].item(), drafted[0, 7 + position].item()
    assert found == Divergence(position, plain_token, drafted_token, pytest.approx(best - second, abs=1e-5))


def test_the_callers_processors_stay_and_are_not_changed(llama):
    def ban_everything_above_three(input_ids, scores):
        return scores.index_fill(1, torch.arange(4, VOCAB), -1000.0)

    processors = [ban_everything_above_three]
    settings = SETTINGS | {"logits_processor": processors}
    plain = llama.generate(prompt_of(7), **settings)
    drafted = plain.clone()
    drafted[0, -1] = 9
    found = divergence_between(llama, prompt_of(7), plain, drafted, **settings)
    assert found.position == 11 and found.plain_token < 4 and found.drafted_token == 9 and found.margin < 900
    assert processors == [ban_everything_above_three]


def test_an_answer_that_ended_early(llama):
    prompt = prompt_of(7)
    plain = llama.generate(prompt, **SETTINGS)
    token = plain[0, 7 + 4].item()
    shorter = divergence_between(llama, prompt, plain, plain[:, : 7 + 4], **SETTINGS)
    assert (shorter.position, shorter.plain_token, shorter.drafted_token) == (4, token, None)
    assert shorter.margin > 0
    assert divergence_between(llama, prompt, plain[:, : 7 + 4], plain, **SETTINGS) == Divergence(4, None, token, None)


def test_both_calls_get_the_same_arguments_and_seed():
    class Recorder:
        device = torch.device("cpu")

        def __init__(self):
            self.calls = []

        def generate(self, input_ids, **kwargs):
            self.calls.append((kwargs, torch.rand(())))
            return torch.cat((input_ids, torch.tensor([[len(self.calls) if len(self.calls) < 3 else 1]])), dim=1)

    recorder, drafter = Recorder(), object()
    with pytest.raises(IndexError):  # this target never calls the recording processor
        first_divergence(recorder, drafter, prompt_of(3), seed=5, top_k=4)
    (plain, first), (drafted, second), (repeated, third) = recorder.calls
    assert first == second == third
    assert "assistant_model" not in plain and drafted["assistant_model"] is drafter
    assert "assistant_model" not in repeated and repeated["max_new_tokens"] == 1
    assert plain["top_k"] == drafted["top_k"] == repeated["top_k"] == 4


def test_more_than_one_prompt_is_refused(llama):
    with pytest.raises(ValueError, match="compares one prompt, not 2; call it once per row"):
        first_divergence(llama, GarbageDrafter(VOCAB), torch.ones(2, 3, dtype=torch.long), **SETTINGS)
