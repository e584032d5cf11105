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
"""
What users pass to `generate()`: every option writes what plain decoding writes, or is refused in one sentence. A run
of the whole file writes `docs/generate.md`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from batches_for_tests import garbage, oracles, padded_batch
from conftest import SIZES, VOCAB, prompt_of, tiny_target
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    AsyncTextIteratorStreamer,
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GptOssConfig,
    LogitsProcessor,
    MixtralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3MoeConfig,
    StaticCache,
    SynthIDTextWatermarkingConfig,
    TextIteratorStreamer,
    TextStreamer,
    WatermarkingConfig,
    pipeline,
    set_seed,
)

from specblock_hf import SpecBlockConfig, SpecBlockDrafter


DOCS = Path(__file__).parent.parent / "docs" / "generate.md"
EXACT, LAW = "exact", "exact in law"
IN_OUT = "Other ways in and out"
ONE, SEVERAL = (7,), (7, 3, 12)
# This end comes late for one prompt and at different times for several.
BASE = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": 12}


class Grammar(LogitsProcessor):
    """A finite-state machine that counts its own steps: brackets of tokens 8 and 9 around runs of other tokens."""

    def __init__(self):
        self.state = 0

    def __call__(self, input_ids, scores):
        allowed = {0: [8], 1: list(range(10, 20)), 2: [*range(20, VOCAB), 9], 3: [8, 4]}[self.state]
        self.state = (self.state + 1) % 4
        return scores.index_fill(1, torch.tensor([t for t in range(VOCAB) if t not in allowed]), -torch.inf)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Every id is a word of two letters."""
    letters = [first + second for first in "aceg" for second in "bdfhjlnp"]
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(letters)}, unk_token="ab"))
    backend.pre_tokenizer = Split(Regex(".."), "isolated")
    backend.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side="left", pad_token="ab", bos_token="ad", eos_token="al"
    )


@dataclass
class Row:
    """
    One option of `generate()`.

    Args:
        option (`str`): As it stands in the table.
        make (`Callable[[], dict]`): The keyword arguments of one call.
        one, several (`str`, *optional*, defaults to `EXACT`):
            For one prompt and for a padded batch: `EXACT`, `LAW` or how the refusal begins.
        kinds (`tuple[str, ...]`, *optional*): Targets to try it on.
        changes (`bool`, *optional*, defaults to `True`):
            Plain decoding of one of the targets writes something else with the option.
    """

    option: str
    make: Callable[[], dict[str, Any]]
    one: str = EXACT
    several: str = EXACT
    kinds: tuple[str, ...] = ("llama", "gemma3")
    changes: bool = True


WHOLE_BATCH = "{} may look at a whole batch at once"
UNPLUGGED = "set num_beams=1"
SAMPLE = {"do_sample": True, "top_k": 0, "eos_token_id": None}

