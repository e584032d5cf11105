# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
The published layouts of block-diffusion drafters, read into ours: DFlash, DFlash 2 and JetSpec as z-lab lays them out,
and DSpark as DeepSpec does. All of them say `model_type: "qwen3"`, and bring code that is never run. Their names of
tensors are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..common.configuration import UNRECORDED_LAYER
from ..common.layout import Fields, Layout, Tensors, require, rope_parameters_of, target_fields, write_folder
from .configuration import BlockDiffusionConfig, spread_feature_layers


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
NUMBERS = {
    "input_embedding_scale": 1.0,
    "output_multiplier": 1.0,
    "final_logit_softcapping": None,
    "conv_kernel_size": 0,
    "conv_group_size": 0,
    "selector_rank": 0,
    "selector_top_k": 0,
}
"""Fields that mean the same to us, with what they are where nothing is said."""
_KNOWN = frozenset(
    {"mask_token_id", "target_layer_ids", "block_size", "num_target_layers", "causal", "causal_head", *NUMBERS}
)
_FOREIGN_TENSORS = {
    "qkv_proj": "fused projections",
    "g_proj": "gated attention",
    "sinks": "attention sinks",
    "aux_hidden_norm": "a norm for every feature",
    "mask_embedding": "a mask that is no token",
    "hidden_dim_adapter": "an adapter between two widths",
}
"""Parts of the names of tensors that variants have and this library does not."""


class DFlashLayout(Layout):
    """`DFlashDraftModel`, `DFlash2DraftModel` and JetSpec's, which is a DFlash of another mask."""

    name = "dflash"
    hub_words: tuple[str, ...] = ("dflash", "jetspec")
    architectures: tuple[str, ...] = ("DFlashDraftModel", "DFlash2DraftModel")
    has_vocabulary = False
    """Whether the drafter has an embedding and a head of its own."""
    is_dspark = False
    """Whether it predicts from the anchor on, with DSpark's heads."""
    words: frozenset[str] = _KNOWN
    """What `dflash_config` may say."""

    def matches(self, config: Mapping[str, Any]) -> bool:
        return any(name in self.architectures for name in config.get("architectures") or ())

    def read_config(
        self, config: Fields, name: object, tensors: Tensors, target: PreTrainedConfig | None = None
    ) -> BlockDiffusionConfig:
        dflash = config.get("dflash_config") or {}
        _refuse_unknown(dflash, self.words, name, tensors)
        given = {**config, **{key: value for key, value in dflash.items() if value is not None}}
        require(given, (*_REQUIRED, "mask_token_id"), name)
        rope = rope_parameters_of(config)
        if "rope_theta" not in rope:
            raise ValueError(f"config.json of {name} states no rope_theta for all layers alike; load another drafter.")
        fields = {key: config[key] for key in (*_REQUIRED, *_OPTIONAL) if config.get(key) is not None}
        slides = "sliding_attention" in (config.get("layer_types") or ())
        fields |= {key: given.get(key, default) for key, default in NUMBERS.items()}
        fields |= {
            "use_sliding_window": config.get("use_sliding_window", slides),
            "rope_parameters": rope,
            "block_size": given.get("block_size", 16),
            "mask_token_id": given["mask_token_id"],
            "feature_layers": _feature_layers(given, name),
            "target_num_layers": given.get("num_target_layers"),
            "causal": _causal(config, dflash),
        } | self.own_fields(config, name)
        if "fc.weight" in tensors:
            fields["target_hidden_size"] = tensors["fc.weight"].shape[1] // len(fields["feature_layers"])
        if target is not None:
            fields |= target_fields(target, fields)
            if not self.has_vocabulary and not fields.get(
                "restricted_vocabulary"
            ):  # then it is the target's, whatever the file says about it
                fields["vocab_size"] = target.get_text_config().vocab_size
        return BlockDiffusionConfig(**fields)

    def own_fields(self, config: Mapping[str, Any], name: object) -> dict[str, Any]:
        """Fields of our configuration that only this layout has."""
        return {}

    def write(self, drafter: Any, folder: str | Path) -> None:
        config = drafter.config
        if not self.can_say(config):
            raise self.unwritable(drafter)
        if UNRECORDED_LAYER in config.feature_layers:
            raise ValueError(f"The layout {self.name} lists the states that a drafter reads; record feature_layers.")
        written = {key: getattr(config, key) for key in (*_REQUIRED, *_OPTIONAL)} | {
            "model_type": "qwen3",
            "use_sliding_window": config.use_sliding_window,
            "rope_parameters": dict(config.rope_parameters),
            "num_target_layers": config.target_num_layers,
            "tie_word_embeddings": False,
            "dtype": str(drafter.dtype).removeprefix("torch."),
        }
        block = {
            "block_size": config.block_size,
            "mask_token_id": config.mask_token_id,
            "target_layer_ids": [layer - 1 for layer in config.feature_layers],
        }
        write_folder(folder, written | self.written_block(config, block), drafter.state_dict())

    def can_say(self, config: BlockDiffusionConfig) -> bool:
        """Whether the layout has words for all that a drafter does."""
        heads = bool(config.markov_rank or config.confidence_head)
        convolves = bool(config.conv_kernel_size or config.selector_rank)
        return (
            (config.own_embedding, config.predicts_from_anchor) == (self.has_vocabulary, self.is_dspark)
            and not (config.restricted_vocabulary or config.window_from_anchor)
            and not (convolves if self.is_dspark else heads)
        )

    def written_block(self, config: BlockDiffusionConfig, block: dict[str, Any]) -> dict[str, Any]:
        """What `config.json` says of the block, and where."""
        numbers = {key: getattr(config, key) for key, default in NUMBERS.items() if getattr(config, key) != default}
        causal = {} if config.causal is None else {"causal": config.causal}
        architecture = "DFlash2DraftModel" if config.selector_rank else "DFlashDraftModel"
        # Older readers look for the block's size at the top, and for JetSpec's word for causal blocks.
        older = {"block_size": config.block_size} | ({} if config.causal is None else {"is_causal": config.causal})
        head = {"causal_head": True} if config.causal else {}
        return {"architectures": [architecture]} | older | {"dflash_config": block | numbers | causal | head}


