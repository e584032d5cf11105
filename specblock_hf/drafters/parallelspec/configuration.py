# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The configuration of ParallelSpec drafters."""

from __future__ import annotations

from ...checkpoints.card import Paper
from ..common.configuration import DrafterConfig


class ParallelSpecConfig(DrafterConfig):
    r"""
    Configuration of a [`ParallelSpecDrafter`] (ParallelSpec, https://huggingface.co/papers/2410.05589): one Llama-type
    layer, so every field of [`~transformers.LlamaConfig`] keeps its meaning.

    Args:
        vocab_size (`int`): The **target's** vocabulary, which `generate()` compares with the target's own.
        draft_vocab_size (`int`, *optional*, defaults to 32000): Rows of the drafter's own head.
        block_size (`int`, *optional*, defaults to 5): K, the tokens that one forward predicts with K - 1 masks.
        feature_layers (`list[int]`, *optional*):
            Indices into the target's `hidden_states` (0 is the embedding, i the output of layer i - 1). Defaults to
            `[2, N // 2, N - 3]` for a target of N layers, as for EAGLE-3.
        target_hidden_size (`int`, *optional*, defaults to `hidden_size`): Width of the target's states, the same.
        target_num_layers (`int`, *optional*): N, to refuse a target of another depth.
        target_name_or_path (`str`, *optional*): The target that the drafter was trained for.
        tree_width (`int`, *optional*, defaults to 10): Most children of a node.
        tree_budget (`int`, *optional*, defaults to 60): Most drafted nodes of a tree.
        acceptance (`list[list[float]]`, *optional*):
            Measured tau of several plans, in the rows that [`SpecBlockConfig`] describes.

    Example:

    ```python
    >>> from specblock_hf.drafters.parallelspec import ParallelSpecConfig

    >>> config = ParallelSpecConfig.for_target(target.config, draft_vocab_size=16384)
    ```
    """

    model_type = "parallelspec"
    paper = Paper(
        method="ParallelSpec",
        key="parallelspec2024",
        title="ParallelSpec: Parallel Drafter for Efficient Speculative Decoding",
        arxiv="2410.05589",
        year=2024,
    )
    # Of an EAGLE-3 network's variants, none.
    norm_before_residual = norm_before_fc = fc_norm = norm_output = qk_norm = own_embedding = False

    block_size: int = 5
    tree_width: int = 10

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.refuse_other_width()
        if self.block_size < 2:
            raise ValueError(f"block_size is {self.block_size}; a group has at least one mask, so give 2 or more.")
        if self.tree_width < 1:
            raise ValueError(f"tree_width is {self.tree_width}; a node gets at least 1 child, so give 1 or more.")
        self.refuse_several_layers("A ParallelSpec drafter has one layer")