ROWS = [
    Row("`max_new_tokens=1`", lambda: {"max_new_tokens": 1}),
    Row("`max_length`", lambda: {"max_length": 20, "max_new_tokens": None}),
    Row("several `eos_token_id`", lambda: {"eos_token_id": [17, 29, 20]}),
    Row("`min_length`", lambda: {"min_length": 28}),
    Row("`min_new_tokens`", lambda: {"min_new_tokens": 20}),
    Row("`stop_strings`", lambda: {"stop_strings": ["cpgf"], "tokenizer": tiny_tokenizer()}),
    Row("`max_time`", lambda: {"max_time": 0.0}),
    Row(
        "`stopping_criteria` of one's own",
        lambda: {"stopping_criteria": [lambda ids, scores: (ids[:, -1] % 7 == 0) | (ids.shape[1] > 20)]},
        several=WHOLE_BATCH.format("function"),
    ),
    Row("`repetition_penalty`", lambda: {"repetition_penalty": 1.4}),
    Row("`encoder_repetition_penalty`", lambda: {"encoder_repetition_penalty": 1.6}),
    Row("`no_repeat_ngram_size`", lambda: {"no_repeat_ngram_size": 2}),
    Row("`encoder_no_repeat_ngram_size`", lambda: {"encoder_no_repeat_ngram_size": 1}),
    Row("`bad_words_ids`", lambda: {"bad_words_ids": [[21, 23], [4], [26]]}),
    Row("`sequence_bias`", lambda: {"sequence_bias": {(3,): 6.0, (17, 4): 6.0}}),
    Row("`suppress_tokens` and at the beginning", lambda: {"suppress_tokens": [4], "begin_suppress_tokens": [26]}),
    Row("`forced_eos_token_id`", lambda: {"forced_eos_token_id": 9, "max_new_tokens": 3}),
    Row("`exponential_decay_length_penalty`", lambda: {"exponential_decay_length_penalty": (2, 1.5)}),
    Row(
        "`remove_invalid_values`, `renormalize_logits`",
        lambda: {"remove_invalid_values": True, "renormalize_logits": True},
        changes=False,
    ),
    Row(
        "`prefix_allowed_tokens_fn`",
        lambda: {"prefix_allowed_tokens_fn": lambda row, ids: [(int(ids[-1]) * 5 + row) % VOCAB, 2 + row]},
    ),
    Row("`watermarking_config`", lambda: {"watermarking_config": WatermarkingConfig(bias=4.0, context_width=1)}),
    Row(
        "`watermarking_config` (SynthID)",
        lambda: {
            "watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=3, keys=[3, 14, 15], sampling_table_size=64)
        },
    ),
    Row(
        "`guidance_scale`, `negative_prompt_ids`",
        lambda: {"guidance_scale": 1.8, "negative_prompt_ids": prompt_of(4, seed=9)},
        several=WHOLE_BATCH.format("UnbatchedClassifierFreeGuidanceLogitsProcessor"),
    ),
    Row(
        "`logits_processor` of one's own, such as a grammar",
        lambda: {"logits_processor": [Grammar()]},
        several=WHOLE_BATCH.format("Grammar"),
    ),
    Row("`do_sample`", lambda: SAMPLE, several=LAW),
    Row("`temperature`", lambda: SAMPLE | {"temperature": 0.6}, several=LAW),
    Row("`top_k`", lambda: SAMPLE | {"top_k": 5}, several=LAW),
    Row("`top_p`", lambda: SAMPLE | {"top_p": 0.7}, several=LAW),
    Row("`min_p`", lambda: SAMPLE | {"min_p": 0.1}, several=LAW),
    Row("`top_h`", lambda: SAMPLE | {"top_h": 0.6}, several=LAW),
    Row("`typical_p`", lambda: SAMPLE | {"typical_p": 0.6}, several=LAW),
    Row("`epsilon_cutoff`, `eta_cutoff`", lambda: SAMPLE | {"epsilon_cutoff": 0.03, "eta_cutoff": 0.03}, several=LAW),
    Row("`num_return_sequences`", lambda: {"do_sample": True, "top_k": 1, "num_return_sequences": 2}, changes=False),
    Row("`prefill_chunk_size`", lambda: {"prefill_chunk_size": 3}, changes=False),
    Row('`cache_implementation="dynamic"`', lambda: {"cache_implementation": "dynamic"}, changes=False),
    Row(
        '`cache_implementation="static"`',
        lambda: {"cache_implementation": "static"},
        kinds=("llama", "qwen3"),
        changes=False,
    ),
    Row(
        '`cache_implementation="static"`, a target with layers that slide',
        lambda: {"cache_implementation": "static"},
        one="this StaticCache has layers that slide",
        several="this StaticCache has layers that slide",
        kinds=("gemma3", "mistral"),
    ),
    *(
        Row(
            f'`cache_implementation="{name}"`',
            lambda name=name: {"cache_implementation": name},
            one=f"cache_implementation='{name}' keeps rows",
            several=f"cache_implementation='{name}' keeps rows",
        )
        for name in ("offloaded", "offloaded_static", "quantized")
    ),
    Row("`use_cache=False`", lambda: {"use_cache": False}, *["draft trees are verified against"] * 2),
    Row("`num_beams`", lambda: {"num_beams": 2}, *["a tree drafter speeds up greedy decoding and sampling"] * 2),
    Row(
        "`output_hidden_states`, `output_attentions`",
        lambda: {"return_dict_in_generate": True, "output_hidden_states": True},
        *["output_hidden_states and output_attentions would show draft trees"] * 2,
    ),
    Row(
        "`prompt_lookup_num_tokens`",
        lambda: {"prompt_lookup_num_tokens": 3},
        *["prompt_lookup_num_tokens"] * 2,
    ),
    Row("`synced_gpus`", lambda: {"synced_gpus": True}, *["synced_gpus needs the same number of forwards"] * 2),
]


