# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Other people's checkpoint layouts, read into ours and written from it: the authors' SpecBlock, and EAGLE-3 as
SafeAILab, SGLang and `speculators` lay it out. A layout is a way to write `config.json` and to name tensors; no number
changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from .common.configuration import UNRECORDED_LAYER, default_feature_layers
from .common.layout import Layout, Tensors, rope_parameters_of, target_fields, write_folder
from .common.registry import drafter_kind
from .eagle3.configuration import Eagle3Config
from .specblock.configuration import SpecBlockConfig


# Fields that every layout names as transformers' LlamaConfig does.
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "rms_norm_eps")
_OPTIONAL = (
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "attention_bias",
    "mlp_bias",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_NAMES = {Layout.SAFEAILAB: ("midlayer.", "layers.0."), Layout.SGLANG: ("midlayer.", "layers.0.")}
"""Prefix of the layer's tensors in a layout, and in ours."""
_WRITABLE = {
    SpecBlockConfig.model_type: (Layout.SPECBLOCK,),
    Eagle3Config.model_type: (Layout.SAFEAILAB, Layout.SGLANG, Layout.SPECULATORS),
}
"""Layouts that a drafter can be written in."""
_BLOCK_DRAFTERS = {
    "DFlashDraftModel": Layout.DFLASH,
    "DFlash2DraftModel": Layout.DFLASH,
    "Qwen3DSparkModel": Layout.DSPARK,
}
"""Layouts that say nothing of themselves but their class: `model_type` is that of the layers."""


def layout_of(config: Mapping[str, Any], name: object) -> Layout:
    """
    Args:
        config (`dict`): What `config.json` says.
        name (`str` or `os.PathLike`): The checkpoint, for the message.

    Raises:
        ValueError: It is not a drafter that can be read.
    """
    architectures, model_type = config.get("architectures") or [], config.get("model_type")
    texts = [*architectures, "" if model_type is None else model_type] if isinstance(architectures, list) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"config.json of {name} names no model (architectures {architectures!r}, model_type {model_type!r}); take "
            "it from the original repository."
        )
    if drafter_kind(model_type) is not None:
        return Layout.OURS
    for architecture in architectures:
        if architecture in _BLOCK_DRAFTERS:
            return _BLOCK_DRAFTERS[architecture]
    if "dflash_config" in config or any("DFlash" in a or "DSpark" in a for a in architectures):
        raise ValueError(
            f"{name} is a variant of DFlash that is not known (architectures {architectures}); load one of "
            f"{', '.join(_BLOCK_DRAFTERS)}."
        )
    if config.get("speculators_model_type") == "eagle3":
        return Layout.SPECULATORS
    if any(architecture.startswith("LlamaForCausalLMSpecBlock") for architecture in architectures):
        return Layout.SPECBLOCK
    if "LlamaForCausalLMEagle3" in architectures:
        return Layout.SGLANG
    if model_type == "llama" and "draft_vocab_size" in config:
        return Layout.SAFEAILAB
    raise ValueError(
        f"{name} is not a drafter in a known layout (architectures {architectures}, model_type "
        f"{model_type!r}); SpecBlock drafters of this library or its paper's authors can be loaded, and "
        "EAGLE-3 drafters as SafeAILab, SGLang or speculators write them, DFlash, JetSpec and DSpark as published."
    )


