# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""A tiny target with a tokenizer, and drafters for it, in folders: what commands are given."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from conftest import SIZES, VOCAB, tiny_target
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specblock_hf import Eagle3Config, Eagle3Drafter, SpecBlockConfig, SpecBlockDrafter


ALPHABET = f"_?{string.ascii_lowercase}0123"
assert len(ALPHABET) == VOCAB


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each of 31 characters, and one for all others."""
    tokenizer = Tokenizer(models.WordLevel({token: id for id, token in enumerate(ALPHABET)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


def tiny_drafter(kind: str = "specblock") -> SpecBlockDrafter | Eagle3Drafter:
    """An untrained drafter for the tiny Llama."""
    torch.manual_seed(1)
    if kind == "specblock":
        return SpecBlockDrafter(SpecBlockConfig.for_target(tiny_target("llama").config, draft_vocab_size=24)).eval()
    sizes = {name: SIZES[name] for name in SIZES if name != "num_hidden_layers"}
    depth = SIZES["num_hidden_layers"]
    fields = {"target_num_layers": depth, "feature_layers": [2, 2, 1], "beam_width": 4, "num_blocks": 4}
    return Eagle3Drafter(Eagle3Config(**sizes, **fields, draft_vocab_size=24, head_dim=8)).eval()


def save_models(folder: Path) -> dict[str, str]:
    """Save them all; the folder of each by its name: target, specblock, eagle3."""
    tiny_tokenizer().save_pretrained(folder / "target")
    tiny_target("llama").save_pretrained(folder / "target")
    for kind in ("specblock", "eagle3"):
        tiny_drafter(kind).save_pretrained(folder / kind)
    return {name: str(folder / name) for name in ("target", "specblock", "eagle3")}
