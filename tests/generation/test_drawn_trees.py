# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""`generate()` with drawn trees: the target's distribution, processors with a memory of the text, refusals."""

from __future__ import annotations

from itertools import count, product

import pytest
import torch
from conftest import VOCAB, prompt_of, tiny_target
from drafters_for_tests import GarbageDrafter
from test_rejection_sampling import assert_drawn_from
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    set_seed,
)

from specblock_hf import DraftingPlan, JoinedDrafter, LookupDrafter, SpecBlockConfig, SpecBlockDrafter


RULES = ("token", "block")
EVERYTHING = {"do_sample": True, "temperature": 0.8, "top_k": 12, "top_p": 0.9, "repetition_penalty": 1.2}


def drafter_for(target, **plan) -> SpecBlockDrafter:
    torch.manual_seed(1)
    size = {
        "draft_vocab_size": target.config.vocab_size - 2,
        "block_size": 2,
        "root_width": 4,
        "branching": [2, 3, 4, 0],
    }
    drafter = SpecBlockDrafter(SpecBlockConfig.for_target(target.config, **size, rank_top_k=10, initializer_range=0.3))
    drafter.drafting_plan = DraftingPlan(**{"tree_budget": 8, "num_forwards": 2, "max_starts": 3} | plan)
    return drafter.eval()


@pytest.fixture
def known_draws(monkeypatch):
    """Drafts are drawn with the seeds 0, 1, 2, ... and not with the operating system's."""
    seeds = count()
    generator = "specblock_hf.drafters.common.network.private_generator"
    monkeypatch.setattr(generator, lambda device: torch.Generator(device).manual_seed(next(seeds)))


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.usefixtures("known_draws")
def test_walking_over_a_drawn_tree_gives_the_very_tokens_of_plain_sampling(joined):
    """The tree is drawn without touching the global generator."""
    target, kept = tiny_target("llama"), 0
    drafter = drafter_for(target, draft_sampling="sampled", verification="walk")
    if joined:
        drafter = JoinedDrafter(drafter, LookupDrafter(target.config))
    for seed in range(4):
        prompt, texts, states = prompt_of(9, seed), [], []
        for assistant in (None, drafter):
            set_seed(seed)
            texts.append(target.generate(prompt, assistant_model=assistant, max_new_tokens=24, **EVERYTHING).tolist())
            states.append(torch.get_rng_state())
        assert texts[0] == texts[1] and torch.equal(*states)
        kept += sum(drafter.last_statistics.accepted)
    assert kept > 0


def test_no_two_calls_draw_the_same_tree():
    """Otherwise texts of the same prompt would depend on each other."""
    target, trees = tiny_target("llama"), set()
    drafter = drafter_for(target, draft_sampling="sampled")
    for _ in range(3):
        set_seed(0)
        target.generate(prompt_of(9), assistant_model=drafter, max_new_tokens=8, **EVERYTHING)
        trees.add(str(drafter.last_statistics.first_round[0].tokens.tolist()))
    assert len(trees) == 3


