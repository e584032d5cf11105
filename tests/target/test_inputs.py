# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What `generate()` hands on to a target: pictures, kinds of tokens, training's leftovers, weights kept elsewhere."""

from __future__ import annotations

import pytest
import torch
from batches_for_tests import garbage, padded_batch
from conftest import prompt_of, tiny_target
from multimodal_for_tests import MULTIMODAL, MULTIMODAL_VOCAB, multimodal_target, prompts_with_images
from options_for_tests import BASE, refusal, same_text
from targets_for_tests import MOE_FAMILIES, OFFLOADED, TargetKind, make_target
from transformers import DynamicCache

from specblock_hf import LookupDrafter, SpecBlockConfig, SpecBlockDrafter
from specblock_hf.compat import CACHE, RELEASE
from specblock_hf.drafting.pairs import TokenTable
from specblock_hf.target.prompt import PromptPairs


def block_drafter(target) -> SpecBlockDrafter:
    torch.manual_seed(0)
    return SpecBlockDrafter(SpecBlockConfig.for_target(target.config, feature_layers=[0, 1, 2])).eval()


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_text_for_a_target_that_could_have_pictures(kind):
    target = multimodal_target(kind)
    for lengths in ((7,), (7, 3, 12)):
        same_text(target, padded_batch(lengths), dict)
    plain = target.generate(**padded_batch((7,)), **BASE)
    assert torch.equal(target.generate(**padded_batch((7,)), **BASE, assistant_model=block_drafter(target)), plain)


@pytest.mark.parametrize("kind", MULTIMODAL)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_picture(kind, attention):
    target = multimodal_target(kind, attention)
    for lengths in ((7,), (7, 3)):
        batch = prompts_with_images(kind, lengths)
        plain = same_text(target, batch, dict)
        blind = target.generate(**batch | {"pixel_values": -batch["pixel_values"]}, **BASE)
        assert not torch.equal(blind, plain)
        drafter = block_drafter(target)
        assert torch.equal(target.generate(**batch, **BASE, assistant_model=drafter), plain)


# What Gemma's pictures say depends on where a prompt is cut: refused, see below.
@pytest.mark.parametrize("kind", [kind for kind in MULTIMODAL if not kind.startswith("gemma")])
def test_a_prompt_with_a_picture_is_read_in_one_piece(kind):
    # Plain decoding forgets the pictures of chunks in old releases and hands each its part in new ones.
    target, batch = multimodal_target(kind), prompts_with_images(kind, (7,))
    plain = target.generate(**batch, **BASE)
    drafter = garbage(1, vocab_size=MULTIMODAL_VOCAB)
    assert torch.equal(target.generate(**batch, **BASE, prefill_chunk_size=3, assistant_model=drafter), plain)
    assert len(drafter.drafters[0].states[0].pairs[0].tokens[0]) == batch["input_ids"].shape[1]


@pytest.mark.skipif(RELEASE < (5, 24), reason="plain decoding cannot read pictures in chunks")
@pytest.mark.parametrize("chunk", [1, 3, 4, 50])
@pytest.mark.parametrize("kind", [kind for kind in MULTIMODAL if not kind.startswith("gemma")])
def test_states_of_a_prompt_with_a_picture_are_those_of_its_last_chunk(kind, chunk):
    wanted = {"return_dict_in_generate": True, "output_hidden_states": True, "output_attentions": True}
    target, batch = multimodal_target(kind, "eager"), prompts_with_images(kind, (7,))
    options = BASE | wanted | {"prefill_chunk_size": chunk}
    plain = target.generate(**batch, **options)
    output = target.generate(**batch, **options, assistant_model=garbage(1, vocab_size=MULTIMODAL_VOCAB))
    assert torch.equal(output.sequences, plain.sequences)
    for name in ("hidden_states", "attentions"):
        for ours, theirs in zip(output[name], plain[name], strict=True):
            for mine, layer in zip(ours, theirs, strict=True):
                torch.testing.assert_close(mine, layer, rtol=0, atol=2e-3)