@pytest.fixture(scope="module")
def table(request):
    """Sections of the table, filled by the tests; written if the whole file ran and passed."""
    sections: dict[str, dict[str, tuple[str, str, str]]] = {"Options": {}, IN_OUT: {}, "Targets": {}}
    failed_before = request.session.testsfailed
    yield sections
    chosen = {item.originalname for item in request.session.items if item.path == request.path}
    whole = chosen >= {name for name in vars(request.module) if name.startswith("test_")}
    if request.session.testsfailed > failed_before or len(sections["Options"]) < len(ROWS) or not whole:
        return
    text = render(sections)
    if not DOCS.exists() or DOCS.read_text() != text:
        DOCS.parent.mkdir(exist_ok=True)
        DOCS.write_text(text)


def render(sections: dict[str, dict[str, tuple[str, str, str]]]) -> str:
    lines = [
        "# What `generate(assistant_model=drafter)` accepts",
        "",
        "Written by `pytest tests/test_generate_matrix.py`, which compares every row with plain `generate()` on tiny",
        "random targets in fp32, with a drafter that knows the answer and with one that knows nothing. *exact*: the",
        "very tokens of plain decoding (sampling: under the same seed). *exact in law*: each token follows the",
        "target's law, but a seed gives other tokens than it gives plain sampling. Anything else is the sentence of",
        "the refusal. (Laws are enumerated in `tests/test_sampling.py` and `tests/test_batches.py`; combinations of",
        "options are drawn in `tests/test_generate_fuzz.py`.)",
    ]
    for title, rows in sections.items():
        lines += ["", f"## {title}", "", "| | one prompt | padded batch | test |", "|---|---|---|---|"]
        for name, (one, several, test) in rows.items():
            same = several == one and one not in (EXACT, LAW)
            lines.append(f"| {name} | {one} | {'the same' if same else several} | `{test}` |")
    return "\n".join(lines) + "\n"


