# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
The layer of SpecBlock's network. What other rows read of a slot are its keys and values, to which the last layer's
output adds nothing, and training wants that output of few slots: those of answers whose guesses before were right.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, eager_attention_forward, rotate_half

from ..common.cache import OpenBlock, backend_mask, keys_and_values


class SpecBlockLayer(LlamaDecoderLayer):
    """
    A Llama layer that also runs in two steps, `"open"` for the keys and values of all slots and `"read"` for the
    states of some. Both go through `forward`, because that is where a sharded layer has its weights.
    """

    def forward(self, hidden_states: torch.Tensor, step: Literal["all", "open", "read"] = "all", **kwargs: Any) -> Any:
        if step == "all":
            return super().forward(hidden_states, **kwargs)
        return (self._open if step == "open" else self._read)(hidden_states, **kwargs)

    def _open(
        self, hidden: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], cache: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`[B, S, d]` to what [`OpenBlock`] holds of keys and values."""
        attention, normed = self.self_attn, self.input_layernorm(hidden)
        return cache.update(*keys_and_values(attention, normed, position_embeddings), attention.layer_idx)

    def _read(
        self, hidden: torch.Tensor, block: OpenBlock, texts: torch.LongTensor, slots: torch.LongTensor
    ) -> torch.Tensor:
        """The states `[n, d]` of slots `[n]` in texts `[n]`, whose part of `block.hidden` is `[n, d]`."""
        attention, (batch, width) = self.self_attn, block.hidden.shape[:2]
        cos, sin = (part.flatten(0, 1) for part in block.position_embeddings)
        places = texts * width + slots
        query = attention.q_proj(self.input_layernorm(hidden)).unflatten(-1, (-1, attention.head_dim))
        query = query * cos[places].unsqueeze(1) + rotate_half(query) * sin[places].unsqueeze(1)
        # Attention wants as many queries of every text; all else is computed for those that there are.
        counts = texts.bincount(minlength=batch)
        most = max(int(counts.max()), 1)
        places = texts * most + torch.arange(len(texts), device=texts.device) - (counts.cumsum(0) - counts)[texts]
        padded = query.new_zeros(batch * most, *query.shape[1:]).index_copy(0, places, query)
        seen = block.visible(slots.new_zeros(batch * most).index_copy(0, places, slots).view(batch, most))
        implementation = attention.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        attended, _ = attend(
            attention,
            padded.view(batch, most, *query.shape[1:]).transpose(1, 2),
            block.keys,
            block.values,
            backend_mask(seen, implementation, query.dtype),
            dropout=attention.attention_dropout if self.training else 0.0,
            scaling=attention.scaling,
        )
        hidden = hidden + attention.o_proj(attended.flatten(2).flatten(0, 1).index_select(0, places))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))
