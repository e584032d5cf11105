# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Tiny targets of every family, with every kind of RoPE, adapter, offloading and training flag that users bring."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import accelerate
import peft
import torch
import transformers
from conftest import SIZES
from hybrids_for_tests import BOUNDED, HYBRIDS, UNTAKEN
from multimodal_for_tests import MULTIMODAL
from transformers import AutoModelForCausalLM, PreTrainedModel


LIMIT = 16
"""Position at which the kinds of RoPE change that do, and most positions of a target that is tight."""

ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": LIMIT},
    "longrope": {
        "short_factor": [1.0, 1.0, 1.5, 1.5],
        "long_factor": [1.0, 2.0, 3.0, 6.0],
        "original_max_position_embeddings": LIMIT,
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": LIMIT,
    },
}
ROPE_FAMILIES = ("llama", "qwen3", "phi3")  # the last takes longrope only
TIGHT_FAMILIES = ("gpt2", "opt", "gptj")
MOE_FAMILIES = ("mixtral", "qwen3_moe", "olmoe")
EAGER_FAMILIES = ("gemma2", "gptj", "gpt_oss", "bloom", "mamba", "jamba")

_NAMELESS = {name: SIZES[name] for name in ("initializer_range", "bos_token_id", "eos_token_id")}
_GPT = _NAMELESS | {"n_embd": 32, "n_head": 4}
_MIXED = {"head_dim": 8, "sliding_window": 6}
_PADDED = {"pad_token_id": 0}


def _gemma(layers: int) -> dict[str, Any]:
    return _MIXED | {"tie_word_embeddings": False, "layer_types": _layer_types(layers)}


def _layer_types(layers: int) -> list[str]:
    return [("sliding_attention", "full_attention")[layer % 2] for layer in range(layers)]


