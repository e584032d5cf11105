# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
The EAGLE-3 network (https://huggingface.co/papers/2503.01840) and nothing else: it knows no tree.

A *row* is a condition `c` (target features projected to the drafter's width, or the drafter's own state of the row
before it) and the token `x` that followed. One forward turns every row into the prediction of the token after `x`:

    h = c + Attention([norm_in(E x) ; norm_c(c)]),   y = h + MLP(norm_post(h)),   logits = W_lm norm(y)

y, not normed, is the condition of the next row. A row at position i sits at RoPE index i. With
`norm_before_residual` the first sum starts from norm_c(c); with `norm_output` the next row reads norm(y).
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import Qwen3Config
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from ...checkpoints.loading import StrictPreTrainedModel
from ...compat import CACHE
from ...drafting.pairs import TokenTable
from ..common.cache import BlockCache, keys_and_values, masked_or_causal
from ..common.head import DraftHead
from ..common.path_attention import PathCache
from .configuration import Eagle3Config


def attention_of(config: Eagle3Config) -> nn.Module:
    """Llama's attention, or Qwen3's, which norms queries and keys."""
    if not config.qk_norm:
        return LlamaAttention(config, layer_idx=0)
    # Which takes its sizes from a configuration of its own kind, and what it is run with from ours.
    sizes = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "attention_bias")
    attention = Qwen3Attention(Qwen3Config(**{name: getattr(config, name) for name in sizes}), layer_idx=0)
    attention.config = config
    return attention