def read_config(
    config: Mapping[str, Any], name: object, tensors: Tensors, target: PreTrainedConfig | None = None
) -> SpecBlockConfig | Eagle3Config:
    """
    Our configuration of a checkpoint in another layout.

    Args:
        config (`dict`): What `config.json` says.
        name (`str` or `os.PathLike`): The checkpoint, for messages.
        tensors (`dict[str, torch.Tensor]`): Its weights, for the sizes that no configuration states.
        target ([`~transformers.PreTrainedConfig`], *optional*):
            Of the target, which fills in what the layout does not record: the target's depth and special tokens.

    Raises:
        ValueError: A field is missing, or asks for something that this library does not do.
    """
    layout = layout_of(config, name)
    inner = config.get("transformer_layer_config", {}) if layout == Layout.SPECULATORS else config
    if layout == Layout.SPECULATORS and inner.get("model_type", "llama") != "llama":
        raise ValueError(f"{name} has {inner['model_type']} layers and only Llama layers can be read.")
    lacking = [key for key in _REQUIRED if inner.get(key) is None]
    own = ("diffspec_draft_token_num", "num_hidden_layers") if layout == Layout.SPECBLOCK else ()
    lacking += [key for key in ("draft_vocab_size", *own) if config.get(key) is None]
    if lacking:
        raise ValueError(f"config.json of {name} lacks {', '.join(lacking)}; take it from the original repository.")
    fields = {key: inner[key] for key in (*_REQUIRED, *_OPTIONAL) if inner.get(key) is not None}
    fields |= {"draft_vocab_size": config["draft_vocab_size"], "rope_parameters": rope_parameters_of(inner)}
    fields["num_key_value_heads"] = fields.get("num_key_value_heads", fields["num_attention_heads"])
    if layout == Layout.SPECBLOCK:
        kind: type[SpecBlockConfig | Eagle3Config] = SpecBlockConfig
        fields |= _specblock_fields(config)
    else:
        kind = Eagle3Config
        fields |= _eagle3_fields(config, name, layout, tensors, target)
    if target is not None:
        fields |= target_fields(target)
    if fields.get("feature_layers") is None:
        depth = fields.get("target_num_layers")
        fields["feature_layers"] = list(default_feature_layers(depth)) if depth else [UNRECORDED_LAYER] * 3
    return kind(**fields)


def _specblock_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_hidden_layers": config["num_hidden_layers"],
        "block_size": config["diffspec_draft_token_num"],
        "num_rank_classes": config.get("rank_classes", 4),
    }


def _eagle3_fields(
    config: Mapping[str, Any], name: object, layout: Layout, tensors: Tensors, target: PreTrainedConfig | None
) -> dict[str, Any]:
    for flag in ("fc_norm", "norm_output"):
        if config.get(flag):
            raise ValueError(f"{name} sets {flag}, which this library does not know; load a drafter without it.")
    inner = config.get("transformer_layer_config", config)
    layers = config.get("eagle_aux_hidden_state_layer_ids")
    nested = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    if layers is None and nested is not None:
        layers = [index + 1 for index in nested]  # SGLang counts layers and means what leaves them
    fields: dict[str, Any] = {
        "feature_layers": layers,
        "norm_before_residual": bool(config.get("norm_before_residual", False)),
        "norm_before_fc": bool(config.get("norm_before_fc", False)),
        "own_embedding": "embed_tokens.weight" in tensors and config.get("embed_requires_grad") is not False,
    }
    verifier = config.get("speculators_config", {}).get("verifier", {}).get("name_or_path")
    if verifier is not None:
        fields["target_name_or_path"] = verifier
    fields["target_hidden_size"] = config.get("target_hidden_size") or inner["hidden_size"]
    if "fc.weight" in tensors and config.get("target_hidden_size") is None:
        fields["target_hidden_size"] = tensors["fc.weight"].shape[1] // (len(layers) if layers else 3)
    return fields


def read_tensors_of(
    config: SpecBlockConfig | Eagle3Config,
    layout: Layout,
    name: object,
    tensors: Tensors,
    mapping: Tensors | None = None,
) -> Tensors:
    """
    The tensors under our names. A copy of the target's embedding is dropped: it is the target's at run time.

    Args:
        config ([`SpecBlockConfig`] or [`Eagle3Config`]): From [`read_config`].
        layout (`Layout`): Of the checkpoint.
        name (`str` or `os.PathLike`): The checkpoint, for messages.
        tensors (`dict[str, torch.Tensor]`): Its weights.
        mapping (`dict[str, torch.Tensor]`, *optional*): `d2t` and `t2d` of `vocab_mapping.pt`.

    Raises:
        ValueError: The embedding contradicts the configuration, or one draft vocabulary the other.
    """
    theirs, ours = _NAMES.get(layout, ("", ""))
    renamed = {
        ours + key.removeprefix(theirs) if theirs and key.startswith(theirs) else key: value
        for key, value in tensors.items()
    }
    if isinstance(config, SpecBlockConfig) or not config.own_embedding:
        embedding = "input_layer.embed_tokens.weight" if layout == Layout.SPECBLOCK else "embed_tokens.weight"
        dropped = renamed.pop(embedding, None)
        if dropped is not None and tuple(dropped.shape) != (config.vocab_size, config.target_hidden_size):
            raise ValueError(
                f"{embedding} of {name} has the shape {tuple(dropped.shape)} and the target's embedding has "
                f"{(config.vocab_size, config.target_hidden_size)}; config.json and weights are not of one drafter."
            )
    for key, value in (mapping or {}).items():
        if key in renamed and not torch.equal(renamed[key].long(), value.long()):
            raise ValueError(f"{key} differs between the weights and vocab_mapping.pt of {name}; download both again.")
        renamed[key] = value
    if "d2t" not in renamed and "t2d" not in renamed and config.draft_vocab_size == config.vocab_size:
        renamed["d2t"] = torch.zeros(config.vocab_size, dtype=torch.long)
        renamed["t2d"] = torch.ones(config.vocab_size, dtype=torch.bool)
    return renamed


