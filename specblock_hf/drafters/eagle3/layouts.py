# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""EAGLE-3 as SafeAILab, SGLang and `speculators` lay it out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ...checkpoints.files import DrafterFiles
from ..common.configuration import UNRECORDED_LAYER
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
from .configuration import Eagle3Config


_NORMS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
"""Fields that mean the same to us."""


class _Eagle3Layout(Layout):
    hub_words: tuple[str, ...] = ("eagle",)
    layer_prefix = "layers.0."
    """Of the tensors of the only layer."""
    says_layer_type = False
    """Whether `model_type` is the layer's, and not whatever some other program wants to read."""

    def read_config(
        self, config: Fields, name: object, tensors: Tensors, target: PreTrainedConfig | None = None
    ) -> Eagle3Config:
        layer = self.layer_config(config, name)
        _refuse_other_layers(layer, name)
        fields = read_llama_fields(layer, name) | self.target_recorded(config)
        require(config, ("draft_vocab_size",), name)
        if target is not None:
            fields |= target_fields(target, fields)
        layers, nested = _feature_layers(config), config.get("eagle_config") or {}
        width = config.get("target_hidden_size")
        if width is None and "fc.weight" in tensors:
            width = tensors["fc.weight"].shape[1] // (len(layers) if layers else 3)
        width = width or fields["hidden_size"]
        # For sure, only the weights tell.
        has_embedding = "embed_tokens.weight" in tensors if tensors else width != fields["hidden_size"]
        norms_heads = layer.get("model_type") == "qwen3" and self.says_layer_type
        return Eagle3Config(
            **fields,
            draft_vocab_size=config["draft_vocab_size"],
            target_hidden_size=width,
            feature_layers=usual_features(fields) if layers is None else layers,
            **{flag: bool(nested.get(flag, config.get(flag, False))) for flag in _NORMS},
            qk_norm=norms_heads,
            own_embedding=has_embedding and config.get("embed_requires_grad") is not False,
        )

    def layer_config(self, config: Mapping[str, Any], name: object) -> Mapping[str, Any]:
        """The part of the configuration that is a LlamaConfig."""
        return config

    def target_recorded(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of our configuration that say which target it is, where the layout does."""
        return {}

    def read_tensors(self, config: Eagle3Config, files: DrafterFiles, tensors: Tensors) -> Tensors:
        renamed = {_renamed(key, self.layer_prefix, _Eagle3Layout.layer_prefix): tensors[key] for key in tensors}
        if not config.own_embedding:
            renamed = without_embedding(renamed, "embed_tokens.weight", config, files.name)
        return with_vocabulary(renamed, config)

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
    known_norms: tuple[str, ...] = ()
    """Of our norms, those that it has a word for."""

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == "llama" and "draft_vocab_size" in config

    def written_config(self, config: Eagle3Config) -> dict[str, Any]:
        check_usual_features(config, self.name)
        norms = {flag: True for flag in _NORMS if getattr(config, flag)}
        if config.qk_norm or not norms.keys() <= set(self.known_norms):
            raise ValueError(f"The layout {self.name} has no word for this drafter's norms; write it as speculators.")
        return {"architectures": [self.architecture]} | write_llama_fields(config) | norms


class SGLangLayout(SafeAILabLayout):
    """The same with a name of its own, as SGLang and SpecForge write it."""

    name = "sglang"
    is_known_by_little = False
    architecture = "LlamaForCausalLMEagle3"
    known_norms = ("norm_before_fc", "fc_norm", "norm_output")

    def matches(self, config: Mapping[str, Any]) -> bool:
        return self.architecture in (config.get("architectures") or ())


class SpeculatorsLayout(_Eagle3Layout):
    """That of vLLM's `speculators`, which records more than the others."""

    name = "speculators"
    says_layer_type = True
    hub_words = ("eagle", "speculator")

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("speculators_model_type") == "eagle3"

    def layer_config(self, config: Mapping[str, Any], name: object) -> Mapping[str, Any]:
        layer = config.get("transformer_layer_config", {})
        if layer.get("model_type", "llama") not in ("llama", "qwen3"):
            raise ValueError(
                f"{name} has {layer['model_type']} layers and only Llama's and Qwen3's can be read; load another "
                "drafter."
            )
        if layer.get("num_hidden_layers", 1) != 1:  # where it is said, it is meant
            raise ValueError(f"{name} has {layer['num_hidden_layers']} layers and an EAGLE-3 drafter has one.")
        return layer

    def target_recorded(self, config: Mapping[str, Any]) -> dict[str, Any]:
        verifier = config.get("speculators_config", {}).get("verifier", {}).get("name_or_path")
        return {} if verifier is None else {"target_name_or_path": verifier}

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
            **{flag: getattr(config, flag) for flag in _NORMS},
            "embed_requires_grad": config.own_embedding,
            "eagle_aux_hidden_state_layer_ids": layers,
            "speculators_config": {
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [proposal],
                "verifier": {"name_or_path": config.target_name_or_path, "architectures": []},
            },
            "transformer_layer_config": write_llama_fields(config)
            | ({"model_type": "qwen3"} if config.qk_norm else {}),
        }


class DeepSpecLayout(_Eagle3Layout):
    """
    DeepSpec's: a Qwen3Config, a head for the whole vocabulary, and a frozen copy of the target's embedding beside it.
    """

    name = "deepspec"
    says_layer_type = True
    is_writable = False

    def matches(self, config: Mapping[str, Any]) -> bool:
        return "Qwen3Eagle3Model" in (config.get("architectures") or ())

    def layer_config(self, config: Mapping[str, Any], name: object) -> Mapping[str, Any]:
        if config.get("num_hidden_layers", 1) != 1:
            raise ValueError(f"{name} has {config['num_hidden_layers']} layers and an EAGLE-3 drafter has one.")
        return config

    def target_recorded(self, config: Mapping[str, Any]) -> dict[str, Any]:
        words = {"target_name_or_path": "target_model_name_or_path", "target_num_layers": "num_target_layers"}
        return {ours: config[word] for ours, word in words.items() if config.get(word) is not None}

    def read_config(
        self, config: Fields, name: object, tensors: Tensors, target: PreTrainedConfig | None = None
    ) -> Eagle3Config:
        require(config, ("target_layer_ids", "vocab_size"), name)
        words = {
            "draft_vocab_size": config["vocab_size"],
            # It counts layers and means what leaves them; -1 is the embedding.
            "eagle_aux_hidden_state_layer_ids": [index + 1 for index in config["target_layer_ids"]],
            "embed_requires_grad": False,
        }
        return super().read_config({**config, **words}, name, tensors, target)

    def written_config(self, config: Eagle3Config) -> dict[str, Any]:
        raise ValueError(f"The layout {self.name} holds the target's embedding, which no drafter has; choose another.")


def _refuse_other_layers(layer: Mapping[str, Any], name: object) -> None:
    if "sliding_attention" in (layer.get("layer_types") or ()):
        raise ValueError(
            f"{name} sees {layer.get('sliding_window')} tokens back and EAGLE-3 drafters see everything here, for "
            "which it was not trained; load another drafter."
        )


def _feature_layers(config: Mapping[str, Any]) -> list[int] | None:
    layers = config.get("eagle_aux_hidden_state_layer_ids")
    nested = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    if layers is None and nested is not None:
        return [index + 1 for index in nested]  # SGLang counts layers and means what leaves them
    return layers


def _renamed(key: str, prefix: str, other: str) -> str:
    return other + key.removeprefix(prefix) if key.startswith(prefix) else key
