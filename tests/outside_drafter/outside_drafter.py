# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""A drafter of somebody else's package: a linear map from the target's last state to the states of the next tokens."""

import torch
from torch import nn

from specblock_hf import register_drafter
from specblock_hf.checkpoints.loading import StrictPreTrainedModel
from specblock_hf.drafters.common.configuration import LastStateConfig
from specblock_hf.drafters.common.head import DraftHead
from specblock_hf.drafters.common.network import NetworkDrafter
from specblock_hf.drafters.common.slot_loss import guesses, score_slots, weighted_loss
from specblock_hf.drafting.drafter import DraftState


class LinearConfig(LastStateConfig):
    model_type = "linear_drafter"
    block_size: int = 3  # tokens that a forward predicts
    tree_width: int = 4  # alternatives for each


class LinearDrafter(NetworkDrafter, DraftHead, StrictPreTrainedModel):
    config_class = LinearConfig
    base_model_prefix = ""

    def __init__(self, config):
        super().__init__(config)
        self.slots = nn.Linear(config.hidden_size, config.block_size * config.hidden_size, bias=False)
        self.norm = nn.Identity()  # the target's last state is normed
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.register_draft_vocabulary()
        self.post_init()

    def get_input_embeddings(self):
        return None  # no token is read

    def forward(self, features):  # [..., d] to [..., K, d]
        return features.unsqueeze(-2) + self.slots(features).unflatten(-1, (self.config.block_size, -1))

    def begin(self, table, batch_size, max_length, *, first_position=0):
        return DraftState(table, batch_size, max_length, first_position=first_position)

    def extend(self, state, pairs):
        pass  # the last state has read the text

    def propose(self, state, pairs, limits):
        rows = torch.arange(len(pairs.lengths), device=pairs.features[0].device)
        last = pairs.features[0][rows, (pairs.lengths - 1).clamp_min(0)].unsqueeze(1)
        return self.product_tree(self.root_of(pairs), self(last.to(self.device, self.dtype)), limits)

    def loss(self, batch, objective=None, *, progress=1.0, generator=None):
        hidden = self(batch.features[:, :-1])
        sums = score_slots(self, batch, hidden, torch.arange(hidden.shape[1], device=hidden.device))
        return {"loss": weighted_loss(sums, 0.8)} | guesses(sums, self.config.block_size)


register_drafter(LinearConfig, LinearDrafter)
