# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Tiny random targets of families that do not use Llama's names for their sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from conftest import VOCAB
from transformers import (
    AutoModelForCausalLM,
    CodeGenConfig,
    Cohere2Config,
    CohereConfig,
    FalconConfig,
    Gemma3nTextConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoXConfig,
    NemotronConfig,
    Olmo2Config,
    OlmoConfig,
    OPTConfig,
    PersimmonConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    StableLmConfig,
    Starcoder2Config,
)


NAMELESS = {"vocab_size": VOCAB, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None}
SIZES = NAMELESS | {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
WIDE = SIZES | {"intermediate_size": 48}
GROUPED = WIDE | {"num_key_value_heads": 2}
OLD = NAMELESS | {"n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 64}
HALVES = ["sliding_attention", "full_attention"] * 2


def gemma3n(**fields) -> Gemma3nTextConfig:
    small = {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "laurel_rank": 8, "head_dim": 8}
    small |= {"sliding_window": 6, "layer_types": HALVES, "activation_sparsity_pattern": [0.0] * 4}
    return Gemma3nTextConfig(**GROUPED | small | fields)


# The configuration, and what of it a drafter takes over: MLP, heads of keys, size of a head, epsilon, RoPE base.
FAMILIES: dict[str, tuple[Callable[[], PreTrainedConfig], tuple[int, int, int, float, float]]] = {
    "CodeGen": (lambda: CodeGenConfig(**OLD, rotary_dim=4, layer_norm_epsilon=1e-4), (128, 4, 8, 1e-4, 1e4)),
    "Cohere": (lambda: CohereConfig(**GROUPED, layer_norm_eps=1e-4), (48, 2, 8, 1e-4, 5e5)),
    "Cohere 2": (lambda: Cohere2Config(**GROUPED, sliding_window=6), (48, 2, 8, 1e-5, 1e4)),
    "Falcon, one head of keys": (lambda: FalconConfig(**SIZES, ffn_hidden_size=56), (56, 1, 8, 1e-5, 1e4)),
    "Falcon, grouped": (
        lambda: FalconConfig(**SIZES, new_decoder_architecture=True, num_kv_heads=2),
        (128, 2, 8, 1e-5, 1e4),
    ),
    "Gemma 3n": (lambda: gemma3n(num_kv_shared_layers=0), (48, 2, 8, 1e-6, 1e6)),
    "Gemma 3n, shared keys": (lambda: gemma3n(num_kv_shared_layers=2), (48, 2, 8, 1e-6, 1e6)),
    "GPT-2": (lambda: GPT2Config(**OLD, layer_norm_epsilon=1e-4), (128, 4, 8, 1e-4, 1e4)),
    "GPT-2, narrower": (lambda: GPT2Config(**OLD, n_inner=48), (48, 4, 8, 1e-5, 1e4)),
    "GPT-BigCode": (lambda: GPTBigCodeConfig(**OLD), (128, 1, 8, 1e-5, 1e4)),
    "GPT-J": (lambda: GPTJConfig(**OLD, rotary_dim=4), (128, 4, 8, 1e-5, 1e4)),
    "GPT-NeoX": (lambda: GPTNeoXConfig(**WIDE, layer_norm_eps=1e-4), (48, 4, 8, 1e-4, 1e4)),
    "Nemotron": (lambda: NemotronConfig(**GROUPED, norm_eps=1e-4), (48, 2, 8, 1e-4, 1e4)),
    "OLMo": (lambda: OlmoConfig(**GROUPED), (48, 2, 8, 1e-6, 1e4)),
    "OLMo 2": (lambda: Olmo2Config(**GROUPED), (48, 2, 8, 1e-5, 1e4)),
    "OPT": (lambda: OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32), (48, 4, 8, 1e-6, 1e4)),
    "Persimmon": (lambda: PersimmonConfig(**WIDE), (48, 4, 8, 1e-5, 1e4)),
    "Phi": (lambda: PhiConfig(**GROUPED, layer_norm_eps=1e-4), (48, 2, 8, 1e-4, 1e4)),
    "StableLM": (lambda: StableLmConfig(**GROUPED), (48, 2, 8, 1e-5, 1e4)),
    "Starcoder2": (lambda: Starcoder2Config(**GROUPED, norm_epsilon=1e-4), (48, 2, 8, 1e-4, 1e4)),
}


@cache
def target_of(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[family][0]()).eval()
