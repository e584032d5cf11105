# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Batches: every row at its own pace, and still what plain decoding writes on the same padded batch."""

from __future__ import annotations

from collections import defaultdict
from itertools import product

import pytest
import torch
from baselines_for_tests import BASELINES, baseline
from batches_for_tests import garbage, oracles, padded_batch
from block_drafters_for_tests import block_drafter
from conftest import VOCAB, prompt_of, tiny_target
from drafters_for_tests import GarbageDrafter, OracleDrafter
from training_for_tests import tiny_drafter
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    MaxTimeCriteria,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)
from transformers.generation.streamers import BaseStreamer

from specblock_hf import SpecBlockConfig, SpecBlockDrafter
from specblock_hf.compat import CACHE, OLDEST, RELEASE


LENGTHS = (7, 3, 12, 1)
PROMPT = max(LENGTHS)
GREEDY = {"do_sample": False, "max_new_tokens": 30, "pad_token_id": 0}
LAYERS = (0, 2, 4)


def emitted_tokens(output: torch.LongTensor, eos: int | None) -> list[int]:
    """Tokens of each row up to its first EOS."""
    rows = [row[PROMPT:].tolist() for row in output]
    return [row.index(eos) + 1 if eos in row else len(row) for row in rows]


@pytest.mark.parametrize("eos", [None, 5])
def test_rows_at_their_own_pace_write_what_plain_decoding_writes(target, eos):
    batch = padded_batch(LENGTHS)
    plain = target.generate(**batch, **GREEDY, eos_token_id=eos)
    for drafter in (oracles(plain, batch["attention_mask"]), garbage(4)):
        output = target.generate(**batch, **GREEDY, eos_token_id=eos, assistant_model=drafter)
        assert torch.equal(output, plain)
        statistics, emitted = drafter.last_statistics, emitted_tokens(plain, eos)
        assert statistics.emitted == sum(emitted)
        for row, count in enumerate(emitted):
            kept = [kept for kept, its in zip(statistics.accepted, statistics.row, strict=True) if its == row]
            assert sum(kept) + len(kept) == count - 1
            assert statistics.tau_of(row) == 1 + sum(kept) / len(kept)


@pytest.mark.parametrize("name", ["dflash", "specblock", *BASELINES])
def test_a_chunk_that_is_padding_in_every_row_tells_nothing(llama, name):
    drafter = {"dflash": block_drafter, "specblock": tiny_drafter}.get(name, lambda: baseline(name))()
    batch = padded_batch((5, 8))
    batch["attention_mask"][:, :4] = 0  # of the longest row, too
    options = GREEDY | {"max_new_tokens": 8, "prefill_chunk_size": 2}
    output = llama.generate(**batch, **options, assistant_model=drafter)
    assert torch.equal(output, llama.generate(**batch, **options))


def test_every_accepted_length_meets_every_other(llama):
    # Rows keep 0 to 8 tokens in the same round, in all pairs.
    batch = padded_batch((4, 9))
    options = {"do_sample": False, "max_new_tokens": 420, "eos_token_id": None}
    plain = llama.generate(**batch, **options)
    plans = [lambda number: number % 9, lambda number: (number + number // 9) % 9]
    drafter = oracles(plain, batch["attention_mask"], plans)
    assert torch.equal(llama.generate(**batch, **options, assistant_model=drafter), plain)
    statistics = drafter.last_statistics
    pairs = list(zip(statistics.accepted[::2], statistics.accepted[1::2], strict=False))
    assert set(product(range(9), repeat=2)) <= set(pairs[:82])


@pytest.mark.parametrize("chunk", [None, 4])
def test_each_row_is_told_its_own_states(target, chunk):
    batch = padded_batch(LENGTHS)
    plain = target.generate(**batch, **GREEDY, eos_token_id=5)
    for drafter in (oracles(plain, batch["attention_mask"], feature_layers=LAYERS), garbage(4, LAYERS)):
        target.generate(**batch, **GREEDY, eos_token_id=5, assistant_model=drafter, prefill_chunk_size=chunk)
        for row, length in enumerate(LENGTHS):
            (told,) = drafter.drafters[row].states
            text = plain[row, PROMPT - length :].tolist()
            known = len(told.tokens())
            assert known >= length
            assert (told.tokens(), told.positions()) == (text[1 : known + 1], list(range(known)))
            with torch.no_grad():
                states = target(torch.tensor([text[:known]]), output_hidden_states=True).hidden_states
            for layer, index in enumerate(LAYERS):
                torch.testing.assert_close(told.features(layer), states[index][0], rtol=0, atol=5e-4)


def test_a_block_drafter_drafts_for_a_row_as_if_it_were_alone(llama):
    torch.manual_seed(0)
    config = SpecBlockConfig.for_target(llama.config, branching=[2, 4, 6, 4], rank_top_k=20)
    drafter = SpecBlockDrafter(config).eval()
    batch = padded_batch(LENGTHS)
    options = GREEDY | {"max_new_tokens": 60, "eos_token_id": 5}
    plain = llama.generate(**batch, **options)
    assert torch.equal(llama.generate(**batch, **options, assistant_model=drafter), plain)
    together = drafter.last_statistics
    assert sum(together.accepted) > 0
    for row, length in enumerate(LENGTHS):
        llama.generate(**padded_batch((length,), row), **options, assistant_model=drafter)
        kept = [kept for kept, its in zip(together.accepted, together.row, strict=True) if its == row]
        assert kept == drafter.last_statistics.accepted


def test_a_mask_with_holes(target):
    ids = torch.cat([prompt_of(8, 1), prompt_of(8, 2)])
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1], [1, 0, 1, 1, 0, 1, 0, 1]])
    options = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False}
    plain = target.generate(ids, **options)
    rows = [torch.cat((ids[row][mask[row].bool()], plain[row, 8:])) for row in range(2)]
    width = max(map(len, rows))
    texts = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    drafter = oracles(texts, torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long())
    assert torch.equal(target.generate(ids, **options, assistant_model=drafter), plain)
    assert sum(drafter.last_statistics.accepted) > 10


