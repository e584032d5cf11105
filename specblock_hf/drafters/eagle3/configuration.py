# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Configuration of EAGLE-3 drafters."""

from __future__ import annotations

from ...checkpoints.card import Paper
from ..common.configuration import DrafterConfig


class Eagle3Config(DrafterConfig):
    r"""
    Configuration of an [`Eagle3Drafter`] (EAGLE-3, https://huggingface.co/papers/2503.01840): one Llama-type layer, so
    every field of [`~transformers.LlamaConfig`] keeps its meaning. The tree's defaults are those of the authors' code.

    Args:
        vocab_size (`int`): The **target's** vocabulary, which `generate()` compares with the target's own.
        draft_vocab_size (`int`, *optional*, defaults to 32000): Rows of the drafter's own head.
        feature_layers (`list[int]`, *optional*):
            Indices into the target's `hidden_states` (0 is the embedding, i the output of layer i - 1). Defaults to
            `[2, N // 2, N - 3]` for a target of N layers; -1 where N is not known before the target is.
        target_hidden_size (`int`, *optional*, defaults to `hidden_size`): Width of the target's states.
        target_num_layers (`int`, *optional*): N, to refuse a target of another depth.
        target_name_or_path (`str`, *optional*): The target that the drafter was trained for.
        norm_before_residual (`bool`, *optional*, defaults to `False`):
            The residual is the normed condition (`speculators` checkpoints).
        norm_before_fc (`bool`, *optional*, defaults to `False`):
            The features are normed together before they are projected (`speculators` checkpoints for gpt-oss).
        fc_norm (`bool`, *optional*, defaults to `False`):
            Each feature is normed for itself before they are projected (EAGLE-3.1).
        norm_output (`bool`, *optional*, defaults to `False`):
            The next row of a path reads the normed state, the one that the head reads (EAGLE-3.1).
        qk_norm (`bool`, *optional*, defaults to `False`):
            Queries and keys are normed head by head, as Qwen3 does (DeepSpec's checkpoints).
        own_embedding (`bool`, *optional*, defaults to `False`):
            The drafter has a trained embedding and does not read the target's.
        num_blocks (`int`, *optional*, defaults to 8):
            Levels of the tree, a drafter forward each (the authors' `depth` 7 counts those after the first). Where
            nothing else is said; see `DraftingPlan`.
        beam_width (`int`, *optional*, defaults to 10):
            Children of a node, and nodes of a level that get children (the authors' `top_k`).
        tree_budget (`int`, *optional*, defaults to 59):
            Most drafted nodes of a tree (the authors' `total_token` 60 counts the root).
        acceptance (`list[list[float]]`, *optional*):
            Measured tau of several plans, in the rows that [`SpecBlockConfig`] describes.

    Example:

    ```python
    >>> from specblock_hf import AutoDrafter

    >>> drafter = AutoDrafter.from_pretrained("yuhuili/EAGLE3-LLaMA3.1-Instruct-8B")
    >>> drafter.config.beam_width
    10
    ```
    """

    model_type = "eagle3"
    paper = Paper(
        method="EAGLE-3",
        key="li2025eagle3",
        title="EAGLE-3: Scaling up Inference Acceleration of Large Language Models via Training-Time Test",
        authors="Li, Yuhui and Wei, Fangyun and Zhang, Chao and Zhang, Hongyang",
        arxiv="2503.01840",
        year=2025,
    )
    block_size = 1  # tokens that one forward predicts: what this drafter shares with SpecBlock is counted in blocks

    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    qk_norm: bool = False
    own_embedding: bool = False
    num_blocks: int = 8
    beam_width: int = 10
    tree_budget: int = 59

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.refuse_several_layers("An EAGLE-3 drafter has one layer")
        self.refuse_other_embedding()
        if self.norm_before_fc and self.fc_norm:
            raise ValueError("norm_before_fc and fc_norm norm the same features; set one of them.")
