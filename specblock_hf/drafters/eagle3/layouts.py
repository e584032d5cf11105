# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""EAGLE-3 as SafeAILab, SGLang and `speculators` lay it out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ...checkpoints.files import DrafterFiles
from ..common.configuration import UNRECORDED_LAYER
from ..common.layout import (
    Layout,
    Tensors,
    check_usual_features,
    read_llama_fields,
    require,
    target_fields,
    usual_features,
    with_whole_vocabulary,
    without_embedding,
    write_folder,
    write_llama_fields,
)
from .configuration import Eagle3Config


class _Eagle3Layout(Layout):
    hub_words = ("eagle3", "eagle-3")
    layer_prefix = "layers.0."
    """Of the tensors of the only layer."""

    def read_config(
        self,
        config: Mapping[str, Any],
        name: object,
        tensors: Mapping[str, torch.Tensor],
        target: PreTrainedConfig | None = None,
    ) -> Eagle3Config:
        for flag in ("fc_norm", "norm_output"):
            if config.get(flag):
                raise ValueError(f"{name} sets {flag}, which this library does not know; load a drafter without it.")
        fields = read_llama_fields(self.layer_config(config, name), name)
        require(config, ("draft_vocab_size",), name)
        verifier = config.get("speculators_config", {}).get("verifier", {}).get("name_or_path")
        if verifier is not None:
            fields["target_name_or_path"] = verifier
        if target is not None:
            fields |= target_fields(target)
        layers = _feature_layers(config)
        width = config.get("target_hidden_size")
        if width is None and "fc.weight" in tensors:
            width = tensors["fc.weight"].shape[1] // (len(layers) if layers else 3)
        return Eagle3Config(
            **fields,
            draft_vocab_size=config["draft_vocab_size"],
            target_hidden_size=width or fields["hidden_size"],
            feature_layers=usual_features(fields) if layers is None else layers,
            norm_before_residual=bool(config.get("norm_before_residual", False)),
            norm_before_fc=bool(config.get("norm_before_fc", False)),
            own_embedding="embed_tokens.weight" in tensors and config.get("embed_requires_grad") is not False,
        )

    def layer_config(self, config: Mapping[str, Any], name: object) -> Mapping[str, Any]:
        """The part of the configuration that is a LlamaConfig."""
        return config

    def read_tensors(self, config: Eagle3Config, files: DrafterFiles, tensors: Tensors) -> Tensors:
        renamed = {_renamed(key, self.layer_prefix, _Eagle3Layout.layer_prefix): tensors[key] for key in tensors}
        if not config.own_embedding:
            renamed = without_embedding(renamed, "embed_tokens.weight", config, files.name)
        return with_whole_vocabulary(renamed, config)

    def write(self, drafter: Any, folder: str | Path) -> None:
        written = self.written_config(drafter.config) | {
            "draft_vocab_size": drafter.config.draft_vocab_size,
            "target_hidden_size": drafter.config.target_hidden_size,
            "torch_dtype": str(drafter.dtype).removeprefix("torch."),
        }
        tensors = drafter.state_dict()
        renamed = {_renamed(key, _Eagle3Layout.layer_prefix, self.layer_prefix): tensors[key] for key in tensors}
        write_folder(folder, written, renamed)

    @abstractmethod
    def written_config(self, config: Eagle3Config) -> dict[str, Any]:
        """What `config.json` says of a drafter, but for what all three say alike."""


class SafeAILabLayout(_Eagle3Layout):
    """The EAGLE authors' own: a LlamaConfig with a draft vocabulary."""

    name = "safeailab"
    is_known_by_little = True
    layer_prefix = "midlayer."
    architecture = "LlamaForCausalLM"

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == "llama" and "draft_vocab_size" in config

    def written_config(self, config: Eagle3Config) -> dict[str, Any]:
        check_usual_features(config, self.name)
        if config.norm_before_residual or config.norm_before_fc:
            raise ValueError(f"The layout {self.name} has no word for this drafter's norms; write it as speculators.")
        return {"architectures": [self.architecture]} | write_llama_fields(config)


class SGLangLayout(SafeAILabLayout):
    """The same with a name of its own, as SGLang and SpecForge write it."""

    name = "sglang"
    is_known_by_little = False
    architecture = "LlamaForCausalLMEagle3"

    def matches(self, config: Mapping[str, Any]) -> bool:
        return self.architecture in (config.get("architectures") or ())


class SpeculatorsLayout(_Eagle3Layout):
    """That of vLLM's `speculators`, which records more than the others."""

    name = "speculators"
    hub_words = ("eagle3", "speculators", "speculator")

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("speculators_model_type") == "eagle3"

    def layer_config(self, config: Mapping[str, Any], name: object) -> Mapping[str, Any]:
        layer = config.get("transformer_layer_config", {})
        if layer.get("model_type", "llama") != "llama":
            raise ValueError(f"{name} has {layer['model_type']} layers and only Llama layers can be read.")
        return layer

    def written_config(self, config: Eagle3Config) -> dict[str, Any]:
        layers = None if UNRECORDED_LAYER in config.feature_layers else list(config.feature_layers)
        proposal = {
            "proposal_type": "greedy",
            "speculative_tokens": config.num_blocks,
            "verifier_accept_k": 1,
            "accept_tolerance": 0.0,
        }
        return {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            "speculators_version": "0.9.0",
            "norm_before_residual": config.norm_before_residual,
            "norm_before_fc": config.norm_before_fc,
            "fc_norm": False,
            "norm_output": False,
            "embed_requires_grad": config.own_embedding,
            "eagle_aux_hidden_state_layer_ids": layers,
            "speculators_config": {
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [proposal],
                "verifier": {"name_or_path": config.target_name_or_path, "architectures": []},
            },
            "transformer_layer_config": write_llama_fields(config),
        }


def _feature_layers(config: Mapping[str, Any]) -> list[int] | None:
    layers = config.get("eagle_aux_hidden_state_layer_ids")
    nested = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    if layers is None and nested is not None:
        return [index + 1 for index in nested]  # SGLang counts layers and means what leaves them
    return layers


def _renamed(key: str, prefix: str, other: str) -> str:
    return other + key.removeprefix(prefix) if key.startswith(prefix) else key
