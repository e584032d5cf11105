# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Falcon's network (https://huggingface.co/papers/2412.12639, section 3.2) and nothing else: it knows no tree.

A *row* is the target's last state f_i, or the drafter's own prediction of it, and the embedding of the token that
followed. An LSTM reads the rows in their order; one Llama-type layer, whose attention is relaxed within blocks of k
rows, turns what it says into predicted states k positions on:

    s = LSTM([E x ; f]),   y = Layer(s),   logits = W_lm y

y_i stands for f_{i+k}, and its logits are about the token after that position, x_{i+k+1}. The last k rows, which all
see each other, thus predict the next k tokens and are, with these, the next k rows. A row sits at RoPE index i. Keys
and values depend on s alone, so that rows which predict nothing any more cost no attention.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from ...checkpoints.loading import StrictPreTrainedModel
from ...compat import CACHE
from ...devices import upload
from ..common.cache import BlockCache, backend_mask
from ..common.head import DraftHead
from .configuration import FalconDrafterConfig


Memory = tuple[torch.Tensor, torch.Tensor]
"""Of the LSTM: hidden and cell state of its layers, `[layers, rows, d]` each."""


class FalconModel(DraftHead, StrictPreTrainedModel):
    """
    The network: LSTM, one decoder layer, draft head.

    Args:
        config ([`FalconDrafterConfig`]): The drafter's configuration.
    """

    config_class = FalconDrafterConfig
    config: FalconDrafterConfig
    main_input_name = "states"
    _no_split_modules = ["LlamaDecoderLayer"]

    def __init__(self, config: FalconDrafterConfig):
        super().__init__(config)
        hidden = config.hidden_size
        self.lstm = nn.LSTM(2 * hidden, hidden, config.num_lstm_layers, batch_first=True)
        self.layers = nn.ModuleList([LlamaDecoderLayer(config, 0)])
        self.norm = nn.Identity()  # what is predicted are normed states
        self.lm_head = nn.Linear(hidden, config.draft_vocab_size, bias=False)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.register_draft_vocabulary()
        self.post_init()

    def no_memory(self, rows: int) -> Memory:
        """What the LSTM knows before a text."""
        shape = (self.config.num_lstm_layers, rows, self.config.hidden_size)
        return torch.zeros(2, *shape, dtype=self.dtype, device=self.device).unbind()

    def read(
        self,
        token_embeds: torch.Tensor,
        features: torch.Tensor,
        memory: Memory | None = None,
        lengths: torch.LongTensor | None = None,
    ) -> tuple[torch.Tensor, Memory]:
        """
        Run the LSTM over rows.

        Args:
            token_embeds (`torch.Tensor` of shape `[B, T, d]`): The target's embeddings of the tokens that followed.
            features (`torch.Tensor` of shape `[B, T, d]`): The target's last states, or predicted ones.
            memory (`tuple` of `torch.Tensor`, *optional*): What it knows of the rows before; nothing if not given.
            lengths (`torch.LongTensor` of shape `[B]`, *optional*): Valid rows, which may be none; all if not given.

        Returns:
            The states s `[B, T, d]`, anything behind a text's end, and the memory after its last valid row.
        """
        inputs = torch.cat([token_embeds, features], dim=-1)
        if lengths is None:
            return self.lstm(inputs, memory)
        lengths = lengths.cpu()
        # Sorted here, because torch would ask the device for the order that it made itself.
        order = lengths.argsort(descending=True)
        sort, unsort, some = (upload(part, inputs.device) for part in (order, order.argsort(), lengths[:, None] > 0))
        before = self.no_memory(len(inputs)) if memory is None else memory
        packed = pack_padded_sequence(inputs[sort], lengths[order].clamp_min(1), batch_first=True)
        states, after = self.lstm(packed, (before[0][:, sort], before[1][:, sort]))
        padded, _ = pad_packed_sequence(states, batch_first=True, total_length=inputs.shape[1])
        hidden, cell = (torch.where(some, new[:, unsort], old) for new, old in zip(after, before, strict=True))
        return padded[unsort], (hidden, cell)

    def forward(
        self,
        states: torch.Tensor,
        position_ids: torch.LongTensor,
        attention_mask: torch.BoolTensor,
        cache: BlockCache | None = None,
    ) -> torch.Tensor:
        """
        Predict the target's states k positions after rows.

        Args:
            states (`torch.Tensor` of shape `[B, R, d]`): As `read` returns them.
            position_ids (`torch.LongTensor` of shape `[B, R]`): Positions i.
            attention_mask (`torch.BoolTensor` of shape `[B or 1, 1, R, columns]`): True where a row sees a column.
            cache (`BlockCache`, *optional*): Where keys and values of earlier rows are, and these go.

        Returns:
            `torch.Tensor` of shape `[B, R, d]`.
        """
        attention_mask = backend_mask(attention_mask, self.config._attn_implementation, states.dtype)
        return self.layers[0](
            states,
            attention_mask=attention_mask,
            position_embeddings=self.rotary_emb(states, position_ids),
            **{CACHE: cache},
        )
