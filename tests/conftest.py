# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Tiny random targets. Their weights are drawn wide, so that greedy text wanders instead of repeating one token."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.utils import generic

from specblock_hf.drafting.drafter import TreeDrafter


pytest_plugins = ["hub_for_tests"]

VOCAB = 32
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8),
    "mistral": lambda: MistralConfig(**SIZES, head_dim=8, sliding_window=6),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=6,
        tie_word_embeddings=False,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    ),
}
KINDS = tuple(CONFIGS)
ATTENTIONS = ("sdpa", "eager")


@cache
def tiny_target(kind: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """
    A random target.

    Args:
        kind (`str`): "llama", "qwen3", "mistral" (all layers slide) or "gemma3" (every other layer slides).
        attention (`str`, *optional*, defaults to `"sdpa"`): The attention backend.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Of the weights.
    """
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype).eval()


def prompt_of(length: int, seed: int = 0) -> torch.LongTensor:
    """A random prompt `[1, length]`."""
    return torch.randint(VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def pytest_addoption(parser):
    parser.addoption("--write-docs", action="store_true", help="write docs/generate.md instead of comparing with it")


@pytest.fixture(params=[(kind, attention) for kind in KINDS for attention in ATTENTIONS], ids="-".join)
def target(request) -> PreTrainedModel:
    """Every kind of target with every attention backend."""
    return tiny_target(*request.param)


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_target("llama")


@pytest.fixture(autouse=True, scope="session")
def few_threads():
    """Tiny models lose more than they gain from threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def fixed_plan(request, monkeypatch):
    """
    Drafters draft by the default plan of their device, as if `drafting_plan` had been set to `None`: what exact trees
    and accepted lengths are asserted of. A test marked `auto_plan` has the default, a plan that finds itself.
    """
    if request.node.get_closest_marker("auto_plan") is None:
        monkeypatch.setattr(TreeDrafter, "drafting_plan", None)


@pytest.fixture(autouse=True)
def nothing_deprecated(monkeypatch):
    """transformers logs, once in a process and not as a warning, that an output was read by an old name."""

    def refuse(message: str, *args: object) -> None:
        assert "deprecated" not in message, message

    monkeypatch.setattr(generic.logger, "warning_once", refuse, raising=False)
