# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Medusa's heads (https://huggingface.co/papers/2401.10774, section 2.1) and nothing else: they know no tree.

From the state h that the target's own head reads at x_i, slot k predicts x_{i+2+k}:

    y_k = R_k(... R_k(h)),   R_k(h) = h + SiLU(A_k h + b_k),   logits_k = W_lm y_k

W_lm is the same for all slots. With A_k and b_k zero, which they start from, every slot says what W_lm makes of h.
"""

from __future__ import annotations

import torch
from torch import nn

from ...checkpoints.loading import StrictPreTrainedModel
from ..common.head import DraftHead
from .configuration import MedusaConfig


class MedusaBlock(nn.Linear):
    """A residual block."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[..., d]` to `[..., d]`."""
        return hidden + nn.functional.silu(super().forward(hidden))


class MedusaModel(DraftHead, StrictPreTrainedModel):
    """
    The network: residual blocks for every slot, one head for all.

    Args:
        config ([`MedusaConfig`]): The drafter's configuration.
    """

    config_class = MedusaConfig
    config: MedusaConfig
    main_input_name = "features"
    _no_split_modules = ["MedusaBlock"]

    def __init__(self, config: MedusaConfig):
        super().__init__(config)
        self.heads = nn.ModuleList(
            nn.Sequential(
                *(MedusaBlock(config.hidden_size, config.hidden_size) for _ in range(config.num_hidden_layers))
            )
            for _ in range(config.block_size)
        )
        self.norm = nn.Identity()  # the target's last state is normed
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.register_draft_vocabulary()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MedusaBlock):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """The target's last states `[..., d]` to `[..., K, d]`, as the head reads them."""
        return torch.stack([head(features) for head in self.heads], dim=-2)
