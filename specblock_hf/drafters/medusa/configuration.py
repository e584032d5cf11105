# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The configuration of Medusa drafters."""

from __future__ import annotations

from ...checkpoints.card import Paper
from ..common.configuration import LastStateConfig


class MedusaConfig(LastStateConfig):
    r"""
    Configuration of a [`MedusaDrafter`] (Medusa, https://huggingface.co/papers/2401.10774). It has no attention, so
    that of [`~transformers.LlamaConfig`] only `hidden_size` and `initializer_range` matter.

    Args:
        vocab_size (`int`): The **target's** vocabulary, which `generate()` compares with the target's own.
        draft_vocab_size (`int`, *optional*, defaults to 32000): Rows of the head that all offsets share.
        block_size (`int`, *optional*, defaults to 5): K, the offsets that are predicted (paper: five heads).
        num_hidden_layers (`int`, *optional*, defaults to 1): Residual blocks of every offset (paper: 1).
        feature_layers (`list[int]`, *optional*):
            Index of one of the target's `hidden_states`. Defaults to the last one, which the target's head reads.
        target_hidden_size (`int`, *optional*, defaults to `hidden_size`): Width of the target's states, the same.
        target_num_layers (`int`, *optional*): N, to refuse a target of another depth.
        target_name_or_path (`str`, *optional*): The target that the drafter was trained for.
        tree_width (`int`, *optional*, defaults to 10): Most children of a node (the authors' trees: 10).
        tree_budget (`int`, *optional*, defaults to 63):
            Most drafted nodes of a tree (the authors' trees have 64 with the root).
        acceptance (`list[list[float]]`, *optional*):
            Measured tau of several plans, in the rows that [`SpecBlockConfig`] describes.

    Example:

    ```python
    >>> from specblock_hf.drafters.medusa import MedusaConfig

    >>> config = MedusaConfig.for_target(target.config, draft_vocab_size=16384)
    ```
    """

    model_type = "medusa"
    paper = Paper(
        method="Medusa",
        key="cai2024medusa",
        title="Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads",
        authors=(
            "Cai, Tianle and Li, Yuhong and Geng, Zhengyang and Peng, Hongwu and Lee, Jason D. and Chen, "
            "Deming and Dao, Tri"
        ),
        arxiv="2401.10774",
        year=2024,
    )
    attends = False

    block_size: int = 5
    tree_width: int = 10
    tree_budget: int = 63

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.block_size < 1:
            raise ValueError(f"block_size is {self.block_size}; at least one token is predicted, so give 1 or more.")
        if self.tree_width < 1:
            raise ValueError(f"tree_width is {self.tree_width}; a node gets at least 1 child, so give 1 or more.")