def same_text(target, batch: dict, make: Callable[[], dict]) -> torch.Tensor:
    """Plain decoding's tokens, after both kinds of drafter have written them as well."""

    def run(drafter=None):
        set_seed(3)
        output = target.generate(**batch | BASE | make(), assistant_model=drafter)
        return output if isinstance(output, torch.Tensor) else output.sequences

    plain = run()
    mask, texts = batch["attention_mask"], plain
    if "inputs_embeds" in batch:
        texts = torch.cat((torch.zeros_like(mask), plain), dim=1)
    mask = mask.repeat_interleave(len(plain) // len(mask), dim=0)
    for drafter in (oracles(texts, mask), garbage(len(plain))):
        assert torch.equal(run(drafter), plain)
    return plain


def refusal(target, batch: dict, make: Callable[[], dict]) -> str:
    rows = len(batch["attention_mask"])
    with pytest.raises(ValueError) as error:
        target.generate(**batch | BASE | make(), assistant_model=garbage(rows))
    sentence = str(error.value)
    assert "; " in sentence and sentence.endswith(".") and "\n" not in sentence
    return sentence


def outcome(target, batch: dict, make: Callable[[], dict], expected: str) -> str:
    """What the table says."""
    if expected == EXACT:
        same_text(target, batch, make)
    elif expected == LAW:
        # Which law is a test of its own; here, that the call works.
        output = target.generate(**batch | BASE | make(), assistant_model=garbage(len(batch["attention_mask"])))
        assert output.shape == (len(batch["attention_mask"]), batch["attention_mask"].shape[1] + 24)
    else:
        sentence = refusal(target, batch, make)
        assert sentence.startswith(expected)
        return sentence
    return expected


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
    table["Options"][row.option] = (one, several, "test_option")


def plainly(target, options: dict) -> list[int]:
    set_seed(3)
    return target.generate(**padded_batch(ONE) | BASE | options)[0].tolist()


MODELS = {
    "Llama": lambda: tiny_target("llama").config,
    "Qwen2": lambda: Qwen2Config(**SIZES),
    "Qwen3": lambda: tiny_target("qwen3").config,
    "Mistral, all layers slide": lambda: tiny_target("mistral").config,
    "Gemma 3, layers slide in part": lambda: tiny_target("gemma3").config,
    "Phi-3": lambda: Phi3Config(**SIZES),
    "Mixtral (mixture of experts)": lambda: MixtralConfig(**SIZES, num_local_experts=4),
    "Qwen3 MoE": lambda: Qwen3MoeConfig(
        **SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_target(table, name, attention):
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(MODELS[name](), attn_implementation=attention).eval()
    for lengths in (ONE, SEVERAL):
        same_text(target, padded_batch(lengths), dict)
    table["Targets"][name] = (EXACT, EXACT, "test_target")


def test_gpt_oss_whose_attention_has_sinks(table):
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    sizes = SIZES | {"head_dim": 8, "sliding_window": 6, "num_local_experts": 4, "rope_parameters": rope}
    target = AutoModelForCausalLM.from_config(GptOssConfig(**sizes), attn_implementation="eager").eval()
    for lengths in (ONE, SEVERAL):
        same_text(target, padded_batch(lengths), dict)
    table["Targets"]["gpt-oss (eager attention)"] = (EXACT, EXACT, "test_gpt_oss_whose_attention_has_sinks")


def test_gpt2_is_refused(table):
    sizes = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": None, "eos_token_id": None}
    target = AutoModelForCausalLM.from_config(GPT2Config(**sizes)).eval()
    sentence = refusal(target, padded_batch(ONE), dict)
    assert sentence.startswith("GPT2LMHeadModel takes no position_ids or does not list its layers")
    table["Targets"]["GPT-2"] = (sentence, sentence, "test_gpt2_is_refused")


@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2"])
def test_attention_without_a_mask_of_four_dimensions_is_refused(table, attention):
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(tiny_target("llama").config).eval()
    # As set_attn_implementation() would leave it where the kernels are installed.
    target.config._attn_implementation = attention
    sentence = refusal(target, padded_batch(ONE), dict)
    target.set_attn_implementation("sdpa")
    same_text(target, padded_batch(ONE), dict)
    test = "test_attention_without_a_mask_of_four_dimensions_is_refused"
    table["Targets"][f'`set_attn_implementation("{attention}")`'] = (sentence, sentence, test)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_set_attn_implementation(table, attention):
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(tiny_target("gemma3").config).eval()
    target.set_attn_implementation(attention)
    for lengths in (ONE, SEVERAL):
        same_text(target, padded_batch(lengths), dict)
    name = f'`set_attn_implementation("{attention}")`'
    table["Targets"][name] = (EXACT, EXACT, "test_set_attn_implementation")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(table, dtype):
    # Kernels differ with the number of rows, so near-ties may fall either way; what is written must be near-best.
    target = tiny_target("llama", "sdpa", dtype)
    for lengths in (ONE, SEVERAL):
        batch = padded_batch(lengths)
        output = target.generate(**batch, **BASE | {"eos_token_id": None}, assistant_model=garbage(len(lengths)))
        ones = torch.ones(len(lengths), 24, dtype=torch.long)
        mask = torch.cat((batch["attention_mask"], ones), dim=1)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            logits = target(output, attention_mask=mask, position_ids=positions).logits[:, -25:-1].float()
        lost = logits.amax(-1) - logits.gather(2, output[:, -24:, None]).squeeze(2)
        assert lost.max() < 0.15
    name = "bf16 and fp16: the best token, or one that rounding cannot tell from it"
    table["Targets"][name] = ("as stated", "as stated", "test_half_precision")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_drafter_in_another_dtype(table, dtype):
    target = tiny_target("llama")
    drafter = block_drafter(target).to(dtype)
    for lengths in (ONE, SEVERAL, (1,)):
        batch = padded_batch(lengths)
        plain = target.generate(**batch, **BASE)
        assert torch.equal(target.generate(**batch, **BASE, assistant_model=drafter), plain)
    table["Targets"]["a drafter in another dtype than the target"] = (EXACT, EXACT, "test_a_drafter_in_another_dtype")


def test_texts_longer_than_any_position_that_the_drafter_knows(table):
    target = tiny_target("gemma3")
    drafter = block_drafter(target, max_position_embeddings=16)
    batch = padded_batch((30, 12))
    options = BASE | {"max_new_tokens": 60, "eos_token_id": None}
    plain = target.generate(**batch, **options)
    assert torch.equal(target.generate(**batch, **options, assistant_model=drafter), plain)
    test = "test_texts_longer_than_any_position_that_the_drafter_knows"
    table["Targets"]["texts beyond the drafter's `max_position_embeddings`"] = (EXACT, EXACT, test)


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


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_chat_of_three_turns_keeps_its_cache(table, kind):
    target = tiny_target(kind)

    def chat(make_drafter, lengths):
        batch, cache = padded_batch(lengths), DynamicCache(config=target.config)
        rows = len(lengths)
        for turn in range(3):
            options = BASE | {"eos_token_id": None, "past_key_values": cache, "max_new_tokens": 11}
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
    table[IN_OUT]["`past_key_values` passed in and handed back"] = (
        EXACT,
        EXACT,
        "test_a_chat_of_three_turns_keeps_its_cache",
    )


def test_a_static_cache_of_ones_own(table):
    target = tiny_target("llama")

    def run(drafter=None):
        cache = StaticCache(config=target.config, max_cache_len=40)
        first = target.generate(**padded_batch(ONE), **BASE | {"past_key_values": cache}, assistant_model=drafter)
        ids = torch.cat((first, prompt_of(4, seed=8)), dim=1)
        options = BASE | {"past_key_values": cache, "max_new_tokens": 5}
        return target.generate(ids, attention_mask=torch.ones_like(ids), **options, assistant_model=drafter)

    assert torch.equal(run(garbage(1)), run())
    sentence = refusal(
        target, padded_batch(SEVERAL), lambda: {"past_key_values": StaticCache(target.config, max_cache_len=40)}
    )
    table[IN_OUT]["`past_key_values=StaticCache(...)`"] = (EXACT, sentence, "test_a_static_cache_of_ones_own")


def test_token_healing(table):
    tokenizer, target = tiny_tokenizer(), tiny_target("llama")
    plain = same_text(
        target,
        padded_batch((6,), seed=2),
        lambda: {"token_healing": True, "tokenizer": tokenizer, "eos_token_id": None},
    )
    assert plain.shape[1] == 6 + 24
    table[IN_OUT]["`token_healing`"] = (EXACT, "not tested", "test_token_healing")


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
