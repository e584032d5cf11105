# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
The ParallelSpec network (https://huggingface.co/papers/2410.05589) on the layer of EAGLE-3, and nothing else: it knows
no tree.

A group is a committed pair and K - 1 masks. The pair's row reads, as in EAGLE-3, its features and the token that
followed; mask k reads a learned vector in place of the token, one for each k, and a learned vector in place of the
features, the same for all. Row k of pair i sits at RoPE index i + k and predicts the token after the next k. It sees
the rows of the pairs up to i and the masks of its own group up to its own.
"""

from __future__ import annotations

from torch import nn

from ..eagle3.modeling import Eagle3Model
from .configuration import ParallelSpecConfig


class ParallelSpecModel(Eagle3Model):
    """
    The network: that of EAGLE-3, and the masks.

    Args:
        config ([`ParallelSpecConfig`]): The drafter's configuration.
    """

    config_class = ParallelSpecConfig
    config: ParallelSpecConfig

    def __init__(self, config: ParallelSpecConfig):
        super().__init__(config)
        self.mask_embeds = nn.Embedding(config.block_size - 1, config.hidden_size)
        self.mask_condition = nn.Embedding(1, config.hidden_size)
        self.post_init()
