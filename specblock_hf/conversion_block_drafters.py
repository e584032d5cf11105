# Copyright 2026 The specblock_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
The published layouts of block-diffusion drafters, read into ours: DFlash, DFlash 2 and JetSpec as z-lab lays them out,
and DSpark as DeepSpec does. All of them say `model_type: "qwen3"`, and bring code that is never run. Their names of
tensors are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from .configuration_block_diffusion import BlockDiffusionConfig, spread_feature_layers
from .conversion import Tensors, rope_parameters_of, target_fields


_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
_OPTIONAL = (
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "attention_bias",
    "layer_types",
    "sliding_window",
    "max_window_layers",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_NUMBERS = {
    "input_embedding_scale": 1.0,
    "output_multiplier": 1.0,
    "final_logit_softcapping": None,
    "conv_kernel_size": 0,
    "conv_group_size": 0,
    "selector_rank": 0,
    "selector_top_k": 0,
}
"""Fields that mean the same to us, with what they are where nothing is said."""
_KNOWN = {"mask_token_id", "target_layer_ids", "block_size", "num_target_layers", "causal", "causal_head", *_NUMBERS}
_FOREIGN_TENSORS = {
    "qkv_proj": "fused projections",
    "g_proj": "gated attention",
    "sinks": "attention sinks",
    "aux_hidden_norm": "a norm for every feature",
    "mask_embedding": "a mask that is no token",
    "hidden_dim_adapter": "an adapter between two widths",
}
"""Parts of the names of tensors that variants have and this library does not."""


def read_block_config(
    config: Mapping[str, Any], name: object, tensors: Tensors, target: PreTrainedConfig | None = None
) -> BlockDiffusionConfig:
    """
    Our configuration of a published block-diffusion drafter.

    Args:
        config (`dict`): What `config.json` says.
        name (`str` or `os.PathLike`): The checkpoint, for messages.
        tensors (`dict[str, torch.Tensor]`): Its weights, for the width of the target that no configuration states.
        target ([`~transformers.PreTrainedConfig`], *optional*):
            Of the target, which fills in what the layout does not record: its special tokens.

    Raises:
        ValueError: A field is missing, or asks for something that this library does not do.
    """
    dflash = config.get("dflash_config") or {}
    _refuse_unknown(dflash, name, tensors)
    is_dspark = "Qwen3DSparkModel" in config["architectures"]
    given = {**config, **{key: value for key, value in dflash.items() if value is not None}}
    lacking = [key for key in (*_REQUIRED, "mask_token_id") if given.get(key) is None]
    if lacking:
        raise ValueError(f"config.json of {name} lacks {', '.join(lacking)}; take it from the original repository.")
    rope = rope_parameters_of(config)
    if "rope_theta" not in rope:
        raise ValueError(f"config.json of {name} states no rope_theta for all layers alike; load another drafter.")
    fields = {key: config[key] for key in (*_REQUIRED, *_OPTIONAL) if config.get(key) is not None}
    slides = "sliding_attention" in (config.get("layer_types") or ())
    fields |= {key: given.get(key, default) for key, default in _NUMBERS.items()}
    fields |= {
        "use_sliding_window": config.get("use_sliding_window", slides),
        "rope_parameters": rope,
        "block_size": given.get("block_size", 16),
        "mask_token_id": given["mask_token_id"],
        "feature_layers": _feature_layers(given, name),
        "target_num_layers": given.get("num_target_layers"),
        "causal": _causal(config, dflash),
        "predicts_from_anchor": is_dspark,
        "own_embedding": is_dspark,
    }
    if is_dspark:
        fields |= _dspark_fields(config, name)
    if "fc.weight" in tensors:
        fields["target_hidden_size"] = tensors["fc.weight"].shape[1] // len(fields["feature_layers"])
    if target is not None:
        fields |= target_fields(target)
        if not is_dspark:  # the vocabulary is the target's, whatever the file says about it
            fields["vocab_size"] = target.get_text_config().vocab_size
    return BlockDiffusionConfig(**fields)


def _refuse_unknown(dflash: Mapping[str, Any], name: object, tensors: Tensors) -> None:
    unknown = sorted(key for key, value in dflash.items() if key not in _KNOWN and value not in (None, False))
    if unknown:
        raise ValueError(
            f"dflash_config of {name} sets {', '.join(unknown)}, which this library does not know; load a drafter "
            "without it."
        )
    found = [what for part, what in _FOREIGN_TENSORS.items() if any(part in key for key in tensors)]
    if found:
        raise ValueError(
            f"{name} is a variant of DFlash with {' and '.join(found)}, which this library does not know; load a "
            "drafter without."
        )


def _feature_layers(given: Mapping[str, Any], name: object) -> list[int]:
    """`target_layer_ids` count layers and mean what leaves them; -1 is the embedding."""
    depth, ids = given.get("num_target_layers"), given.get("target_layer_ids")
    if ids is None and depth is None:
        raise ValueError(f"config.json of {name} lacks target_layer_ids; take it from the original repository.")
    layers = (
        [index + 1 for index in ids] if ids is not None else spread_feature_layers(given["num_hidden_layers"], depth)
    )
    unreadable = [layer - 1 for layer in layers if layer < 0 or (depth is not None and layer >= depth)]
    if unreadable:
        # Behind the last layer some codes put the state before the final norm and some the one after it.
        raise ValueError(
            f"{name} reads what leaves layer {unreadable[0]} of a target of {depth} layers; only the embedding (-1) "
            "and layers before the last can be read, so load another drafter."
        )
    return layers


def _causal(config: Mapping[str, Any], dflash: Mapping[str, Any]) -> bool | None:
    """The first of the words for it that is there; without one it is for every layer to say."""
    for words in (config.get("is_causal"), dflash.get("causal"), dflash.get("causal_head")):
        if words is not None:
            return bool(words)
    return None


def _dspark_fields(config: Mapping[str, Any], name: object) -> dict[str, Any]:
    rank = config.get("markov_rank", 0)
    kind = str(config.get("markov_head_type", "vanilla")).lower()
    if rank and kind != "vanilla":
        raise ValueError(
            f'{name} has a Markov head of the type {kind!r}; only "vanilla" ones can be run, so load another drafter.'
        )
    confidence = bool(config.get("enable_confidence_head", False))
    return {
        "causal": False,
        "markov_rank": rank,
        "confidence_head": confidence,
        "confidence_head_with_markov": confidence and bool(config.get("confidence_head_with_markov", False)),
    }


__all__ = ["read_block_config"]