def batch_sizes(target, **options) -> list[int]:
    """How many rows each forward of a call has."""
    sizes: list[int] = []
    hook = target.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    try:
        target.generate(**options)
    finally:
        hook.remove()
    return sizes


def test_a_row_that_has_stopped_costs_nothing(target):
    batch = padded_batch(LENGTHS)
    options = batch | GREEDY | {"eos_token_id": 5}
    plain = target.generate(**options)
    drafter = garbage(4)
    sizes = batch_sizes(target, **options, assistant_model=drafter)
    statistics = drafter.last_statistics
    # One forward for the prompts, then one of the rows that are left for each round.
    assert sizes[0] == 4 and sum(sizes[1:]) == len(statistics.accepted)
    assert sizes[-1] < 4 and sizes == sorted(sizes, reverse=True)
    # Unless its columns are handed back.
    assert set(batch_sizes(target, **options, assistant_model=drafter, return_dict_in_generate=True)) == {4}
    assert torch.equal(target.generate(**options, assistant_model=drafter, return_dict_in_generate=True)[0], plain)


@pytest.mark.parametrize("eos", [None, 5])
def test_the_cache_is_handed_back_as_plain_decoding_leaves_it(target, eos):
    batch = padded_batch(LENGTHS)
    options = GREEDY | {"eos_token_id": eos, "return_dict_in_generate": True}
    plain = target.generate(**batch, **options)
    more = torch.cat([prompt_of(5, 20 + row) for row in range(4)])
    outputs = []
    for drafter in (None, oracles(plain.sequences, batch["attention_mask"]), garbage(4)):
        first = target.generate(**batch, **options, assistant_model=drafter)
        assert torch.equal(first.sequences, plain.sequences)
        written = torch.arange(first.sequences.shape[1]) < PROMPT + torch.tensor(
            emitted_tokens(first.sequences, eos)
        ).unsqueeze(1)
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, written.shape[1] - PROMPT), value=1) * written
        for ours, theirs in zip(first[CACHE].layers, plain[CACHE].layers, strict=True):
            seen = mask[:, None, :-1, None][:, :, -theirs.keys.shape[2] :]
            torch.testing.assert_close(ours.keys * seen, theirs.keys * seen, rtol=0, atol=5e-4)
            torch.testing.assert_close(ours.values * seen, theirs.values * seen, rtol=0, atol=5e-4)
        ids = torch.cat((first.sequences, more), dim=1)
        mask = torch.nn.functional.pad(mask, (0, 5), value=1)
        outputs.append(
            target.generate(
                ids,
                attention_mask=mask,
                **{CACHE: first[CACHE]},
                max_new_tokens=12,
                do_sample=False,
                assistant_model=None if drafter is None else garbage(4),
            )
        )
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("eos", [None, 5])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_static_cache_near_its_end(kind, attention, eos):
    target = tiny_target(kind, attention)
    for batch in (padded_batch(LENGTHS), padded_batch((6,))):
        options = batch | GREEDY | {"cache_implementation": "static", "eos_token_id": eos}
        plain = target.generate(**options)
        for drafter in (oracles(plain, batch["attention_mask"]), garbage(len(plain))):
            assert torch.equal(target.generate(**options, assistant_model=drafter), plain)


