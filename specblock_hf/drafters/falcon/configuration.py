# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The configuration of Falcon drafters."""

from __future__ import annotations

from ...checkpoints.card import Paper
from ..common.configuration import LastStateConfig


# How often the target's token has rank 1, 2, ... of the drafter's distribution: the frequencies that the SpecBlock
# paper finds for its rank buckets (75.2, 15.0 and 4.1 percent), made to fall within a bucket too.
RANK_WEIGHTS = (0.752, 0.08, 0.045, 0.025, 0.012, 0.009, 0.007, 0.005, 0.004, 0.004)


class FalconDrafterConfig(LastStateConfig):
    r"""
    Configuration of a [`FalconDrafter`] (Falcon, https://huggingface.co/papers/2412.12639): LSTM layers and one
    Llama-type layer, so every field of [`~transformers.LlamaConfig`] keeps its meaning.

    Args:
        vocab_size (`int`): The **target's** vocabulary, which `generate()` compares with the target's own.
        draft_vocab_size (`int`, *optional*, defaults to 32000): Rows of the drafter's own head.
        block_size (`int`, *optional*, defaults to 2): k, the tokens that one forward predicts (paper: 2).
        num_lstm_layers (`int`, *optional*, defaults to 2): Layers of the LSTM below the attention (paper: 2).
        feature_layers (`list[int]`, *optional*):
            Index of one of the target's `hidden_states`. Defaults to the last one, which the target's head reads.
        target_hidden_size (`int`, *optional*, defaults to `hidden_size`): Width of the target's states, the same.
        target_num_layers (`int`, *optional*): N, to refuse a target of another depth.
        target_name_or_path (`str`, *optional*): The target that the drafter was trained for.
        num_blocks (`int`, *optional*, defaults to 4): Forwards that draft a tree (paper: 4).
        rank_weights (`list[float]`, *optional*):
            What the static tree is built from: how likely the target's token is the first, second, ... child of a
            node. The tree holds the likeliest paths. Defaults to ten weights from the SpecBlock paper's ranks.
        tree_budget (`int`, *optional*, defaults to 60): Most drafted nodes of a tree.
        acceptance (`list[list[float]]`, *optional*):
            Measured tau of several plans, in the rows that [`SpecBlockConfig`] describes.

    Example:

    ```python
    >>> from specblock_hf.drafters.falcon import FalconDrafterConfig

    >>> config = FalconDrafterConfig.for_target(target.config, draft_vocab_size=16384)
    ```
    """

    model_type = "falcon_drafter"  # "falcon" is a language model of transformers
    paper = Paper(
        method="Falcon",
        key="gao2024falcon",
        title=(
            "Falcon: Faster and Parallel Inference of Large Language Models through Enhanced Semi-"
            "Autoregressive Drafting and Custom-Designed Decoding Tree"
        ),
        authors="Gao, Xiangxiang and Xie, Weisheng and Xiang, Yiwei and Ji, Feng",
        arxiv="2412.12639",
        year=2024,
    )

    block_size: int = 2
    num_lstm_layers: int = 2
    num_blocks: int = 4
    rank_weights: list[float] | None = None

    def __post_init__(self, **kwargs):
        if self.rank_weights is None:
            self.rank_weights = list(RANK_WEIGHTS)
        super().__post_init__(**kwargs)
        if self.block_size < 2:
            raise ValueError(
                f"block_size is {self.block_size}; the rows of a block look at each other, so give 2 or more."
            )
        self.refuse_several_layers("A Falcon drafter has one attention layer")
        weights = self.rank_weights
        if not weights or weights != sorted(weights, reverse=True) or not 0 < weights[-1] <= weights[0] <= 1:
            raise ValueError(
                f"rank_weights is {weights}; give probabilities of the first, second, ... child, none above the one "
                "before it."
            )
        if len(weights) > self.draft_vocab_size:
            raise ValueError(
                f"rank_weights has {len(weights)} entries but draft_vocab_size is {self.draft_vocab_size}; "
                "give fewer weights or enlarge the draft vocabulary."
            )
