# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
What users pass to `generate()`: every option writes what plain decoding writes, or is refused in one sentence.
`docs/generate.md` must say what is found here; a run of the whole file with `--write-docs` writes it.
"""

from __future__ import annotations

import asyncio
import inspect
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peft
import pytest
import torch
from batches_for_tests import RowWiseDrafter, garbage, oracles, padded_batch
from conftest import CONFIGS, SIZES, VOCAB, prompt_of, tiny_target
from drafters_for_tests import GarbageDrafter, OracleDrafter
from options_for_tests import (
    BASE,
    EXACT,
    ONE,
    RIVALS,
    ROWS,
    SEVERAL,
    UNTRIED,
    outcome,
    outdated,
    plainly,
    refusal,
    render,
    same_text,
    tiny_tokenizer,
)
from special_targets_for_tests import SPECIAL
from transformers import (
    AsyncTextIteratorStreamer,
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BloomConfig,
    DynamicCache,
    FalconConfig,
    GenerationConfig,
    GenerationMixin,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    GptOssConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3MoeConfig,
    StaticCache,
    TextIteratorStreamer,
    TextStreamer,
    masking_utils,
    pipeline,
    set_seed,
)
from transformers.utils import logging

from specblock_hf import SpecBlockConfig, SpecBlockDrafter
from specblock_hf.cli.default_target import load_default_target
from specblock_hf.compat import CACHE
from specblock_hf.generation.requests import RIVAL_OPTIONS


DOCS = Path(__file__).parents[2] / "docs" / "generate.md"
IN_OUT = "Other ways in and out"


@pytest.fixture(scope="module")
def ran() -> set[str]:
    """The tests of this file that this process has run, which may share them with others."""
    return set()


@pytest.fixture(autouse=True)
def note(request, ran):
    ran.add(request.node.nodeid)


@pytest.fixture(scope="module")
def table(request, ran):
    """Sections of the table, filled by the tests; the page is compared with them, or written if the whole file ran."""
    sections: dict[str, dict[str, tuple[str, str, str]]] = {"Options": {}, IN_OUT: {}, "Targets": {}}
    failed_before = request.session.testsfailed
    yield sections
    if request.session.testsfailed > failed_before:
        return
    chosen = [item for item in request.session.items if item.path == request.path]
    whole = {item.originalname for item in chosen} >= {name for name in vars(request.module) if name[:5] == "test_"}
    whole &= len(sections["Options"]) == len(ROWS) and ran == {item.nodeid for item in chosen}
    if request.config.getoption("--write-docs"):
        assert whole, "--write-docs needs a run of the whole file in one process"
        DOCS.write_text(render(sections))
    elif differences := outdated(DOCS.read_text(), sections, whole):
        command = "pytest tests/generation/test_generate_matrix.py --write-docs"
        pytest.fail("\n".join([f"docs/generate.md is out of date; `{command}` writes it anew:", *differences]))


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
    table["Options"][row.option] = (one, several, "test_option")


NAMELESS = {"vocab_size": VOCAB, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None}
MODELS = {
    "Llama": CONFIGS["llama"],
    "Qwen2": lambda: Qwen2Config(**SIZES),
    "Qwen3": CONFIGS["qwen3"],
    "Mistral, all layers slide": CONFIGS["mistral"],
    "Gemma 3, layers slide in part": CONFIGS["gemma3"],
    "Phi-3": lambda: Phi3Config(**SIZES),
    "Mixtral (mixture of experts)": lambda: MixtralConfig(**SIZES, num_local_experts=4),
    "GPT-2 (learned positions)": lambda: GPT2Config(
        **NAMELESS, n_embd=32, n_layer=4, n_head=4, n_positions=64, activation_function="relu"
    ),
    "OPT (learned positions)": lambda: OPTConfig(**SIZES | NAMELESS, ffn_dim=48, word_embed_proj_dim=32),
    "GPT-NeoX": lambda: GPTNeoXConfig(**SIZES),
    "Falcon without ALiBi": lambda: FalconConfig(**SIZES, alibi=False),
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


@pytest.mark.parametrize(
    ("name", "config", "sentence"),
    [
        (
            "BLOOM (ALiBi)",
            lambda: BloomConfig(**NAMELESS, hidden_size=32, n_layer=1, n_head=2),
            " takes no position_ids",
        ),
        ("Falcon with ALiBi", lambda: FalconConfig(**SIZES, alibi=True), " counts distances in columns of the cache"),
        (
            "GPT-Neo",
            lambda: GPTNeoConfig(**SIZES | {"num_layers": 4}, attention_types=[[["global", "local"], 2]]),
            " counts distances in columns of the cache",
        ),
    ],
)
def test_targets_that_do_not_know_a_nodes_position_are_refused(table, name, config, sentence):
    target = AutoModelForCausalLM.from_config(config()).eval()
    said = refusal(target, padded_batch(ONE), dict)
    assert said.startswith(type(target).__name__ + sentence)
    table["Targets"][name] = (said, said, "test_targets_that_do_not_know_a_nodes_position_are_refused")


@pytest.mark.parametrize("name", SPECIAL)
def test_targets_with_a_speciality(table, name):
    table["Targets"][name] = (*SPECIAL[name](), "test_targets_with_a_speciality")


def test_flex_attention(table):
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(CONFIGS["gemma3"](), attn_implementation="flex_attention")
    # Compiling its kernel takes minutes on a CPU.
    with torch.compiler.set_stance("force_eager"):
        for lengths in (ONE, SEVERAL):
            same_text(target.eval(), padded_batch(lengths), lambda: {"max_new_tokens": 10})
    table["Targets"]['`set_attn_implementation("flex_attention")`'] = (EXACT, EXACT, "test_flex_attention")


def maskless_attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
    """What FlashAttention computes: causal, counted from the last column; a window of columns; padding by column."""
    assert attention_mask is None or attention_mask.ndim == 2
    distance = torch.arange(key.shape[2])[-query.shape[2] :, None] - torch.arange(key.shape[2])
    seen = (distance >= 0) & (distance < (sliding_window or key.shape[2]))
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, None, -key.shape[2] :].bool()
    attended = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=scaling, enable_gqa=True
    )
    return attended.nan_to_num().transpose(1, 2), None


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mistral"])
def test_attention_that_takes_no_mask_verifies_the_likeliest_path(table, kind, caplog, monkeypatch):
    AttentionInterface.register("maskless", maskless_attention)
    AttentionMaskInterface.register("maskless", masking_utils.flash_attention_mask)
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(CONFIGS[kind](), attn_implementation="maskless").eval()
    sample = {"do_sample": True, "top_k": 0, "temperature": 0.7, "eos_token_id": None}
    monkeypatch.setattr(logging.get_logger("specblock_hf"), "propagate", True)
    logging.get_logger("specblock_hf").warning_once.cache_clear()
    for _ in range(2):
        same_text(target, padded_batch(ONE), dict)
    assert caplog.text.count("only the likeliest path of every draft is verified") == 1
    same_text(target, padded_batch(ONE), lambda: sample)
    same_text(target, padded_batch(SEVERAL), dict)
    plain = target.generate(**padded_batch(ONE), **BASE)
    drafter = OracleDrafter(VOCAB, plain[0].tolist(), plan=lambda number: 3, siblings=False)
    target.generate(**padded_batch(ONE), **BASE, assistant_model=drafter)
    # All that the plan allows, but for what the end of the text cut off.
    assert set(drafter.last_statistics.accepted[:-1]) == {3}
    name = "any other attention, such as FlashAttention (here: a function that takes its arguments)"
    test = "test_attention_that_takes_no_mask_verifies_the_likeliest_path"
    table["Targets"][name] = ("exact; verifies chains", "exact; verifies chains", test)


@pytest.mark.parametrize("wrapped", [True, False])
def test_lora(table, wrapped, monkeypatch):
    # transformers 5.24 asks for a peft that is not out yet, and calls the newest one as it did before.
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.21.0")
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(CONFIGS["llama"]()).eval()
    without = plainly(target, {})
    modules = ["q_proj", "v_proj", "down_proj", "embed_tokens"]
    config = peft.LoraConfig(r=4, target_modules=modules, init_lora_weights=False, task_type="CAUSAL_LM")
    if wrapped:
        lora = peft.get_peft_model(target, config).eval()
    else:
        target.add_adapter(config)
        lora = target.eval()
    assert plainly(lora, {}) != without
    for lengths in (ONE, SEVERAL):
        same_text(lora, padded_batch(lengths), dict)
    drafter = block_drafter(tiny_target("llama"))
    plain = lora.generate(**padded_batch(SEVERAL), **BASE)
    assert torch.equal(lora.generate(**padded_batch(SEVERAL), **BASE, assistant_model=drafter), plain)
    table["Targets"]["LoRA: `PeftModel.generate()`, `add_adapter()`"] = (EXACT, EXACT, "test_lora")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_set_attn_implementation(table, attention):
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(CONFIGS["gemma3"]()).eval()
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
        drafter = block_drafter(target)
        output = target.generate(**batch, **BASE | {"eos_token_id": None}, assistant_model=drafter)
        assert drafter.dtype == torch.float32 and drafter.last_statistics.rounds > 0
        ones = torch.ones(len(lengths), 24, dtype=torch.long)
        mask = torch.cat((batch["attention_mask"], ones), dim=1)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            logits = target(output, attention_mask=mask, position_ids=positions).logits[:, -25:-1].float()
        lost = logits.amax(-1) - logits.gather(2, output[:, -24:, None]).squeeze(2)
        assert lost.max() < 0.15
    name = "bf16 and fp16: the best token, or one that rounding cannot tell from it"
    table["Targets"][name] = ("as stated", "as stated", "test_half_precision")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
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


REAL_OPTIONS = {
    "greedy": {},
    "`stop_strings`": {"stop_strings": ["eight"]},
    "`repetition_penalty`, `no_repeat_ngram_size`": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    "`do_sample`, `temperature`, `top_p`": {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 0},
    "`guidance_scale`": {"guidance_scale": 1.5},
    '`cache_implementation="static"`': {"cache_implementation": "static"},
    "`prefill_chunk_size`": {"prefill_chunk_size": 8},
}
PROMPTS = ["The capital of France is", "Count with me: one, two, three, four, five, six,"]


@pytest.fixture(scope="module")
def smollm2():
    return load_default_target(progress=False)


@pytest.mark.real
@pytest.mark.parametrize("name", REAL_OPTIONS)
def test_smollm2(table, smollm2, name):
    target, tokenizer = smollm2
    # Next to a shorter one where that is another case; a batch that samples is a matter of distributions, not of
    # tokens.
    rows = 2 if name in ("greedy", "`repetition_penalty`, `no_repeat_ngram_size`") else 1
    batch = tokenizer(PROMPTS[-rows:], return_tensors="pt", padding=True, padding_side="left")
    options = {"do_sample": False, "max_new_tokens": 12, "tokenizer": tokenizer} | REAL_OPTIONS[name]

    def run(drafter=None):
        set_seed(3)
        return target.generate(**batch, **options, assistant_model=drafter)

    plain, vocab = run(), target.config.vocab_size
    starts = (batch["attention_mask"] == 0).sum(1).tolist()
    knowing = [OracleDrafter(vocab, text[start:].tolist()) for text, start in zip(plain, starts, strict=True)]
    for drafters in (knowing, [GarbageDrafter(vocab) for _ in range(rows)]):
        drafter = RowWiseDrafter(drafters)
        assert torch.equal(run(drafter), plain)
    table["Targets"][f"SmolLM2-135M-Instruct, {name}"] = (EXACT, EXACT if rows > 1 else "not tried", "test_smollm2")