# What each option does to plain decoding is seen in the text, or the row would prove nothing.
PROCESSORS = {
    "bad_words_ids": [[21, 23], [4]],
    "begin_suppress_tokens": [26, 28],
    "encoder_no_repeat_ngram_size": 1,
    "encoder_repetition_penalty": 1.6,
    "exponential_decay_length_penalty": (3, 1.3),
    "forced_eos_token_id": 9,
    "min_length": 28,
    "min_new_tokens": 14,
    "no_repeat_ngram_size": 2,
    "prefix_allowed_tokens_fn": lambda row, ids: [(int(ids[-1]) * 5 + row) % VOCAB, 2 + row, 5],
    "remove_invalid_values": None,
    "repetition_penalty": 1.5,
    "sequence_bias": {(3,): -8.0, (17, 4): 6.0},
    "suppress_tokens": [21, 7],
    "watermarking_config": WatermarkingConfig(bias=4.0, context_width=1),
    "synthid": SynthIDTextWatermarkingConfig(ngram_len=3, keys=[3, 14, 15, 92], sampling_table_size=64),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_get_one_row_at_a_time(name):
    target, batch = tiny_target("llama"), padded_batch(LENGTHS)
    option = {"watermarking_config" if name == "synthid" else name: PROCESSORS[name] or True}
    options = GREEDY | {"eos_token_id": 5, "return_dict_in_generate": True, "output_scores": True}
    if name == "forced_eos_token_id":
        options["max_new_tokens"] = 8  # while no row has ended
    without = target.generate(**batch, **options)
    plain = target.generate(**batch, **options, **option)
    assert name == "remove_invalid_values" or not torch.equal(plain.sequences, without.sequences)
    for drafter in (oracles(plain.sequences, batch["attention_mask"]), garbage(4)):
        output = target.generate(**batch, **options, **option, assistant_model=drafter)
        assert torch.equal(output.sequences, plain.sequences)
        emitted = emitted_tokens(plain.sequences, 5)
        assert len(output.scores) == len(plain.scores) == max(emitted)
        for step, (ours, theirs) in enumerate(zip(output.scores, plain.scores, strict=True)):
            for row, count in enumerate(emitted):
                expected = theirs[row] if step < count else torch.zeros(VOCAB)
                torch.testing.assert_close(ours[row], expected, rtol=0, atol=5e-4)


def test_several_sequences_of_a_prompt_are_a_batch(target):
    options = {"max_new_tokens": 20, "do_sample": True, "top_k": 1, "num_return_sequences": 3}
    for batch in (padded_batch((6,)), padded_batch((6, 3))):
        plain = target.generate(**batch, **options)
        mask = batch["attention_mask"].repeat_interleave(3, dim=0)
        for drafter in (oracles(plain, mask), garbage(len(plain))):
            assert torch.equal(target.generate(**batch, **options, assistant_model=drafter), plain)


@pytest.mark.parametrize(
    "name",
    [
        "encoder_no_repeat_ngram_size",
        pytest.param(
            "encoder_repetition_penalty",
            marks=pytest.mark.skipif(RELEASE == OLDEST, reason="plain decoding forgets half of the sequences"),
        ),
        "prefix_allowed_tokens_fn",
    ],
)
def test_sequences_of_a_prompt_share_what_is_held_for_it(llama, name):
    batch = padded_batch((6, 6), seed=4)
    option = {name: PROCESSORS[name], "max_new_tokens": 20, "do_sample": True, "top_k": 1, "num_return_sequences": 2}
    plain = llama.generate(**batch, **option)
    assert torch.equal(llama.generate(**batch, **option, assistant_model=garbage(4)), plain)


class Coins:
    """
    Stands in for `torch.multinomial`: shows the prescribed faces, one for each row, and multiplies their
    probabilities.
    """

    def __init__(self, faces: tuple[int, ...]):
        self.faces = list(faces)
        self.probability = 1.0

    def __call__(self, probs: torch.Tensor, num_samples: int) -> torch.Tensor:
        shown = [self.faces.pop(0) for _ in probs]
        for row, face in zip(probs, shown, strict=True):
            self.probability *= row[face].item()
        return torch.tensor(shown).unsqueeze(1)


def test_a_batch_follows_the_targets_distribution(monkeypatch):
    new_tokens = 3
    torch.manual_seed(0)
    sizes = {"vocab_size": 2, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=2, initializer_range=0.5, bos_token_id=None, eos_token_id=None)
    target = LlamaForCausalLM(config).eval()
    batch = {"input_ids": torch.tensor([[1, 0, 1], [0, 0, 1]]), "attention_mask": torch.tensor([[1] * 3, [0, 1, 1]])}
    options = batch | {"max_new_tokens": new_tokens, "do_sample": True, "temperature": 0.6, "repetition_penalty": 1.3}
    distributions: dict[str, dict] = {"plain": defaultdict(float), "drafted": defaultdict(float)}
    kept = 0
    for faces in product(range(2), repeat=2 * new_tokens):
        # One tree for all outcomes, as a function of the prefix must be.
        drafts = [OracleDrafter(2, [1, 0, 1, 1, 0, 0, 1], lambda number: 2), GarbageDrafter(2)]
        drafter = oracles(torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1))
        drafter.drafters, drafter.config.vocab_size = drafts, 2
        for name, assistant in (("plain", None), ("drafted", drafter)):
            coins = Coins(faces)
            with monkeypatch.context() as patch:
                patch.setattr(torch, "multinomial", coins)
                output = target.generate(**options, assistant_model=assistant)
            assert not coins.faces
            distributions[name][tuple(output[:, 3:].flatten().tolist())] += coins.probability
        kept += sum(drafter.last_statistics.accepted)
    assert kept > 0 and len(distributions["plain"]) == len(distributions["drafted"]) == 4**new_tokens
    assert abs(sum(distributions["drafted"].values()) - 1) < 1e-5
    assert (
        max(abs(distributions["plain"][text] - distributions["drafted"][text]) for text in distributions["plain"])
        < 1e-6
    )  # fp32