# What each family's configuration takes besides the sizes that all have.
FAMILIES: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "llama": ("LlamaConfig", lambda layers: {}),
    "qwen2": ("Qwen2Config", lambda layers: {}),
    "qwen3": ("Qwen3Config", lambda layers: {"head_dim": 8}),
    "mistral": ("MistralConfig", lambda layers: _MIXED),
    "gemma2": ("Gemma2Config", lambda layers: _gemma(layers) | {"query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", lambda layers: _gemma(layers) | {"query_pre_attn_scalar": 8}),
    "phi3": ("Phi3Config", lambda layers: {}),
    "mixtral": ("MixtralConfig", lambda layers: {"num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        lambda layers: {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "olmoe": ("OlmoeConfig", lambda layers: {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt2": ("GPT2Config", lambda layers: _GPT | {"n_layer": layers, "activation_function": "relu"}),
    "gptj": ("GPTJConfig", lambda layers: _GPT | {"n_layer": layers, "rotary_dim": 4}),
    "opt": ("OPTConfig", lambda layers: {"ffn_dim": 48, "word_embed_proj_dim": 32} | _NAMELESS),
    "gpt_neox": ("GPTNeoXConfig", lambda layers: {}),
    "falcon": ("FalconConfig", lambda layers: {"alibi": False}),
    "phi": ("PhiConfig", lambda layers: {}),
    "starcoder2": ("Starcoder2Config", lambda layers: {"tie_word_embeddings": False}),
    "stablelm": ("StableLmConfig", lambda layers: {}),
    "olmo": ("OlmoConfig", lambda layers: {}),
    "olmo2": ("Olmo2Config", lambda layers: {}),
    "cohere": ("CohereConfig", lambda layers: {}),
    "cohere2": ("Cohere2Config", lambda layers: {"sliding_window": 6}),
    "nemotron": ("NemotronConfig", lambda layers: {}),
    "smollm3": ("SmolLM3Config", lambda layers: _PADDED),
    "granite": ("GraniteConfig", lambda layers: {}),
    "glm4": ("Glm4Config", lambda layers: {"head_dim": 8}),
    "exaone4": ("Exaone4Config", lambda layers: {"sliding_window": 6, "layer_types": _layer_types(layers)}),
    "helium": ("HeliumConfig", lambda layers: _PADDED | {"head_dim": 8}),
    "ernie": ("Ernie4_5Config", lambda layers: _PADDED),
    "gpt_oss": (
        "GptOssConfig",
        lambda layers: (
            _MIXED | {"num_local_experts": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
        ),
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        lambda layers: {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
    ),
    "gemma3n": (
        "Gemma3nTextConfig",
        lambda layers: (
            _gemma(layers)
            | {
                "vocab_size_per_layer_input": SIZES["vocab_size"],
                "hidden_size_per_layer_input": 8,
                "laurel_rank": 4,
                "num_kv_shared_layers": 0,
                "altup_num_inputs": 2,
                "activation_sparsity_pattern": [0.0] * layers,
            }
        ),
    ),
    "gemma4": ("Gemma4TextConfig", lambda layers: _gemma(layers)),
    "gemma4, shared keys": (
        "Gemma4TextConfig",
        lambda layers: (
            _gemma(layers)
            | {
                "num_kv_shared_layers": layers // 4 * 2,  # of every kind one has its own
                "vocab_size_per_layer_input": SIZES["vocab_size"],
                "hidden_size_per_layer_input": 8,
            }
        ),
    ),
    # Refused, each for a reason of its own.
    "bloom": ("BloomConfig", lambda layers: _NAMELESS | {"n_layer": layers, "n_head": 4}),
    "mamba": ("MambaConfig", lambda layers: {"state_size": 4}),
    "llama4": (
        "Llama4TextConfig",
        lambda layers: (
            _PADDED
            | {
                "head_dim": 8,
                "intermediate_size_mlp": 48,
                "num_local_experts": 2,
                "num_experts_per_tok": 1,
                "attention_chunk_size": 8,
            }
        ),
    ),
}

FAMILIES |= {
    family: (name, lambda layers, fields=fields: fields) for family, (name, fields) in (HYBRIDS | BOUNDED).items()
}
FAMILIES["jamba"] = (UNTAKEN["jamba"][0], lambda layers: UNTAKEN["jamba"][1])

_LORA = ["q_proj", "v_proj", "down_proj", "embed_tokens"]
PEFT: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(
        r=4, target_modules=_LORA, init_lora_weights=False, lora_dropout=0.5, task_type="CAUSAL_LM"
    ),
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, task_type="CAUSAL_LM"),
    "adaption prompt": lambda: peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM"),
}
OFFLOADED: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "cpu offload": lambda target: accelerate.cpu_offload(target, execution_device="cpu"),
    "disk offload": lambda target: accelerate.disk_offload(target, tempfile.mkdtemp(), execution_device="cpu"),
    "embedding on meta": lambda target: accelerate.dispatch_model(
        target,
        {"model.embed_tokens": "disk", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
        | {"lm_head": "disk"},
        main_device="cpu",
        offload_dir=tempfile.mkdtemp(),
        force_hooks=True,
    ),
}
WRAPS = (*PEFT, *OFFLOADED, "wrapped forward")
FLAGS = ("output_router_logits", "output_hidden_states", "output_attentions", "use_cache", "return_dict")


@dataclass(frozen=True)
class TargetKind:
    """
    A tiny target.

    Args:
        family (`str`): One of `FAMILIES` or `MULTIMODAL`.
        layers (`int`): Decoder layers.
        attention (`str`): The attention backend.
        vocab_size (`int`): Of a text target.
        rope (`str`): One of `ROPES`, for `ROPE_FAMILIES`.
        tight (`bool`): There are only `LIMIT` positions, for `TIGHT_FAMILIES`.
        wrap (`str`): Nothing, or one of `WRAPS`.
        flag (`str`): Nothing, or one of `FLAGS`, turned to what training scripts leave in a configuration.
        mode (`str`): "eval", "train" (which changes nothing without dropout) or "dropout".
        damage (`str`): Nothing, or "nan" for a token whose logit is no number.
    """

    family: str = "llama"
    layers: int = 2
    attention: str = "sdpa"
    vocab_size: int = 32
    rope: str = "default"
    tight: bool = False
    wrap: str = ""
    flag: str = ""
    mode: str = "eval"
    damage: str = ""

    @property
    def is_multimodal(self) -> bool:
        return self.family in MULTIMODAL

    @property
    def is_recurrent(self) -> bool:
        return self.family in HYBRIDS | BOUNDED or self.family == "qwen3.5"

    @property
    def depends_on_the_cache(self) -> bool:
        """Its states are others after a text that was read at once than after the same text token by token."""
        return self.family in BOUNDED

    @property
    def depends_on_the_past(self) -> bool:
        """Its RoPE remembers the longest text that it has seen, whoever wrote it."""
        return self.rope in ("dynamic", "longrope")


@cache
def make_target(kind: TargetKind) -> PreTrainedModel:
    """The target of a kind, made once."""
    torch.manual_seed(0)
    if kind.is_multimodal:
        target = MULTIMODAL[kind.family](kind.attention)
    else:
        target = AutoModelForCausalLM.from_config(text_config(kind), attn_implementation=kind.attention)
    target.eval()
    with torch.no_grad():
        if kind.damage == "nan":
            target.get_output_embeddings().weight[5] = torch.nan
    if kind.wrap in PEFT:
        target = peft.get_peft_model(target, PEFT[kind.wrap]())
        with torch.no_grad():
            for name, weight in target.named_parameters():
                if "prompt" in name or "adaption" in name:
                    torch.nn.init.normal_(weight, std=0.5)
    elif kind.wrap in OFFLOADED:
        target = OFFLOADED[kind.wrap](target)
    elif kind.wrap:
        forward = target.forward
        target.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    if kind.flag:
        setattr(target.config.get_text_config(), kind.flag, kind.flag.startswith("output"))
    return target.train(kind.mode != "eval")


def text_config(kind: TargetKind) -> transformers.PreTrainedConfig:
    name, fields = FAMILIES[kind.family]
    values = SIZES | {"num_hidden_layers": kind.layers} | fields(kind.layers)
    values["vocab_size"] = kind.vocab_size
    if kind.rope != "default":
        values["rope_parameters"] = {"rope_type": kind.rope, "rope_theta": 10000.0} | ROPES[kind.rope]
    if kind.rope == "dynamic":
        values["max_position_embeddings"] = LIMIT
    if kind.family in TIGHT_FAMILIES:
        values["max_position_embeddings"] = LIMIT if kind.tight else 256
    # Families differ in what they call it.
    for dropout in ("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "dropout"):
        values[dropout] = 0.5 if kind.mode == "dropout" else 0.0
    return getattr(transformers, name)(**values)


def forget_the_past(kind: TargetKind, target: PreTrainedModel) -> None:
    """A short text resets what a RoPE remembers."""
    if kind.depends_on_the_past:
        with torch.no_grad():
            target(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False)


def config_of(target: Any) -> transformers.PreTrainedConfig:
    """The configuration of a target inside or outside of an adapter."""
    return target.get_base_model().config if isinstance(target, peft.PeftModel) else target.config