@pytest.mark.skipif(RELEASE < (5, 24), reason="plain decoding cannot read pictures in chunks")
def test_pictures_and_padding_that_plain_decoding_reads_alone():
    target = multimodal_target("qwen3.5")

    def run(lengths: tuple[int, ...], chunk: int, assistant=None):
        batch, options = (
            prompts_with_images("qwen3.5", lengths),
            BASE | {"eos_token_id": None, "prefill_chunk_size": chunk},
        )
        return target.generate(**batch, **options, assistant_model=assistant)

    for lengths, chunk in (((5,), 1), ((5, 5), 1), ((5, 2), 2)):
        assert torch.equal(run(lengths, chunk, LookupDrafter(target.config)), run(lengths, chunk))
    with pytest.raises(ValueError, match=r"^prefill_chunk_size=1 has \w+ read padding alone, .*; leave"):
        run((5, 2), 1, LookupDrafter(target.config))
    # That is what is wrong with it.
    assert not torch.equal(run((5, 2), 1), run((5, 2), 2))


@pytest.mark.skipif(RELEASE < (5, 24), reason="plain decoding cannot read pictures in chunks")
def test_pictures_whose_tokens_see_each_other_are_not_cut():
    target, batch = multimodal_target("gemma3 with images"), prompts_with_images("gemma3 with images", (9,))

    def run(chunk: int, assistant=None):
        options = BASE | {"eos_token_id": None, "prefill_chunk_size": chunk, "max_new_tokens": 8}
        return target.generate(**batch, **options, assistant_model=assistant)

    assert torch.equal(run(13, LookupDrafter(target.config)), run(13))
    with pytest.raises(ValueError, match=r"^prefill_chunk_size=2 cuts a prompt in which .*; leave prefill_chunk"):
        run(2, LookupDrafter(target.config))


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_a_second_turn_about_a_picture(kind):
    target, batch = multimodal_target(kind), prompts_with_images(kind, (7,))
    texts = []
    for drafter in (None, garbage(1, vocab_size=MULTIMODAL_VOCAB), garbage(1, vocab_size=MULTIMODAL_VOCAB)):
        cache = DynamicCache(config=target.config)
        first = target.generate(**batch, **BASE, **{CACHE: cache}, assistant_model=drafter)
        ids = torch.cat((first, prompt_of(4, seed=2)), dim=1)
        more = {"input_ids": ids, "attention_mask": torch.ones_like(ids), CACHE: cache}
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in batch:
                more[name] = torch.nn.functional.pad(batch[name], (0, ids.shape[1] - batch[name].shape[1]))
        texts.append(
            target.generate(**more, **BASE, assistant_model=drafter and garbage(1, vocab_size=MULTIMODAL_VOCAB))
        )
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])


def test_ids_that_stand_for_pictures_have_no_embedding():
    table = TokenTable(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8), 8)
    ids = torch.tensor([[3, 9, 9, 5]])
    pairs = PromptPairs(table, ids, None, 4, None, 4).pairs((), 0, 4)
    assert pairs.tokens.tolist() == [[-1, -1, 5, -1]] and pairs.embeds().shape == (1, 4, 4)


def test_kinds_of_tokens_go_on_with_the_text():
    # GPT-2 adds their embeddings, also to what is written.
    target = make_target(TargetKind("gpt2"))
    for lengths in ((7,), (7, 3)):
        batch = padded_batch(lengths)
        kinds = {"token_type_ids": torch.full_like(batch["input_ids"], 9)}
        plain = same_text(target, batch | kinds, dict)
        assert not torch.equal(plain, same_text(target, batch, dict))


