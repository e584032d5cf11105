# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
What users pass to `generate()`: every option writes what plain decoding writes, or is refused in one sentence.
`docs/generate.md` must say what is found here; a run of the whole file with `--write-docs` writes that part of it.
"""

from __future__ import annotations

import asyncio
import inspect
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from batches_for_tests import garbage, oracles, padded_batch
from conftest import prompt_of, tiny_target
from options_for_tests import (
    BASE,
    EXACT,
    ONE,
    RIVALS,
    ROWS,
    SEVERAL,
    UNTRIED,
    outcome,
    plainly,
    refusal,
    same_text,
    tiny_tokenizer,
)
from page_for_tests import DOCS, IN_OUT, OPTIONS, note, outdated, ran, render, table_of  # noqa: F401
from transformers import (
    AsyncTextIteratorStreamer,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    StaticCache,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from specblock_hf import SpecBlockConfig, SpecBlockDrafter
from specblock_hf.compat import CACHE
from specblock_hf.generation.requests import RIVAL_OPTIONS


table = table_of(lambda sections: len(sections[OPTIONS]) == len(ROWS), OPTIONS, IN_OUT)


def test_every_field_of_a_generation_config_has_its_place():
    listed = {name for row in ROWS for name in re.findall(r"\w+", row.option)} | set().union(*UNTRIED.values())
    listed |= set(re.findall(r"\w+", DOCS.read_text().split(f"## {IN_OUT}")[1].split("## ")[0]))
    new = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - listed
    assert not new, f"say in tests/options_for_tests.py what becomes of {sorted(new)} beside a drafter"


def test_generate_takes_no_argument_that_nobody_here_has_heard_of():
    known = "self inputs generation_config logits_processor stopping_criteria prefix_allowed_tokens_fn synced_gpus "
    known += "assistant_model streamer negative_prompt_ids negative_prompt_attention_mask custom_generate kwargs"
    assert inspect.signature(GenerationMixin.generate).parameters.keys() <= set(known.split())


def test_what_would_be_ignored_beside_a_drafter_is_refused():
    assert set(RIVAL_OPTIONS) == RIVALS.keys() <= vars(GenerationConfig()).keys()


def test_a_page_that_says_something_else_is_noticed():
    sections = {"Options": {"`a`": (EXACT, EXACT, "test_option"), "`b`": ("no.", "no.", "test_option")}}
    page = render(sections)
    assert outdated(page, sections, True) == outdated(page, sections, False) == []
    other = {"Options": {"`b`": ("never.", "no.", "test_option")}}
    assert outdated(page, other, False) == ["+| `b` | never. | no. | `test_option` |"]
    changes = outdated(page, other, True)
    assert [line for line in changes if line.startswith(("-|", "+|"))] == [
        "-| `a` | exact | exact | `test_option` |",
        "-| `b` | no. | the same | `test_option` |",
        "+| `b` | never. | no. | `test_option` |",
    ]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.option.replace("`", ""))
def test_option(table, row):
    changed = False
    for kind in row.kinds:
        target = tiny_target(kind)
        one = outcome(target, padded_batch(ONE), row.make, row.one)
        several = outcome(target, padded_batch(SEVERAL), row.make, row.several)
        if row.changes and row.one == EXACT:
            changed |= plainly(target, row.make()) != plainly(target, {})
    assert changed or not (row.changes and row.one == EXACT)
    table[OPTIONS][row.option] = (one, several, "test_option")


def block_drafter(target, **overrides) -> SpecBlockDrafter:
    torch.manual_seed(0)
    return SpecBlockDrafter(SpecBlockConfig.for_target(target.config, **overrides)).eval()


def test_prompts_of_one_token(table):
    for kind in ("llama", "gemma3"):
        for lengths in ((1,), (1, 1, 5)):
            same_text(tiny_target(kind), padded_batch(lengths), lambda: {"forced_bos_token_id": 11})
    table[IN_OUT]["prompts of one token (`forced_bos_token_id`)"] = (EXACT, EXACT, "test_prompts_of_one_token")


def test_inputs_embeds(table):
    for kind in ("llama", "gemma3"):
        target = tiny_target(kind)
        for lengths in (ONE, SEVERAL):
            batch = padded_batch(lengths)
            embeds = target.get_input_embeddings()(batch.pop("input_ids"))
            same_text(target, batch | {"inputs_embeds": embeds}, dict)
    table[IN_OUT]["`inputs_embeds`"] = (EXACT, EXACT, "test_inputs_embeds")


def test_scores_and_logits(table):
    options = BASE | {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    options |= {"eos_token_id": None, "repetition_penalty": 1.2}
    for lengths in (ONE, SEVERAL):
        batch = padded_batch(lengths)
        plain = tiny_target("llama").generate(**batch, **options)
        output = tiny_target("llama").generate(**batch, **options, assistant_model=garbage(len(lengths)))
        assert torch.equal(output.sequences, plain.sequences)
        for name in ("scores", "logits"):
            torch.testing.assert_close(torch.stack(output[name]), torch.stack(plain[name]), rtol=0, atol=5e-4)
    name = "`return_dict_in_generate`, `output_scores`, `output_logits`"
    table[IN_OUT][name] = (EXACT, "exact; zeros after a row's end", "test_scores_and_logits")


@pytest.mark.parametrize(
    ("kind", "attention"), [("llama", "eager"), ("llama", "sdpa"), ("mistral", "eager"), ("gemma3", "eager")]
)
@pytest.mark.parametrize("lengths", [ONE, SEVERAL])
def test_hidden_states_and_attentions(table, kind, attention, lengths):
    target, batch = tiny_target(kind, attention), padded_batch(lengths)
    wanted = {"return_dict_in_generate": True, "output_hidden_states": True, "output_attentions": True}
    variants = [{}, {"prefill_chunk_size": 4}]
    if kind == "llama" and lengths == ONE:
        variants.append({"cache_implementation": "static"})
    for options in variants:
        plain = target.generate(**batch, **BASE | options, **wanted)
        for drafter in (oracles(plain.sequences, batch["attention_mask"]), garbage(len(lengths))):
            output = target.generate(**batch, **BASE | options, **wanted, assistant_model=drafter)
            assert torch.equal(output.sequences, plain.sequences)
            ends = ended_rows(plain.sequences[:, max(lengths) :])
            for name in ("hidden_states", "attentions"):
                assert len(output[name]) == len(plain[name]) == len(ends)
                for ours, theirs, ended in zip(output[name], plain[name], ends, strict=True):
                    # SDPA has no attentions to show, and plain decoding hands back empty tuples.
                    assert (
                        len(ours)
                        == len(theirs)
                        == {"hidden_states": 5, "attentions": 4 * (attention == "eager")}[name]
                    )
                    for mine, layer in zip(ours, theirs, strict=True):
                        expected = torch.where(ended.view(-1, *[1] * (layer.ndim - 1)), 0, layer)
                        torch.testing.assert_close(mine, expected, rtol=0, atol=5e-4)
    name = "`output_hidden_states`, `output_attentions`"
    table[IN_OUT][name] = (EXACT, "exact; zeros after a row's end", "test_hidden_states_and_attentions")


def ended_rows(emitted: torch.LongTensor) -> list[torch.BoolTensor]:
    """For every step, the rows that had ended before it."""
    ended = (emitted == BASE["eos_token_id"]).cumsum(1) - (emitted == BASE["eos_token_id"]).long() > 0
    return list(ended.T)


@pytest.mark.parametrize("lengths", [ONE, SEVERAL])
def test_guidance_away_from_prompts(table, lengths):
    negative = padded_batch([2 + length % 3 for length in lengths], seed=9)
    options = {"guidance_scale": 1.8, "negative_prompt_ids": negative["input_ids"]}
    options["negative_prompt_attention_mask"] = negative["attention_mask"]
    target, batch = tiny_target("llama"), padded_batch(lengths)
    plain = same_text(target, batch, lambda: options)
    assert not torch.equal(plain, same_text(target, batch, lambda: {"guidance_scale": 1.8}))
    assert not torch.equal(plain, target.generate(**batch, **BASE))
    name = "`negative_prompt_ids`, `negative_prompt_attention_mask`"
    table[IN_OUT][name] = (EXACT, EXACT, "test_guidance_away_from_prompts")


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_chat_of_three_turns_keeps_its_cache(table, kind):
    target = tiny_target(kind)

    def chat(make_drafter, lengths):
        batch, cache = padded_batch(lengths), DynamicCache(config=target.config)
        rows = len(lengths)
        for turn in range(3):
            options = BASE | {"eos_token_id": None, CACHE: cache, "max_new_tokens": 11}
            ids = target.generate(**batch, **options, assistant_model=make_drafter(rows))
            more = torch.cat([prompt_of(3, seed=30 + 5 * turn + row) for row in range(rows)])
            ids = torch.cat((ids, more), dim=1)
            new = ids.shape[1] - batch["attention_mask"].shape[1]
            batch = {
                "input_ids": ids,
                "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, new), value=1),
            }
        return ids

    for lengths in (ONE, SEVERAL):
        assert torch.equal(chat(garbage, lengths), chat(lambda rows: None, lengths))
    table[IN_OUT]["a cache (`cache`, before 5.24 `past_key_values`) passed in and handed back"] = (
        EXACT,
        EXACT,
        "test_a_chat_of_three_turns_keeps_its_cache",
    )


def test_a_static_cache_of_ones_own(table):
    target = tiny_target("llama")

    def run(drafter=None):
        cache = StaticCache(config=target.config, max_cache_len=40)
        first = target.generate(**padded_batch(ONE), **BASE | {CACHE: cache}, assistant_model=drafter)
        ids = torch.cat((first, prompt_of(4, seed=8)), dim=1)
        options = BASE | {CACHE: cache, "max_new_tokens": 5}
        return target.generate(ids, attention_mask=torch.ones_like(ids), **options, assistant_model=drafter)

    assert torch.equal(run(garbage(1)), run())
    sentence = refusal(target, padded_batch(SEVERAL), lambda: {CACHE: StaticCache(target.config, max_cache_len=40)})
    table[IN_OUT]["`cache=StaticCache(...)`"] = (EXACT, sentence, "test_a_static_cache_of_ones_own")


def test_token_healing(table):
    tokenizer, target = tiny_tokenizer(), tiny_target("llama")
    for lengths in ((6,), (6, 4, 6)):
        plain = same_text(
            target,
            padded_batch(lengths, seed=2),
            lambda: {"token_healing": True, "tokenizer": tokenizer, "eos_token_id": None},
        )
        assert plain.shape == (len(lengths), 6 + 24)
    table[IN_OUT]["`token_healing`"] = (EXACT, EXACT, "test_token_healing")


def test_text_streamers(table, capsys):
    target, tokenizer, batch = tiny_target("llama"), tiny_tokenizer(), padded_batch(ONE)
    text = tokenizer.decode(target.generate(**batch, **BASE)[0, 7:])
    target.generate(**batch, **BASE, assistant_model=garbage(1), streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == text
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(lambda: target.generate(**batch, **BASE, assistant_model=garbage(1), streamer=streamer))
        assert "".join(streamer) == text
        call.result()
    table[IN_OUT]["`streamer`: text, in a thread, asynchronous"] = (
        EXACT,
        "refused, as transformers' streamers do",
        "test_text_streamers",
    )


def test_an_asynchronous_streamer():
    target, tokenizer, batch = tiny_target("llama"), tiny_tokenizer(), padded_batch(ONE)

    async def listen() -> str:
        streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True)
        call = asyncio.to_thread(
            lambda: target.generate(**batch, **BASE, assistant_model=garbage(1), streamer=streamer)
        )
        task = asyncio.create_task(call)
        heard = "".join([piece async for piece in streamer])
        await task
        return heard

    assert asyncio.run(listen()) == tokenizer.decode(target.generate(**batch, **BASE)[0, 7:])


def test_a_pipeline(table):
    target, tokenizer = tiny_target("llama"), tiny_tokenizer()
    drafter = block_drafter(target)
    texts = [tokenizer.decode(prompt_of(7)[0]), tokenizer.decode(prompt_of(4, seed=1)[0])]
    options = {"max_new_tokens": 20, "do_sample": False}
    plain = pipeline("text-generation", model=target, tokenizer=tokenizer)
    drafted = pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=drafter)
    assert drafted(texts, **options) == plain(texts, **options)
    assert drafted(texts, **options, batch_size=2) == plain(texts, **options, batch_size=2)
    assert drafter.last_statistics.rounds > 0
    table[IN_OUT]['`pipeline("text-generation", assistant_model=drafter)`'] = (EXACT, EXACT, "test_a_pipeline")


def test_two_threads_with_batches(table):
    target = tiny_target("gemma3")
    drafter = block_drafter(target)
    batches = [padded_batch(lengths, seed) for seed, lengths in enumerate([(5, 9), (3,), (7, 2, 8), (6, 6)])]
    expected = [target.generate(**batch, **BASE) for batch in batches]
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda batch: target.generate(**batch, **BASE, assistant_model=drafter), batches * 2))
    for output, plain in zip(outputs, expected * 2, strict=True):
        assert torch.equal(output, plain)
    table[IN_OUT]["two threads with one target and one drafter"] = (EXACT, EXACT, "test_two_threads_with_batches")