def test_a_prompt_of_embeddings(target):
    batch = padded_batch(LENGTHS)
    options = {"attention_mask": batch["attention_mask"], "max_new_tokens": 20, "do_sample": False}
    embeds = target.get_input_embeddings()(batch["input_ids"])
    plain = target.generate(inputs_embeds=embeds, **options)
    texts = torch.cat((batch["input_ids"], plain), dim=1)
    for drafter in (oracles(texts, batch["attention_mask"]), garbage(4, LAYERS)):
        assert torch.equal(target.generate(inputs_embeds=embeds, **options, assistant_model=drafter), plain)


def test_a_cache_of_the_user_is_filled_for_every_row(llama):
    batch = padded_batch(LENGTHS)
    cache = DynamicCache(config=llama.config)
    plain = llama.generate(**batch, **GREEDY, eos_token_id=5)
    output = llama.generate(**batch, **GREEDY, eos_token_id=5, **{CACHE: cache}, assistant_model=garbage(4))
    assert torch.equal(output, plain)
    assert cache.layers[0].keys.shape[0] == 4 and cache.get_seq_length() == plain.shape[1] - 1


class Rows(LogitsProcessor):
    """Looks at the whole batch."""

    def __call__(self, input_ids, scores):
        return scores - scores.mean(0)


class Ears(BaseStreamer):
    def put(self, value):
        pass

    def end(self):
        pass


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"logits_processor": [Rows()]}, r"^Rows may look at a whole batch at once, .* call generate\(\) for each"),
        ({"stopping_criteria": [lambda ids, scores: ids[:, -1] == 3]}, r"^function may look at a whole batch"),
        ({"streamer": Ears()}, r"^a streamer takes the tokens of one prompt at a time; call generate\(\) for each"),
        ({"max_time": 9.0}, r"^without eos_token_id .* set eos_token_id, or leave out stop_strings and max_time\.$"),
        ({"cache_implementation": "static", "return_dict_in_generate": True}, r"StaticCache has no room to keep"),
    ],
)
def test_what_cannot_tell_rows_apart_is_refused(llama, options, sentence):
    drafter = garbage(4)
    with pytest.raises(ValueError, match=sentence):
        llama.generate(**padded_batch(LENGTHS), **GREEDY, **options, assistant_model=drafter)
    assert all(not row.states for row in drafter.drafters)


def test_max_time_ends_every_row(llama):
    batch = padded_batch(LENGTHS)
    options = GREEDY | {"eos_token_id": 5, "stopping_criteria": [MaxTimeCriteria(0.0)]}
    plain = llama.generate(**batch, **options)
    assert plain.shape[1] == PROMPT + 1
    assert torch.equal(llama.generate(**batch, **options, assistant_model=garbage(4)), plain)
