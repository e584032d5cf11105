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
"""What the configurations of drafters with Llama-type layers have in common."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, PreTrainedConfig

from .drafter import UNRECORDED_LAYER, default_feature_layers


def fields_for_target(target_config: PreTrainedConfig) -> dict[str, Any]:
    """
    What every drafter's configuration takes over from its target's: width, head geometry, RoPE base, special tokens.

    Args:
        target_config ([`~transformers.PreTrainedConfig`]): Of a decoder-only target.
    """
    text = target_config.get_text_config()
    fields = {
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "rms_norm_eps": text.rms_norm_eps,
        "max_position_embeddings": text.max_position_embeddings,
        "target_num_layers": text.num_hidden_layers,
        "target_name_or_path": target_config.name_or_path or None,
        "bos_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_id,
        "pad_token_id": text.pad_token_id,
    }
    if text.hidden_size % text.num_attention_heads == 0:
        fields["head_dim"] = text.hidden_size // text.num_attention_heads
    theta = (text.rope_parameters or {}).get("rope_theta", 10000.0)
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    return fields


class DrafterConfig(LlamaConfig):
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
        tree_budget (`int`, *optional*, defaults to 60): Most drafted nodes of a tree.
        acceptance (`list[list[float]]`, *optional*):
            Measured tau of several plans, in the rows that [`SpecBlockConfig`] describes.
    """

    vocab_size: int = 32000
    num_hidden_layers: int = 1
    draft_vocab_size: int = 32000
    feature_layers: list[int] | None = None
    target_hidden_size: int | None = None
    target_num_layers: int | None = None
    target_name_or_path: str | None = None
    tree_budget: int = 60
    acceptance: list[list[float]] | None = None

    def __post_init__(self, **kwargs):
        if self.target_hidden_size is None:
            self.target_hidden_size = self.hidden_size
        if self.feature_layers is None:
            self.feature_layers = self.usual_feature_layers(self.target_num_layers)
        super().__post_init__(**kwargs)
        if self.draft_vocab_size > self.vocab_size:
            raise ValueError(
                f"draft_vocab_size ({self.draft_vocab_size}) is larger than the target's vocab_size "
                f"({self.vocab_size}); pass a draft vocabulary that is a subset of the target's."
            )

    @staticmethod
    def usual_feature_layers(num_layers: int | None) -> list[int]:
        """What the drafter reads of a target of N layers if nothing else is said; `None` for an unknown N."""
        return [UNRECORDED_LAYER] * 3 if num_layers is None else list(default_feature_layers(num_layers))

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

    @staticmethod
    def usual_feature_layers(num_layers: int | None) -> list[int]:
        return [UNRECORDED_LAYER if num_layers is None else num_layers]


__all__ = ["DrafterConfig", "LastStateConfig"]