@pytest.fixture(scope="module")
def peaked():
    """A target over 12 tokens, 3 of which can follow any text, and the distribution of three tokens after a prompt."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=4, initializer_range=0.3, bos_token_id=None, eos_token_id=None)
    target, prompt = LlamaForCausalLM(config).eval(), torch.tensor([[1, 4, 2, 4]])
    processors = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.4),
            NoRepeatNGramLogitsProcessor(2),
            TemperatureLogitsWarper(1.2),
            TopKLogitsWarper(3),
        ]
    )
    distribution = {(): 1.0}
    for _ in range(3):
        longer = {}
        for text, mass in distribution.items():
            ids = torch.cat((prompt, torch.tensor([text], dtype=torch.long)), dim=1)
            with torch.no_grad():
                scores = processors(ids, target(ids).logits[:, -1])
            for token, chance in enumerate(scores[0].softmax(-1).tolist()):
                if chance:
                    longer[*text, token] = mass * chance
        distribution = longer
    options = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "temperature": 1.2, "top_k": 3}
    return target, prompt, distribution, options | {"do_sample": True, "max_new_tokens": 3}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.usefixtures("known_draws")
def test_the_distribution_of_three_tokens_with_processors_that_look_at_the_text(peaked, rule):
    target, prompt, distribution, options = peaked
    drafter = drafter_for(target, draft_sampling="sampled", verification=rule, tree_budget=4)
    torch.manual_seed(3)
    counts: dict[tuple[int, ...], int] = {}
    kept = 0
    for _ in range(4):
        texts = target.generate(prompt, assistant_model=drafter, num_return_sequences=250, pad_token_id=0, **options)
        for text in texts[:, prompt.shape[1] :].tolist():
            counts[tuple(text)] = counts.get(tuple(text), 0) + 1
        kept += sum(drafter.last_statistics.accepted)
    assert kept > 60
    assert set(counts) <= set(distribution)
    assert_drawn_from({text: distribution.get(text, 0.0) for text in product(range(12), repeat=3)}, counts)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.usefixtures("known_draws")
def test_scores_are_those_of_the_emitted_tokens(rule):
    target = tiny_target("llama")
    drafter = drafter_for(target, draft_sampling="sampled", verification=rule)
    set_seed(0)
    output = target.generate(
        prompt_of(9),
        assistant_model=drafter,
        max_new_tokens=20,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **EVERYTHING,
    )
    assert sum(drafter.last_statistics.accepted) > 0
    processors = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.2),
            TemperatureLogitsWarper(0.8),
            TopKLogitsWarper(12),
            TopPLogitsWarper(0.9),
        ]
    )
    with torch.no_grad():
        logits = target(output.sequences).logits
    assert len(output.scores) == len(output.logits) == 20
    for step in range(20):
        here = 9 + step
        torch.testing.assert_close(output.logits[step], logits[:, here - 1], rtol=0, atol=1e-4)
        scores = processors(output.sequences[:, :here], logits[:, here - 1].clone())
        torch.testing.assert_close(output.scores[step], scores, rtol=0, atol=1e-3)


def test_a_drawn_batch_ends_where_its_rows_end():
    target = tiny_target("llama")
    drafter = drafter_for(target, draft_sampling="sampled")
    set_seed(0)
    prompts = torch.cat((prompt_of(9), prompt_of(9, 1), prompt_of(9, 2)))
    texts = target.generate(
        prompts, assistant_model=drafter, do_sample=True, max_new_tokens=30, eos_token_id=[4, 5], pad_token_id=0
    )[:, 9:].tolist()
    for text in texts:
        ends = [place for place, token in enumerate(text) if token in (4, 5)]
        assert not ends or set(text[ends[0] + 1 :]) <= {0}
        assert ends or len(text) == 30


def test_a_greedy_call_drafts_the_likeliest_tokens_whatever_the_plan_says():
    target = tiny_target("llama")
    drafter = drafter_for(target, draft_sampling="sampled", verification="block")
    plain = target.generate(prompt_of(9), max_new_tokens=20, do_sample=False)
    assert target.generate(prompt_of(9), assistant_model=drafter, max_new_tokens=20, do_sample=False).equal(plain)
    assert drafter.last_statistics.first_round[0].distributions is None


class Counting:
    """A processor of one's own."""

    def __call__(self, input_ids, scores):
        return scores


def test_processors_that_may_remember_their_calls_are_refused():
    target, options = tiny_target("llama"), {"do_sample": True, "max_new_tokens": 4}
    drafter = drafter_for(target, draft_sampling="sampled")
    with pytest.raises(ValueError, match="Counting may remember how it was called"):
        target.generate(prompt_of(9), assistant_model=drafter, logits_processor=[Counting()], **options)
    drafter.drafting_plan = DraftingPlan(8, 1, draft_sampling="sampled", verification="walk")
    target.generate(prompt_of(9), assistant_model=drafter, logits_processor=[Counting()], **options)


def test_a_drafter_that_cannot_draw_is_refused():
    drafter = GarbageDrafter(VOCAB)
    drafter.drafting_plan = DraftingPlan(8, 1, draft_sampling="sampled")
    options = {"assistant_model": drafter, "max_new_tokens": 4}
    with pytest.raises(ValueError, match="GarbageDrafter drafts the likeliest tokens only"):
        tiny_target("llama").generate(prompt_of(9), do_sample=True, **options)
    tiny_target("llama").generate(prompt_of(9), do_sample=False, **options)


def test_plans_that_contradict_themselves():
    assert DraftingPlan(8, 1).rule == "walk"
    assert DraftingPlan(8, 1, draft_sampling="sampled").rule == "block"
    assert DraftingPlan(8, 1, draft_sampling="sampled", verification="token").rule == "token"
    with pytest.raises(ValueError, match="compares drawn tokens with the distributions"):
        DraftingPlan(8, 1, verification="block")
    with pytest.raises(ValueError, match="draft_sampling is 'gumbel'; give one of topk, sampled"):
        DraftingPlan(8, 1, draft_sampling="gumbel")
    with pytest.raises(ValueError, match="verification is 'typical'; give one of walk, token, block"):
        DraftingPlan(8, 1, draft_sampling="sampled", verification="typical")
