# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Targets that `generate()` drafts for, with what plain decoding writes, or the sentence that refuses them."""

from __future__ import annotations

import peft
import pytest
import torch
from batches_for_tests import RowWiseDrafter, padded_batch
from conftest import CONFIGS, SIZES, VOCAB, tiny_target
from drafters_for_tests import GarbageDrafter, OracleDrafter
from options_for_tests import (
    BASE,
    EXACT,
    ONE,
    SEVERAL,
    plainly,
    refusal,
    same_text,
)
from page_for_tests import TARGETS, note, ran, table_of  # noqa: F401
from special_targets_for_tests import SPECIAL
from test_generate_matrix import block_drafter
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    GptOssConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3MoeConfig,
    masking_utils,
    set_seed,
)
from transformers.utils import logging

from specblock_hf.cli.default_target import load_default_target


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


table = table_of(lambda sections: sections[TARGETS].keys() >= {*MODELS, *SPECIAL}, TARGETS)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_target(table, name, attention):
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(MODELS[name](), attn_implementation=attention).eval()
    for lengths in (ONE, SEVERAL):
        same_text(target, padded_batch(lengths), dict)
    table[TARGETS][name] = (EXACT, EXACT, "test_target")


def test_gpt_oss_whose_attention_has_sinks(table):
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    sizes = SIZES | {"head_dim": 8, "sliding_window": 6, "num_local_experts": 4, "rope_parameters": rope}
    target = AutoModelForCausalLM.from_config(GptOssConfig(**sizes), attn_implementation="eager").eval()
    for lengths in (ONE, SEVERAL):
        same_text(target, padded_batch(lengths), dict)
    table[TARGETS]["gpt-oss (eager attention)"] = (EXACT, EXACT, "test_gpt_oss_whose_attention_has_sinks")


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
    table[TARGETS][name] = (said, said, "test_targets_that_do_not_know_a_nodes_position_are_refused")


@pytest.mark.parametrize("name", SPECIAL)
def test_targets_with_a_speciality(table, name):
    table[TARGETS][name] = (*SPECIAL[name](), "test_targets_with_a_speciality")


def test_flex_attention(table):
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(CONFIGS["gemma3"](), attn_implementation="flex_attention")
    # Compiling its kernel takes minutes on a CPU.
    with torch.compiler.set_stance("force_eager"):
        for lengths in (ONE, SEVERAL):
            same_text(target.eval(), padded_batch(lengths), lambda: {"max_new_tokens": 10})
    table[TARGETS]['`set_attn_implementation("flex_attention")`'] = (EXACT, EXACT, "test_flex_attention")


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
    table[TARGETS][name] = ("exact; verifies chains", "exact; verifies chains", test)


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
    table[TARGETS]["LoRA: `PeftModel.generate()`, `add_adapter()`"] = (EXACT, EXACT, "test_lora")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_set_attn_implementation(table, attention):
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(CONFIGS["gemma3"]()).eval()
    target.set_attn_implementation(attention)
    for lengths in (ONE, SEVERAL):
        same_text(target, padded_batch(lengths), dict)
    name = f'`set_attn_implementation("{attention}")`'
    table[TARGETS][name] = (EXACT, EXACT, "test_set_attn_implementation")


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
    table[TARGETS][name] = ("as stated", "as stated", "test_half_precision")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_drafter_in_another_dtype(table, dtype):
    target = tiny_target("llama")
    drafter = block_drafter(target).to(dtype)
    for lengths in (ONE, SEVERAL, (1,)):
        batch = padded_batch(lengths)
        plain = target.generate(**batch, **BASE)
        assert torch.equal(target.generate(**batch, **BASE, assistant_model=drafter), plain)
    table[TARGETS]["a drafter in another dtype than the target"] = (EXACT, EXACT, "test_a_drafter_in_another_dtype")


def test_texts_longer_than_any_position_that_the_drafter_knows(table):
    target = tiny_target("gemma3")
    drafter = block_drafter(target, max_position_embeddings=16)
    batch = padded_batch((30, 12))
    options = BASE | {"max_new_tokens": 60, "eos_token_id": None}
    plain = target.generate(**batch, **options)
    assert torch.equal(target.generate(**batch, **options, assistant_model=drafter), plain)
    test = "test_texts_longer_than_any_position_that_the_drafter_knows"
    table[TARGETS]["texts beyond the drafter's `max_position_embeddings`"] = (EXACT, EXACT, test)


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
    table[TARGETS][f"SmolLM2-135M-Instruct, {name}"] = (EXACT, EXACT if rows > 1 else "not tried", "test_smollm2")
