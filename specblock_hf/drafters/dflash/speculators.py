# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
DFlash, DFlash 2 and DSpark as vLLM's `speculators` lays them out: a Qwen3Config inside, names of its own around it,
and maybe copies of the target's embedding and head, of the latter maybe only the rows of a draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ...checkpoints.files import DrafterFiles
from ...checkpoints.loading import refuse_vocabulary
from ..common.layout import Fields, Tensors, require, with_vocabulary, without_embedding
from .configuration import BlockDiffusionConfig
from .layouts import NUMBERS, DFlashLayout, dspark_heads


class SpeculatorsBlockLayout(DFlashLayout):
    """Read into what z-lab's layout would say; the frozen copies give way to the target's own embedding and head."""

    name = "speculators-dflash"
    hub_words = ("dflash", "dspark", "speculator")
    is_writable = False

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("speculators_model_type") in ("dflash", "dflash2", "dspark")

    def read_config(
        self, config: Fields, name: object, tensors: Tensors, target: PreTrainedConfig | None = None
    ) -> BlockDiffusionConfig:
        words = ("transformer_layer_config", "aux_hidden_state_layer_ids", "mask_token_id", "block_size")
        require(config, words, name)
        layer = dict(config["transformer_layer_config"])
        require(layer, ("hidden_size", "num_attention_heads"), name)
        layer.setdefault("head_dim", layer["hidden_size"] // layer["num_attention_heads"])
        # Where windows have RoPE of their own, it is taken for all layers.
        rope = layer.get("rope_parameters") or {}
        layer["rope_parameters"] = rope.get("sliding_attention", rope) or None
        block = {
            "mask_token_id": config["mask_token_id"],
            # Theirs are indices of hidden states, as ours.
            "target_layer_ids": [index - 1 for index in config["aux_hidden_state_layer_ids"]],
            "block_size": config["block_size"],
        } | {number: config[number] for number in NUMBERS if config.get(number) is not None}
        both_ways = config.get("sliding_window_non_causal")
        if config["speculators_model_type"] == "dflash2" if both_ways is None else both_ways:
            block["causal"] = False
        return super().read_config(layer | {"dflash_config": block, "around": config}, name, tensors, target)

    def own_fields(self, config: Mapping[str, Any], name: object) -> dict[str, Any]:
        around = config["around"]
        is_dspark = around["speculators_model_type"] == "dspark"
        verifier = around.get("speculators_config", {}).get("verifier", {}).get("name_or_path")
        return {
            "predicts_from_anchor": bool(around.get("sample_from_anchor", is_dspark)),
            "restricted_vocabulary": around.get("draft_vocab_size", config["vocab_size"]) != config["vocab_size"],
            "target_name_or_path": verifier,
            "window_from_anchor": "sliding_attention" in (config.get("layer_types") or ()),
        } | (dspark_heads({"markov_rank": 256} | around, name) if is_dspark else {})

    def read_tensors(self, config: BlockDiffusionConfig, files: DrafterFiles, tensors: Tensors) -> Tensors:
        tensors = without_embedding(tensors, "embed_tokens.weight", config, files.name)
        own = {key: value for key, value in tensors.items() if key not in ("lm_head.weight", "d2t", "t2d")}
        if not config.restricted_vocabulary:
            return own
        if "d2t" not in tensors:
            raise ValueError(f"{files.name} has a draft vocabulary and lacks d2t; download it again.")
        tensors = with_vocabulary(tensors, config)
        offsets, marks = tensors["d2t"].long(), tensors["t2d"].bool()
        refuse_vocabulary(files.name, config, offsets, marks)
        key = "markov_head.markov_w2.weight"
        if key in own:  # its rows are the draft vocabulary's, ours the target's
            rows = own[key].new_zeros(config.vocab_size, own[key].shape[1])
            rows[offsets + torch.arange(len(offsets))] = own[key]
            own[key] = rows
        return own | {"t2d": marks}

    def write(self, drafter: Any, folder: str | Path) -> None:
        raise self.unwritable(drafter)
