# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Sampling with a drafter: the very tokens of plain sampling, the exact distribution, and processors that remember."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from conftest import VOCAB, prompt_of, tiny_target
from drafters_for_tests import GarbageDrafter, OracleDrafter
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, set_seed


EVERYTHING = {"do_sample": True, "temperature": 0.8, "top_k": 12, "top_p": 0.9, "repetition_penalty": 1.2}


def sampled(target, prompt, seed: int, drafter=None, **options) -> tuple[list[int], torch.Tensor]:
    """The text, and the state of the global generator afterwards."""
    set_seed(seed)
    text = target.generate(prompt, assistant_model=drafter, **options)[0].tolist()
    return text, torch.get_rng_state()


def test_the_same_seed_gives_the_very_tokens_of_plain_sampling():
    target = tiny_target("llama")
    identical, kept = 0, 0
    for seed in range(100):
        prompt = prompt_of(24, seed)
        plain, state = sampled(target, prompt, seed, max_new_tokens=24, **EVERYTHING)
        drafter = GarbageDrafter(VOCAB)
        text, state_after = sampled(target, prompt, seed, drafter, max_new_tokens=24, **EVERYTHING)
        identical += text == plain and torch.equal(state, state_after)
        kept += sum(drafter.last_statistics.accepted)
    assert identical == 100
    assert kept > 50  # the walks did descend


def test_the_same_seed_gives_the_same_tokens_at_every_accepted_length(target):
    prompt = prompt_of(7)
    for seed in range(4):
        plain, state = sampled(target, prompt, seed, max_new_tokens=48, **EVERYTHING)
        drafter = OracleDrafter(VOCAB, plain)
        text, state_after = sampled(target, prompt, seed, drafter, max_new_tokens=48, **EVERYTHING)
        assert text == plain and torch.equal(state, state_after)
        assert drafter.last_statistics.accepted[:9] == list(range(9))


def test_processors_see_fp32_whatever_the_target_computes_in():
    target = tiny_target("llama", "sdpa", torch.bfloat16)
    output = target.generate(
        prompt_of(7),
        max_new_tokens=8,
        assistant_model=GarbageDrafter(VOCAB),
        return_dict_in_generate=True,
        output_scores=True,
        **EVERYTHING,
    )
    assert [scores.dtype for scores in output.scores] == [torch.float32] * 8


class Coins:
    """
    Stands in for `torch.multinomial`: shows the prescribed faces and multiplies their probabilities.

    Args:
        faces (`tuple[int, ...]`): The tokens to "draw".
    """

    def __init__(self, faces: tuple[int, ...]):
        self.faces = list(faces)
        self.probability = 1.0

    def __call__(self, probs: torch.Tensor, num_samples: int) -> torch.Tensor:
        assert probs.shape[0] == 1 and num_samples == 1
        face = self.faces.pop(0)
        self.probability *= probs[0, face].item()
        return torch.tensor([[face]])


@pytest.mark.parametrize(
    "options", [{"temperature": 0.6}, {"temperature": 1.3, "top_k": 3, "repetition_penalty": 1.5}]
)
@pytest.mark.parametrize("drafter_class", [GarbageDrafter, OracleDrafter])
def test_the_distribution_of_three_tokens_is_the_targets(monkeypatch, options, drafter_class):
    torch.manual_seed(0)
    sizes = {"vocab_size": 5, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=2, initializer_range=0.3, bos_token_id=None, eos_token_id=None)
    target = LlamaForCausalLM(config).eval()
    prompt, options = torch.tensor([[1, 4, 2]]), {"max_new_tokens": 3, "do_sample": True, "top_k": 0} | options
    distributions: dict[str, list[float]] = {"plain": [], "drafted": []}
    kept = 0
    for faces in product(range(5), repeat=3):
        # One tree for all outcomes, as a function of the prefix must be: the oracle believes in 3, 0, 2.
        for name, drafter in (
            ("plain", None),
            (
                "drafted",
                GarbageDrafter(5) if drafter_class is GarbageDrafter else OracleDrafter(5, [1, 4, 2, 3, 0, 2, 0, 0]),
            ),
        ):
            coins = Coins(faces)
            with monkeypatch.context() as patch:
                patch.setattr(torch, "multinomial", coins)
                text = target.generate(prompt, assistant_model=drafter, **options)[0].tolist()
            assert text == [1, 4, 2, *faces] and not coins.faces
            distributions[name].append(coins.probability)
        kept += sum(drafter.last_statistics.accepted)
    assert kept > 0
    assert abs(sum(distributions["drafted"]) - 1) < 1e-5
    distance = (
        sum(abs(ours - theirs) for ours, theirs in zip(distributions["drafted"], distributions["plain"], strict=True))
        / 2
    )
    assert distance < 1e-6  # fp32


class FewerOfTheUsual(LogitsProcessor):
    """Remembers every call and lowers the last tokens, more with every call: one call too many changes the text."""

    def __init__(self):
        self.calls: list[list[int]] = []

    def __call__(self, input_ids, scores):
        self.calls.append(input_ids[0].tolist())
        scores = scores.clone()
        scores[:, input_ids[0, -3:]] -= 0.3 * len(self.calls)
        return scores


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("options", [{}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 9, "eos_token_id": 4}])
def test_processors_that_remember_are_called_as_plain_decoding_calls_them(target, do_sample, options):
    def run(drafter):
        processor = FewerOfTheUsual()
        options_of_run = {"max_new_tokens": 30, "do_sample": do_sample, "logits_processor": [processor]} | options
        text, state = sampled(target, prompt_of(7), 2, drafter, **options_of_run)
        return text, processor.calls, state.tolist()

    plain = run(None)
    oracle = OracleDrafter(VOCAB, plain[0])
    assert run(oracle) == plain
    assert max(oracle.last_statistics.accepted) > 1
    assert run(GarbageDrafter(VOCAB)) == plain


@pytest.mark.parametrize("do_sample", [False, True])
def test_classifier_free_guidance_calls_the_target_without_disturbing_us(target, do_sample):
    layers = (0, 2, 4)
    options = {
        "guidance_scale": 1.7,
        "negative_prompt_ids": prompt_of(4, seed=9),
        "do_sample": do_sample,
        "max_new_tokens": 30,
    }
    plain, _ = sampled(target, prompt_of(7), 0, **options)
    unguided, _ = sampled(target, prompt_of(7), 0, max_new_tokens=30, do_sample=do_sample)
    assert plain != unguided
    for drafter in (OracleDrafter(VOCAB, plain, feature_layers=layers), GarbageDrafter(VOCAB, layers)):
        text, _ = sampled(target, prompt_of(7), 0, drafter, **options)
        assert text == plain
        (told,) = drafter.states
        known = len(told.tokens())
        assert told.tokens() == text[1 : known + 1]
        with torch.no_grad():
            states = target(torch.tensor([text]), output_hidden_states=True).hidden_states
        for layer, index in enumerate(layers):
            torch.testing.assert_close(told.features(layer), states[index][0, :known], rtol=0, atol=5e-4)