def write_checkpoint(drafter: torch.nn.Module, folder: str | Path, layout: Layout) -> None:
    """
    Save a drafter in another layout.

    Args:
        drafter ([`SpecBlockDrafter`] or [`Eagle3Drafter`]): What to save.
        folder (`str` or `Path`): Where; made if it is not there.
        layout (`Layout`): `SPECBLOCK` for a SpecBlock drafter; `SAFEAILAB`, `SGLANG` or `SPECULATORS` for EAGLE-3.

    Raises:
        ValueError: The layout is another method's or cannot say what this drafter does.
    """
    config, tensors = drafter.config, {key: value.contiguous() for key, value in drafter.state_dict().items()}
    if layout not in _WRITABLE.get(config.model_type, ()):
        raise ValueError(
            f"A {config.model_type} drafter cannot be written in the layout {layout.value}; choose another."
        )
    _check_writable(config, layout)
    written = _write_config(config, layout, str(tensors["lm_head.weight"].dtype).removeprefix("torch."))
    theirs, ours = _NAMES.get(layout, ("", ""))
    if ours:
        tensors = {
            theirs + key.removeprefix(ours) if key.startswith(ours) else key: value for key, value in tensors.items()
        }
    mapping = {key: tensors[key] for key in ("d2t", "t2d")} if layout == Layout.SPECBLOCK else None
    write_folder(folder, written, tensors, mapping)


def _check_writable(config: SpecBlockConfig | Eagle3Config, layout: Layout) -> None:
    depth, layers = config.target_num_layers, tuple(config.feature_layers)
    if layout == Layout.SPECBLOCK and config.markov_rank:
        raise ValueError(
            f"The layout {layout.value} has no place for this drafter's Markov term (markov_rank="
            f"{config.markov_rank}); keep it in our layout."
        )
    usual = UNRECORDED_LAYER in layers or (depth is not None and layers == default_feature_layers(depth))
    if layout != Layout.SPECULATORS and not usual:
        raise ValueError(
            f"The layout {layout.value} does not record which states a drafter reads and means 2, N // 2 and N - 3 of "
            f"N layers; this drafter reads {list(layers)} of {depth or 'an unknown number'}, so keep it in our layout."
        )
    if layout in (Layout.SAFEAILAB, Layout.SGLANG) and (config.norm_before_residual or config.norm_before_fc):
        raise ValueError(f"The layout {layout.value} has no word for this drafter's norms; write it as speculators.")


def _write_config(config: SpecBlockConfig | Eagle3Config, layout: Layout, dtype: str) -> dict[str, Any]:
    rope = dict(config.rope_parameters)
    theta = rope.pop("rope_theta")
    llama = {key: getattr(config, key) for key in (*_REQUIRED, *_OPTIONAL)}
    llama |= {
        "model_type": "llama",
        "num_hidden_layers": config.num_hidden_layers,
        "rope_theta": theta,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "tie_word_embeddings": False,
    }
    shared = {"draft_vocab_size": config.draft_vocab_size, "torch_dtype": dtype}
    if layout == Layout.SPECBLOCK:
        slots = {"diffspec_draft_token_num": config.block_size, "rank_classes": config.num_rank_classes}
        return {"architectures": ["LlamaForCausalLMSpecBlockShift"]} | llama | shared | slots
    if layout != Layout.SPECULATORS:
        architecture = "LlamaForCausalLMEagle3" if layout == Layout.SGLANG else "LlamaForCausalLM"
        return {"architectures": [architecture]} | llama | shared | {"target_hidden_size": config.target_hidden_size}
    return shared | _speculators_fields(config) | {"transformer_layer_config": llama}


def _speculators_fields(config: Eagle3Config) -> dict[str, Any]:
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
        "target_hidden_size": config.target_hidden_size,
        "eagle_aux_hidden_state_layer_ids": layers,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": config.target_name_or_path, "architectures": []},
        },
    }