class DSparkLayout(DFlashLayout):
    """DeepSpec's, which predicts from the anchor on, with a Markov head, a confidence head, or without."""

    name = "dspark"
    hub_words = ("dspark",)
    architectures: tuple[str, ...] = ("Qwen3DSparkModel",)
    has_vocabulary = True
    is_dspark = True

    def own_fields(self, config: Mapping[str, Any], name: object) -> dict[str, Any]:
        return {"causal": False, "predicts_from_anchor": True, "own_embedding": True} | dspark_heads(config, name)

    def written_block(self, config: BlockDiffusionConfig, block: dict[str, Any]) -> dict[str, Any]:
        # Of its training; readers ask for it.
        return block | {"architectures": list(self.architectures), "num_anchors": 512} | written_heads(config)


class SpecForgeDSparkLayout(DFlashLayout):
    """SpecForge's DSpark: laid out as its DFlash, without an embedding and a head of its own."""

    name = "specforge-dspark"
    architectures = ("DSparkDraftModel",)
    hub_words = ("dspark",)
    is_dspark = True
    words = _KNOWN | {
        "projector_type",
        "attention_mode",  # which the numbers of heads tell as well
        "markov_rank",
        "markov_head_type",
        "enable_confidence_head",
        "confidence_head_with_markov",
        "confidence_head_alpha",
    }

    def own_fields(self, config: Mapping[str, Any], name: object) -> dict[str, Any]:
        block = config.get("dflash_config") or {}
        enabled = {"enable_confidence_head": bool(block.get("confidence_head_alpha"))}
        return {"predicts_from_anchor": True} | dspark_heads(enabled | block, name)

    def written_block(self, config: BlockDiffusionConfig, block: dict[str, Any]) -> dict[str, Any]:
        mode = {"attention_mode": "gqa" if config.num_key_value_heads < config.num_attention_heads else "mha"}
        inner = super().written_block(config, block)["dflash_config"] | written_heads(config) | mode
        return {
            "architectures": list(self.architectures),
            "block_size": config.block_size,
            "dflash_config": inner | {"projector_type": "dspark"},
        }


def dspark_heads(config: Mapping[str, Any], name: object) -> dict[str, Any]:
    """Fields of our configuration about DSpark's heads, which all its layouts name alike."""
    rank = config.get("markov_rank", 0)
    kind = str(config.get("markov_head_type", "vanilla")).lower()
    if rank and kind != "vanilla":
        raise ValueError(
            f'{name} has a Markov head of the type {kind!r}; only "vanilla" ones can be run, so load another drafter.'
        )
    confidence = bool(config.get("enable_confidence_head", False))
    return {
        "markov_rank": rank,
        "confidence_head": confidence,
        "confidence_head_with_markov": confidence and bool(config.get("confidence_head_with_markov", False)),
    }


def written_heads(config: BlockDiffusionConfig) -> dict[str, Any]:
    """The same back."""
    return {
        "markov_rank": config.markov_rank,
        "markov_head_type": "vanilla",
        "enable_confidence_head": config.confidence_head,
        "confidence_head_with_markov": config.confidence_head_with_markov,
    }


class OtherDFlashLayout(Layout):
    """Variants that cannot be read."""

    name = "dflash-variant"
    is_known_by_little = True
    is_readable = is_writable = False

    def matches(self, config: Mapping[str, Any]) -> bool:
        names = config.get("architectures") or ()
        return "dflash_config" in config or any("DFlash" in name or "DSpark" in name for name in names)

    def read_config(
        self, config: Fields, name: object, tensors: Tensors, target: PreTrainedConfig | None = None
    ) -> BlockDiffusionConfig:
        layouts = (DFlashLayout, DSparkLayout, SpecForgeDSparkLayout)
        known = ", ".join(name for layout in layouts for name in layout.architectures)
        raise ValueError(
            f"{name} is a variant of DFlash that is not known (architectures {config.get('architectures')}); load one "
            f"of {known}."
        )


def _refuse_unknown(
    dflash: Mapping[str, Any], known: frozenset[str], name: object, tensors: Mapping[str, torch.Tensor]
) -> None:
    unknown = sorted(key for key, value in dflash.items() if key not in known and value not in (None, False))
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