def test_rows_that_have_ended_take_their_kinds_of_tokens_along():
    target, batch = make_target(TargetKind("gpt2")), padded_batch((7, 3, 5))
    batch["token_type_ids"] = torch.arange(3).unsqueeze(1).expand_as(batch["input_ids"]) + 9
    plain = target.generate(**batch, **BASE | {"eos_token_id": None})
    for eos in plain[:, -12].tolist():
        same_text(target, batch, lambda eos=eos: {"eos_token_id": eos})


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("mask", [torch.int32, torch.bool, torch.int64])
def test_ids_of_any_whole_numbers(llama, dtype, mask):
    batch = padded_batch((7, 3))
    batch = {"input_ids": batch["input_ids"].to(dtype), "attention_mask": batch["attention_mask"].to(mask)}
    assert same_text(llama, batch, dict).dtype == torch.int64
    drafted = llama.generate(**batch, **BASE, assistant_model=garbage(2))
    assert drafted.dtype == torch.int64


def test_an_empty_prompt(llama):
    for batch in ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, {"inputs_embeds": torch.zeros(1, 0, 32)}):
        batch["attention_mask"] = torch.ones(1, 0, dtype=torch.long)
        with pytest.raises(RuntimeError):
            llama.generate(**batch, **BASE)
        said = refusal(llama, batch, dict)
        assert said.startswith("the prompt is empty and the first token is chosen from its last one")


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_router_logits_in_the_configuration(family):
    target = make_target(TargetKind(family, flag="output_router_logits"))
    plain = same_text(target, padded_batch((7,)), dict)
    # Plain decoding of a padded batch fails with them.
    batch = padded_batch((7, 3))
    drafted = target.generate(**batch, **BASE, assistant_model=garbage(2))
    assert torch.equal(drafted, make_target(TargetKind(family)).generate(**batch, **BASE))
    assert torch.equal(plain, make_target(TargetKind(family)).generate(**padded_batch((7,)), **BASE))


@pytest.mark.parametrize("flag", ["output_hidden_states", "output_attentions", "use_cache"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mixtral"])
def test_other_flags_in_the_configuration(family, flag):
    target = make_target(TargetKind(family, attention="eager", flag=flag))
    for lengths in ((7,), (7, 3)):
        same_text(target, padded_batch(lengths), dict)


@pytest.mark.parametrize("offload", OFFLOADED)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_weights_that_are_kept_elsewhere(offload, family):
    target = make_target(TargetKind(family, wrap=offload))
    embedding = target.get_input_embeddings()
    assert embedding.weight.is_meta
    table, held = TokenTable.of(target), make_target(TargetKind(family)).get_input_embeddings()
    ids = prompt_of(5)
    assert table.device == torch.device("cpu")
    assert torch.equal(table.embed(ids, raw=True), held.weight[ids]) and torch.equal(table.embed(ids), held(ids))
    assert embedding.weight.is_meta
    for lengths in ((7,), (7, 3)):
        batch = padded_batch(lengths)
        plain = same_text(target, batch, dict)
        assert torch.equal(plain, make_target(TargetKind(family)).generate(**batch, **BASE))
        assert torch.equal(target.generate(**batch, **BASE, assistant_model=block_drafter(target)), plain)


@pytest.mark.skipif(RELEASE < (5, 24), reason="plain decoding hands shared keys to copies of what they are kept in")
@pytest.mark.parametrize("offload", ["cpu offload", "disk offload"])
def test_layers_that_share_keys_and_are_kept_elsewhere(offload):
    """Where the head will be is not known before."""
    target = make_target(TargetKind("gemma4, shared keys", layers=8, wrap=offload))
    torch.manual_seed(0)
    drafter = SpecBlockDrafter(SpecBlockConfig.for_target(target.config, feature_layers=[2, 6, 8])).eval()
    plain = target.generate(**padded_batch((7, 3)), **BASE)
    assert torch.equal(target.generate(**padded_batch((7, 3)), **BASE, assistant_model=drafter), plain)


def test_an_input_that_is_not_passed_on_is_refused():
    said = refusal(tiny_target("gemma3"), padded_batch((4,)), lambda: {"output_router_logits": True})
    assert said.startswith("generate() got output_router_logits, which tree drafting does not pass on")
