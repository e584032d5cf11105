# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Configuration of SpecBlock drafters."""

from __future__ import annotations

from ...checkpoints.card import Paper
from ..common.configuration import DrafterConfig


NUM_LISTED_LOG_PROBS = 10
"""Log-probabilities of the likeliest tokens that the rank head reads (section 3.2)."""


class SpecBlockConfig(DrafterConfig):
    r"""
    Configuration of a [`SpecBlockDrafter`] (SpecBlock, https://huggingface.co/papers/2605.07243). The decoder layers
    are Llama-type layers with the geometry of the target's; the fields of [`DrafterConfig`] keep their meaning.

    Args:
        block_size (`int`, *optional*, defaults to 4): K, the tokens that one drafter forward predicts (paper: 4).
        num_hidden_layers (`int`, *optional*, defaults to 2): Decoder layers of the drafter (paper: 2).
        num_rank_classes (`int`, *optional*, defaults to 4): Buckets of the rank head: rank 1, 2-4, 5-10, beyond
            (section 3.2).
        rank_hidden_size (`int`, *optional*, defaults to 256): Width of the rank head's hidden layer.
        rank_top_k (`int`, *optional*, defaults to 20): Logits that the rank head's features are computed from.
        num_blocks (`int`, *optional*, defaults to 2): M, drafter forwards that build one tree. Any value works at
            inference.
        branching (`list[int]`, *optional*, defaults to `[2, 4, 10, 0]`):
            Children of a slot for each predicted rank bucket, the greedy one counted; 0 gives up (section 3.2; the
            release's second map is `[2, 4, 6, 4]`).
        root_width (`int`, *optional*, defaults to 10): Children of the root, whatever its bucket.
        expansion (`str`, *optional*, defaults to `"rank_guided"`):
            How a block grows the tree: `"rank_guided"` (Algorithm 2 of the paper) or `"best_first"`, which gives
            children to the likeliest nodes, alternatives included, and leaves the rank head out.
        probability_cuts (`bool`, *optional*, defaults to `False`): Narrow confident slots as the authors' runner does.
        max_starts (`int`, *optional*): Most starts of a later block; `None` takes them all, as the release does.
        prefix_broadcast (`bool`, *optional*, defaults to `True`):
            Condition and token enter every slot and not only the first; `False` is an ablation of the paper's.
        layer_shift (`bool`, *optional*, defaults to `True`):
            Carry the state of the slot before into every slot between the layers; `False` is an ablation of the
            paper's.
        markov_rank (`int`, *optional*, defaults to 0):
            Rank of the Markov term, by which the token before shifts the logits of every slot but a block's first
            (DSpark; not in the paper); 0 for none. Trees that grow best-first then give every alternative children of
            its own, rank-guided ones read the term along their greedy chain.
        acceptance (`list[list[float]]`, *optional*):
            Measured tau of several plans, each row `[tree_budget, num_blocks, max_starts, tau, tau with look-ups]`
            with 0 starts for all; [`calibrate`] chooses among them.

    Example:

    ```python
    >>> from specblock_hf import SpecBlockConfig

    >>> config = SpecBlockConfig.for_target(target.config, draft_vocab_size=16384)
    ```
    """

    model_type = "specblock"
    paper = Paper(
        method="SpecBlock",
        key="specblock2026",
        title="SpecBlock: Block-Iterative Speculative Decoding with Dynamic Tree Drafting",
        arxiv="2605.07243",
        year=2026,
    )

    num_hidden_layers: int = 2
    block_size: int = 4
    num_rank_classes: int = 4
    rank_hidden_size: int = 256
    rank_top_k: int = 20
    num_blocks: int = 2
    branching: list[int] | None = None
    root_width: int = 10
    expansion: str = "rank_guided"
    probability_cuts: bool = False
    max_starts: int | None = None
    prefix_broadcast: bool = True
    layer_shift: bool = True
    markov_rank: int = 0

    def __post_init__(self, **kwargs):
        if self.branching is None:
            self.branching = [2, 4, 10, 0]
        super().__post_init__(**kwargs)
        if self.block_size < 1:
            raise ValueError(
                f"block_size is {self.block_size}; a forward predicts at least one token, so give 1 or more."
            )
        if self.expansion not in ("rank_guided", "best_first"):
            raise ValueError(f'expansion is {self.expansion!r}; trees grow "rank_guided" or "best_first".')
        if self.rank_top_k < NUM_LISTED_LOG_PROBS:
            raise ValueError(
                f"rank_top_k is {self.rank_top_k} but the rank head reads {NUM_LISTED_LOG_PROBS} log-probabilities; "
                f"give {NUM_LISTED_LOG_PROBS} or more (the paper's training: 20)."
            )
        if len(self.branching) != self.num_rank_classes:
            raise ValueError(
                f"branching has {len(self.branching)} entries but the rank head has {self.num_rank_classes} buckets; "
                "give one number of children per bucket."
            )
        self._check_widths()

    def _check_widths(self) -> None:
        for name, needed in (
            ("rank_top_k", self.rank_top_k),
            ("root_width", self.root_width),
            ("branching", max(self.branching)),
        ):
            if needed > self.draft_vocab_size:
                raise ValueError(
                    f"{name} asks for {needed} tokens of a slot but draft_vocab_size is {self.draft_vocab_size}; "
                    f"enlarge the draft vocabulary or lower {name}."
                )