class Eagle3Layer(nn.Module):
    """The decoder layer; its queries, keys and values read token and condition side by side."""

    def __init__(self, config: Eagle3Config):
        super().__init__()
        hidden, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        self.norm_before_residual = config.norm_before_residual
        self.input_layernorm = LlamaRMSNorm(hidden, eps=config.rms_norm_eps)
        self.hidden_norm = LlamaRMSNorm(hidden, eps=config.rms_norm_eps)
        self.self_attn = attention_of(config)
        self.self_attn.q_proj = nn.Linear(2 * hidden, heads * config.head_dim, bias=bias)
        self.self_attn.k_proj = nn.Linear(2 * hidden, config.num_key_value_heads * config.head_dim, bias=bias)
        self.self_attn.v_proj = nn.Linear(2 * hidden, config.num_key_value_heads * config.head_dim, bias=bias)
        self.post_attention_layernorm = LlamaRMSNorm(hidden, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(
        self,
        token_embeds: torch.Tensor,
        conditions: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        cache: BlockCache | PathCache | None,
    ) -> torch.Tensor:
        """`[B, R, d]` and `[B, R, d]` to `[B, R, d]`."""
        inputs, normed = self._inputs(token_embeds, conditions)
        if isinstance(cache, PathCache) and cache.holds_pairs:
            attended = self._attend_on_path(inputs, position_embeddings, cache)
        else:
            attended, _ = self.self_attn(
                hidden_states=inputs,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                **{CACHE: cache},
            )
        hidden = (normed if self.norm_before_residual else conditions) + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    def keep_keys(
        self,
        token_embeds: torch.Tensor,
        conditions: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        cache: BlockCache,
    ) -> None:
        """What rows leave in the cache, and nothing else."""
        attention, (inputs, _) = self.self_attn, self._inputs(token_embeds, conditions)
        norm = [attention.k_norm] if attention.config.qk_norm else []
        cache.update(*keys_and_values(attention, inputs, position_embeddings, *norm), attention.layer_idx)

    def _inputs(self, token_embeds: torch.Tensor, conditions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What attention reads `[B, R, 2 d]`, and the normed conditions."""
        normed = self.hidden_norm(conditions)
        return torch.cat([self.input_layernorm(token_embeds), normed], dim=-1), normed

    def _attend_on_path(
        self, inputs: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], cache: PathCache
    ) -> torch.Tensor:
        attention = self.self_attn
        heads = (*inputs.shape[:-1], -1, attention.head_dim)
        query, keys, values = (
            project(inputs).view(heads) for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if attention.config.qk_norm:
            query, keys = attention.q_norm(query), attention.k_norm(keys)
        query, keys, values = (part.transpose(1, 2) for part in (query, keys, values))
        query, keys = apply_rotary_pos_emb(query, keys, *position_embeddings)
        cache.update(keys, values, attention.layer_idx)
        return attention.o_proj(cache.attend(query, attention.scaling))


class Eagle3Model(DraftHead, StrictPreTrainedModel):
    """
    The network: projection of the features, one layer, draft head. Weight names are those of `speculators`.

    Args:
        config ([`Eagle3Config`]): The drafter's configuration.
    """

    config_class = Eagle3Config
    config: Eagle3Config
    main_input_name = "token_embeds"
    _no_split_modules = ["Eagle3Layer"]

    def __init__(self, config: Eagle3Config):
        super().__init__(config)
        features = len(config.feature_layers) * config.target_hidden_size
        if config.own_embedding:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.norm_before_fc:
            self.input_norm = LlamaRMSNorm(features, eps=config.rms_norm_eps)
        if config.fc_norm:
            width, count = config.target_hidden_size, len(config.feature_layers)
            self.fc_norm = nn.ModuleList(LlamaRMSNorm(width, eps=config.rms_norm_eps) for _ in range(count))
        self.fc = nn.Linear(features, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([Eagle3Layer(config)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.register_draft_vocabulary()
        self.post_init()

    def own_table(self, table: TokenTable) -> TokenTable:
        if not self.config.own_embedding:
            return table
        return TokenTable(self.embed_tokens, table.output_head, table.vocab_size)

    def project_features(self, features: torch.Tensor) -> torch.Tensor:
        """Target features `[..., F * d_target]`, in the order of `feature_layers`, to conditions `[..., d]`."""
        if self.config.norm_before_fc:
            features = self.input_norm(features)
        if self.config.fc_norm:
            parts = features.chunk(len(self.fc_norm), dim=-1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(features)

    def draft_logits(
        self, hidden: torch.Tensor, before: torch.LongTensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As [`~DraftHead.draft_logits`], of what `forward` returns."""
        return (hidden, self.lm_head(hidden)) if self.config.norm_output else super().draft_logits(hidden, before)

    def forward(
        self,
        token_embeds: torch.Tensor,
        conditions: torch.Tensor,
        position_ids: torch.LongTensor,
        attention_mask: torch.BoolTensor | None = None,
        cache: BlockCache | PathCache | None = None,
    ) -> torch.Tensor:
        """
        Predict one token for every row.

        Args:
            token_embeds (`torch.Tensor` of shape `[B, R, d]`): The embedding of each row's token.
            conditions (`torch.Tensor` of shape `[B, R, d]`):
                `project_features(...)` of a committed pair; what this method returned for the parent in a tree.
            position_ids (`torch.LongTensor` of shape `[B, R]`): Position i of a pair, one more for every level below.
            attention_mask (`torch.BoolTensor` of shape `[B, 1, R, columns]`, *optional*):
                True where a row sees a column. Without one, attention is causal.
            cache (`BlockCache` or `PathCache`, *optional*):
                Where keys and values of earlier rows are, and these go. In a `PathCache` that holds the pairs, row i
                is the next one of pair i's path, and no mask is asked for.

        Returns:
            `torch.Tensor` of shape `[B, R, 1, d]`: The states before the final norm, or after it with `norm_output`,
            as a block of one slot.
        """
        on_path = isinstance(cache, PathCache) and cache.holds_pairs
        if not on_path:
            implementation, rows = self.config._attn_implementation, token_embeds.shape[1]
            attention_mask = masked_or_causal(attention_mask, implementation, rows, token_embeds)
        position_embeddings = self.rotary_emb(token_embeds, position_ids)
        hidden = self.layers[0](token_embeds, conditions, position_embeddings, attention_mask, cache)
        return (self.norm(hidden) if self.config.norm_output else hidden).unsqueeze(2)

    def keep_keys(
        self,
        token_embeds: torch.Tensor,
        conditions: torch.Tensor,
        position_ids: torch.LongTensor,
        attention_mask: torch.BoolTensor | None,
        cache: BlockCache,
    ) -> None:
        """[`Eagle3Model.forward`], whose arguments these are, of rows of which nobody reads the states."""
        self.layers[0].keep_keys(token_embeds, conditions, self.rotary_emb(token_embeds, position_ids), cache)
