# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The layout of the SpecBlock authors' release."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ...checkpoints.files import DrafterFiles, read_tensors
from ..common.layout import (
    Fields,
    Layout,
    Tensors,
    check_usual_features,
    read_llama_fields,
    require,
    target_fields,
    usual_features,
    with_vocabulary,
    without_embedding,
    write_folder,
    write_llama_fields,
)
from .configuration import SpecBlockConfig


class ReleaseLayout(Layout):
    """`LlamaForCausalLMSpecBlock*`, with the draft vocabulary in `vocab_mapping.pt`."""

    name = "specblock"
    hub_words = ("specblock",)

    def matches(self, config: Mapping[str, Any]) -> bool:
        return any(name.startswith("LlamaForCausalLMSpecBlock") for name in config.get("architectures") or ())

    def read_config(
        self, config: Fields, name: object, tensors: Tensors, target: PreTrainedConfig | None = None
    ) -> SpecBlockConfig:
        fields = read_llama_fields(config, name)
        require(config, ("draft_vocab_size", "diffspec_draft_token_num", "num_hidden_layers"), name)
        if target is not None:
            fields |= target_fields(target, fields)
        return SpecBlockConfig(
            **fields,
            draft_vocab_size=config["draft_vocab_size"],
            num_hidden_layers=config["num_hidden_layers"],
            block_size=config["diffspec_draft_token_num"],
            num_rank_classes=config.get("rank_classes", 4),
            feature_layers=usual_features(fields),
        )

    def read_tensors(self, config: PreTrainedConfig, files: DrafterFiles, tensors: Tensors) -> Tensors:
        tensors = without_embedding(tensors, "input_layer.embed_tokens.weight", config, files.name)
        mapping = files.optional("vocab_mapping.pt")
        vocabulary = {} if mapping is None else read_tensors(mapping, files.name)
        for key in vocabulary.keys() & tensors.keys():
            if not torch.equal(tensors[key].long(), vocabulary[key].long()):
                raise ValueError(
                    f"{key} differs between the weights and vocab_mapping.pt of {files.name}; download both again."
                )
        return with_vocabulary(tensors | vocabulary, config)

    def write(self, drafter: Any, folder: str | Path) -> None:
        config, tensors = drafter.config, drafter.state_dict()
        if config.markov_rank:
            raise ValueError(
                f"The layout {self.name} has no place for this drafter's Markov term (markov_rank="
                f"{config.markov_rank}); keep it in our layout."
            )
        check_usual_features(config, self.name)
        written = write_llama_fields(config) | {
            "architectures": ["LlamaForCausalLMSpecBlockShift"],
            "draft_vocab_size": config.draft_vocab_size,
            "torch_dtype": str(drafter.dtype).removeprefix("torch."),
            "diffspec_draft_token_num": config.block_size,
            "rank_classes": config.num_rank_classes,
        }
        write_folder(folder, written, tensors, {key: tensors[key] for key in ("d2t", "t2d")})
