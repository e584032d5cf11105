# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What the configurations of drafters with Llama-type layers have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import LlamaConfig, PreTrainedConfig

from ...checkpoints.card import Paper
from ...checkpoints.configuration_checks import CheckedConfig


# What families call it that do not call it as Llama does.
_NAMES = {
    "intermediate_size": ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads"),
    "rms_norm_eps": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "max_position_embeddings": ("max_position_embeddings",),
}


UNRECORDED_LAYER = -1
"""Stands in `feature_layers` where a checkpoint does not say what it reads; see [`TreeDrafter.feature_layers_for`]."""


def default_feature_layers(num_layers: int) -> tuple[int, ...]:
    """What EAGLE-3 and SpecBlock read of a target of N layers: hidden states 2, N // 2 and N - 3, if it has these."""
    return (min(2, num_layers), num_layers // 2, max(num_layers - 3, 0))


def fields_for_target(target_config: PreTrainedConfig) -> dict[str, Any]:
    """
    What every drafter's configuration takes over from its target's, by whatever names it goes there: width, head
    geometry, RoPE base, special tokens. The layers stay Llama-type: RMSNorm, rotary positions, a gated SiLU.

    Args:
        target_config ([`~transformers.PreTrainedConfig`]): Of a decoder-only target.

    Raises:
        ValueError: The target's embedding is narrower than its states, or no rotary positions fit the heads.
    """
    text = target_config.get_text_config()
    refuse_projected_embedding(text)
    hidden, heads = text.hidden_size, text.num_attention_heads
    fields = {
        "vocab_size": text.vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": _head_dim(text),
        # None where the target has none: pipelines compare them.
        **{name: _first_of(text, (name,)) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "target_num_layers": text.num_hidden_layers,
        "target_name_or_path": target_config.name_or_path or None,
        "rope_parameters": {"rope_type": "default", "rope_theta": _rope_theta(text)},
    }
    fields |= {field: value for field, names in _NAMES.items() if (value := _first_of(text, names)) is not None}
    if isinstance(fields["intermediate_size"], list):  # one for each layer
        fields["intermediate_size"] = max(fields["intermediate_size"])
    if _first_of(text, ("multi_query",)) and not _first_of(text, ("new_decoder_architecture",)):
        fields["num_key_value_heads"] = 1  # whatever Falcon's num_kv_heads says
    return fields


def refuse_projected_embedding(text: PreTrainedConfig) -> None:
    """
    Args:
        text ([`~transformers.PreTrainedConfig`]): Of a target's decoder.

    Raises:
        ValueError: Its embedding is not as wide as its states, so that a drafter could not read both.
    """
    width = _first_of(text, ("word_embed_proj_dim",))
    if width not in (None, text.hidden_size):
        raise ValueError(
            f"The target's embedding is {width} wide and its states {text.hidden_size}, which no drafter here can "
            "read together; use a LookupDrafter, which reads neither."
        )


def _first_of(config: PreTrainedConfig, names: Sequence[str]) -> Any:
    """The first that is there and says something."""
    said = (getattr(config, name) for name in names if hasattr(config, name))
    return next((value for value in said if value is not None), None)


def _head_dim(text: PreTrainedConfig) -> int:
    """The share of the width that a head has, or the target's own where that is odd."""
    share, rest = divmod(text.hidden_size, text.num_attention_heads)
    size = share if rest == 0 and share % 2 == 0 else _first_of(text, ("head_dim",))
    if size is None or size % 2:
        raise ValueError(
            f"The target's {text.num_attention_heads} heads share a width of {text.hidden_size}, which leaves none an "
            "even size for rotary positions; pass num_attention_heads and head_dim."
        )
    return size


def _rope_theta(text: PreTrainedConfig) -> float:
    """The base of the layers that see the whole text; that of Llama's without rotary positions."""
    rope = _first_of(text, ("rope_parameters",)) or {}
    return (rope.get("full_attention") or rope).get("rope_theta", 10000.0)


# By a name of its own, or mypy would take these fields for all that a configuration is made of.
_fields = dataclass(kw_only=True, repr=False, eq=False)


@_fields
class DrafterFields(CheckedConfig):
    """What the configuration of every drafter says, whatever its layers; see [`DrafterConfig`] for the fields."""

    num_blocks = 1  # forwards of a round
    paper: ClassVar[Paper | None] = None  # what cards cite

    feature_layers: list[int] | None = None
    target_hidden_size: int | None = None
    target_num_layers: int | None = None
    target_name_or_path: str | None = None
    chat_template: str | None = None
    thinking: bool | None = None
    tree_budget: int = 60
    acceptance: list[list[float]] | None = None

    def __post_init__(self: Any, **kwargs):
        if self.target_hidden_size is None:
            self.target_hidden_size = self.hidden_size
        if self.feature_layers is None:
            self.feature_layers = self.usual_feature_layers(self.target_num_layers)
        super().__post_init__(**kwargs)

    def usual_feature_layers(self, num_layers: int | None) -> list[int]:
        """What the drafter reads of a target of N layers if nothing else is said; `None` for an unknown N."""
        return [UNRECORDED_LAYER] * 3 if num_layers is None else list(default_feature_layers(num_layers))

    def refuse_other_embedding(self: Any) -> None:
        """
        For drafters that may have an embedding of their own.

        Raises:
            ValueError: They have none and are not as wide as the target, whose embedding they read.
        """
        if self.hidden_size != self.target_hidden_size and not self.own_embedding:
            raise ValueError(
                f"The target's embedding is {self.target_hidden_size} wide and the drafter's states "
                f"{self.hidden_size}; a drafter of another width needs own_embedding=True."
            )

    def refuse_several_layers(self: Any, one: str) -> None:
        """
        For drafters of one layer, of which `one` says that.

        Raises:
            ValueError: There are more.
        """
        if self.num_hidden_layers != 1:
            raise ValueError(
                f"{one} and num_hidden_layers is {self.num_hidden_layers}; drafters of several are not supported."
            )


class DrafterConfig(DrafterFields, LlamaConfig):
    r"""
    Base of the configurations of drafters that are made of Llama-type layers and a head over a part of the target's
    vocabulary; every field of [`~transformers.LlamaConfig`] keeps its meaning.

    Args:
        vocab_size (`int`): The **target's** vocabulary, which `generate()` compares with the target's own.
        num_hidden_layers (`int`, *optional*, defaults to 1): Layers of the drafter.
        draft_vocab_size (`int`, *optional*, defaults to 32000): Rows of the drafter's own head.
        feature_layers (`list[int]`, *optional*):
            Indices into the target's `hidden_states` (0 is the embedding, i the output of layer i - 1). Defaults to
            `[2, N // 2, N - 3]` for a target of N layers; -1 where N is not known before the target is.
        target_hidden_size (`int`, *optional*, defaults to `hidden_size`): Width of the target's states.
        target_num_layers (`int`, *optional*): N, to refuse a target of another depth.
        target_name_or_path (`str`, *optional*): The target that the drafter was trained for.
        chat_template (`str`, *optional*): Of the prompts that it was trained behind; see [`PromptStyle`].
        thinking (`bool`, *optional*): Whether the target thought before the answers that it was trained on.
        tree_budget (`int`, *optional*, defaults to 60): Most drafted nodes of a tree.
        acceptance (`list[list[float]]`, *optional*):
            Measured tau of several plans, in the rows that [`SpecBlockConfig`] describes.
    """

    vocab_size: int = 32000
    num_hidden_layers: int = 1
    draft_vocab_size: int = 32000

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.draft_vocab_size > self.vocab_size:
            raise ValueError(
                f"draft_vocab_size ({self.draft_vocab_size}) is larger than the target's vocab_size "
                f"({self.vocab_size}); pass a draft vocabulary that is a subset of the target's."
            )

    def refuse_other_width(self) -> None:
        """
        For drafters that read the target's embedding.

        Raises:
            ValueError: The drafter is not as wide as the target.
        """
        if self.hidden_size != self.target_hidden_size:
            raise ValueError(
                f"The target's states are {self.target_hidden_size} wide and the drafter's {self.hidden_size}; a "
                f"{self.model_type} drafter is as wide as its target."
            )

    @classmethod
    def for_target(cls, target_config: PreTrainedConfig, **overrides) -> DrafterConfig:
        """
        The default drafter for a target: its width, head geometry, RoPE base and special tokens.

        Args:
            target_config ([`~transformers.PreTrainedConfig`]): Of a decoder-only target.
            **overrides: Any field of this class.
        """
        fields = fields_for_target(target_config)
        fields["draft_vocab_size"] = min(32000, fields["vocab_size"])
        return cls(**(fields | overrides))


class LastStateConfig(DrafterConfig):
    """Base of the configurations of drafters that read the target's last state alone, the one that its head reads."""

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.refuse_other_width()
        if len(self.feature_layers) != 1:
            raise ValueError(
                f"feature_layers is {self.feature_layers}; a {self.model_type} drafter reads one state of the target."
            )

    def usual_feature_layers(self, num_layers: int | None) -> list[int]:
        return [UNRECORDED_LAYER if num_layers is None else num_layers]
