# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What a published layout of drafters is, and what several of them have in common."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from ...checkpoints.files import WEIGHTS, DrafterFiles
from ...checkpoints.saving import save_folder_whole
from .configuration import UNRECORDED_LAYER, default_feature_layers


Fields = Mapping[str, Any]
"""What a `config.json` says."""

Tensors = dict[str, torch.Tensor]

_LLAMA_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "rms_norm_eps")
_LLAMA_OPTIONAL = (
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


class Layout(ABC):
    """
    A way to publish a kind of drafter: how `config.json` is written and what tensors are called; no number changes.
    Give those of a kind to [`register_drafter`].

    Attributes:
        name (`str`): For `specblock convert --to` and messages.
        is_known_by_little (`bool`): Others say of themselves what they are, so they are asked first.
        is_readable (`bool`): Whether any drafter of it can be loaded.
        is_writable (`bool`): Whether drafters can be saved in it, too.
        hub_words (`tuple[str, ...]`): Of which one is part of the names of such drafters on the Hub.
    """

    name: str
    is_known_by_little: ClassVar[bool] = False
    is_readable: ClassVar[bool] = True
    is_writable: ClassVar[bool] = True
    hub_words: tuple[str, ...] = ()

    @abstractmethod
    def matches(self, config: Mapping[str, Any]) -> bool:
        """
        Whether a checkpoint has this layout, from what its `config.json` says. Of a file that anybody may have
        written, so no field need be there or of its usual type, but `architectures` is a list of strings.
        """

    @abstractmethod
    def read_config(
        self, config: Fields, name: object, tensors: Tensors, target: PreTrainedConfig | None = None
    ) -> PreTrainedConfig:
        """
        Our configuration of a checkpoint.

        Args:
            config (`dict`): What `config.json` says.
            name (`str` or `os.PathLike`): The checkpoint, for messages.
            tensors (`dict[str, torch.Tensor]`): Its weights, for the sizes that no configuration states.
            target ([`~transformers.PreTrainedConfig`], *optional*):
                Of the target, which fills in what the layout does not record, such as the target's depth.

        Raises:
            ValueError: A field is missing, or asks for something that this library does not do.
        """

    def read_tensors(self, config: PreTrainedConfig, files: DrafterFiles, tensors: Tensors) -> Tensors:
        """
        The tensors under our names; as they are, unless a layout says otherwise.

        Args:
            config ([`~transformers.PreTrainedConfig`]): From [`~Layout.read_config`].
            files (`DrafterFiles`): The checkpoint.
            tensors (`dict[str, torch.Tensor]`): Its weights.

        Raises:
            ValueError: They contradict the configuration, or each other.
        """
        return tensors

    def write(self, drafter: Any, folder: str | Path) -> None:
        """
        Save a drafter of the kind that the layout is registered for.

        Args:
            drafter ([`~transformers.PreTrainedModel`]): What to save.
            folder (`str` or `Path`): Where; made if it is not there.

        Raises:
            ValueError: The layout cannot say what this drafter does.
        """
        raise self.unwritable(drafter)

    def unwritable(self, drafter: Any) -> ValueError:
        """What to raise where a layout is another drafter's."""
        return ValueError(
            f"A {drafter.config.model_type} drafter cannot be written in the layout {self.name}; choose another."
        )


@dataclass(eq=False)
class UnreadLayout(Layout):
    """
    A layout that is known by its name, and whose drafters cannot be run.

    Args:
        name (`str`): Of the layout.
        method (`str`): What its drafters are called.
        lacking (`str`): What they have that nothing here has, as the rest of a sentence.
        architectures (`tuple[str, ...]`, *optional*): Those of its configurations.
        speculators (`str`, *optional*): Its `speculators_model_type`.
        projector (`str`, *optional*): Its `projector_type` in `dflash_config`.
        hub_words (`tuple[str, ...]`, *optional*): See [`Layout`].
    """

    is_readable = is_writable = False

    name: str
    method: str
    lacking: str
    architectures: tuple[str, ...] = ()
    speculators: str | None = None
    projector: str | None = None
    hub_words: tuple[str, ...] = ()

    def matches(self, config: Mapping[str, Any]) -> bool:
        block = config.get("dflash_config")
        projector = block.get("projector_type") if isinstance(block, dict) else None
        return (
            any(name in self.architectures for name in config.get("architectures") or ())
            or (self.speculators is not None and config.get("speculators_model_type") == self.speculators)
            or (self.projector is not None and projector == self.projector)
        )

    def read_config(
        self, config: Fields, name: object, tensors: Tensors, target: PreTrainedConfig | None = None
    ) -> PreTrainedConfig:
        raise ValueError(
            f"{name} is a {self.method} drafter, which cannot be run here because {self.lacking}; load another "
            "drafter."
        )


def require(config: Mapping[str, Any], keys: Iterable[str], name: object) -> None:
    """Refuse a configuration in which one of the fields is missing or null, naming all such fields."""
    lacking = [key for key in keys if config.get(key) is None]
    if lacking:
        raise ValueError(f"config.json of {name} lacks {', '.join(lacking)}; take it from the original repository.")


def read_llama_fields(config: Mapping[str, Any], name: object) -> dict[str, Any]:
    """Fields of our configuration that a layout names as transformers' LlamaConfig does."""
    require(config, _LLAMA_REQUIRED, name)
    fields = {key: config[key] for key in (*_LLAMA_REQUIRED, *_LLAMA_OPTIONAL) if config.get(key) is not None}
    fields["num_key_value_heads"] = fields.get("num_key_value_heads", fields["num_attention_heads"])
    return fields | {"rope_parameters": rope_parameters_of(config)}


def write_llama_fields(config: Any) -> dict[str, Any]:
    """The same back, with RoPE as releases of transformers before 5 keep it."""
    rope = dict(config.rope_parameters)
    theta = rope.pop("rope_theta")
    return {key: getattr(config, key) for key in (*_LLAMA_REQUIRED, *_LLAMA_OPTIONAL)} | {
        "model_type": "llama",
        "num_hidden_layers": config.num_hidden_layers,
        "rope_theta": theta,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "tie_word_embeddings": False,
    }


def rope_parameters_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """As transformers 5 keeps it. Those who publish drafters mean 10000 where nothing is said."""
    if config.get("rope_parameters"):
        return dict(config["rope_parameters"])
    scaling = dict(config.get("rope_scaling") or {})
    kind = scaling.pop("type", "default")
    return {"rope_type": kind, **scaling, "rope_theta": float(config.get("rope_theta", 10000.0))}


def target_fields(target: PreTrainedConfig, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """
    What a target's configuration says that layouts do not record.

    Args:
        target ([`~transformers.PreTrainedConfig`]): The target's.
        recorded (`dict`): Fields of our configuration that were read; which target it is goes by them.
    """
    text = target.get_text_config()
    return {
        "target_num_layers": recorded.get("target_num_layers") or text.num_hidden_layers,
        "target_name_or_path": recorded.get("target_name_or_path") or target.name_or_path or None,
        "bos_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_id,
        "pad_token_id": text.pad_token_id,
    }


def usual_features(config: Mapping[str, Any]) -> list[int]:
    """The states that a drafter reads by these fields where a layout does not record it."""
    depth = config.get("target_num_layers")
    return list(default_feature_layers(depth)) if depth else [UNRECORDED_LAYER] * 3


def check_usual_features(config: Any, layout: str) -> None:
    """Refuse to write a drafter that reads other states into a layout that does not record them."""
    depth, layers = config.target_num_layers, tuple(config.feature_layers)
    if UNRECORDED_LAYER in layers or (depth is not None and layers == default_feature_layers(depth)):
        return
    raise ValueError(
        f"The layout {layout} does not record which states a drafter reads and means 2, N // 2 and N - 3 of N layers; "
        f"this drafter reads {list(layers)} of {depth or 'an unknown number'}, so keep it in our layout."
    )


def without_embedding(tensors: Tensors, key: str, config: Any, name: object) -> Tensors:
    """
    Drop a copy of the target's embedding: it is the target's at run time.

    Raises:
        ValueError: It is not of the configuration's size.
    """
    shape = (config.vocab_size, config.target_hidden_size)
    if key in tensors and tuple(tensors[key].shape) != shape:
        raise ValueError(
            f"{key} of {name} has the shape {tuple(tensors[key].shape)} and the target's embedding has {shape}; "
            "config.json and weights are not of one drafter."
        )
    return {other: value for other, value in tensors.items() if other != key}


def with_vocabulary(tensors: Tensors, config: Any) -> Tensors:
    """
    Add what a checkpoint leaves out of its draft vocabulary: all of it where a drafter can say every token, and `t2d`
    where it follows from `d2t`.
    """
    if "t2d" in tensors or ("d2t" not in tensors and config.draft_vocab_size != config.vocab_size):
        return tensors
    offsets = tensors.get("d2t", torch.zeros(config.vocab_size, dtype=torch.long))
    marks = torch.zeros(config.vocab_size, dtype=torch.bool)
    tokens = offsets.long() + torch.arange(len(offsets))
    marks[tokens.clamp(0, config.vocab_size - 1)] = True  # whoever loads them refuses offsets beyond it
    return tensors | {"d2t": offsets, "t2d": marks}


def write_folder(
    folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], mapping: Tensors | None = None
) -> None:
    """Write `config.json`, the weights and maybe `vocab_mapping.pt`: all of them, or nothing."""
    with save_folder_whole(folder, obsolete=WEIGHTS) as written:
        (written / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        weights = {key: value.contiguous() for key, value in tensors.items()}
        save_file(weights, written / "model.safetensors", metadata={"format": "pt"})
        if mapping is not None:
            torch.save(mapping, written / "vocab_mapping.pt")
