# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
The SpecBlock network (https://huggingface.co/papers/2605.07243, sections 3.1 and 3.2) and nothing else: it knows no
tree.

A *row* is one starting point: a condition `c` (target features, or the drafter's own state of an earlier slot) and
the token `x`
that followed. One forward turns every row into K slots that predict the K tokens after `x`:

    z_k = W_f [norm_c(c) ; norm_t(E x) ; norm_q(Q_k)]                     prefix broadcast: c and x are the same for
    every k
    x^1 = Layer_1(z),   x^l = Layer_l(W_s [x^{l-1}_k ; x^{l-1}_{k-1}])    layer-wise shift, with x_{-1} := x_0
    logits_k = W_lm norm(x_k),   rank_k = MLP([norm(x_k) ; phi_k])

With a Markov term the logits of every slot but the first gain W_2 W_1[token before], and phi is taken from the sum.

Slot k of the row at position i sits at RoPE index i + 1 + k, in every block. Keys are laid out row-major, slot by
slot, so that
"all slots of earlier rows and the slots up to one's own" is plain causal attention over the flattened slots.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from ...checkpoints.loading import StrictPreTrainedModel
from ...compat import CACHE
from ..common.cache import BlockCache, GraphCache, OpenBlock, masked_or_causal
from ..common.head import DraftHead, MarkovHead
from .configuration import NUM_LISTED_LOG_PROBS, SpecBlockConfig
from .layer import SpecBlockLayer


NUM_RANK_FEATURES = NUM_LISTED_LOG_PROBS + 5


class SpecBlockInput(nn.Module):
    """Builds the slots' inputs. Weight names are the authors'."""

    def __init__(self, config: SpecBlockConfig):
        super().__init__()
        hidden = config.hidden_size
        self.condition_proj = nn.Linear(len(config.feature_layers) * config.target_hidden_size, hidden, bias=False)
        self.condition_norm = LlamaRMSNorm(hidden, eps=config.rms_norm_eps)
        self.token_norm = LlamaRMSNorm(hidden, eps=config.rms_norm_eps)
        self.position_queries = nn.Embedding(config.block_size, hidden)
        self.query_norm = LlamaRMSNorm(hidden, eps=config.rms_norm_eps)
        self.fuse = nn.Linear(3 * hidden, hidden, bias=False)
        self.prefix_broadcast = config.prefix_broadcast

    def forward(self, conditions: torch.Tensor, token_embeds: torch.Tensor) -> torch.Tensor:
        """`[B, R, d]` and `[B, R, d]` to `[B, R, K, d]`."""
        hidden = conditions.shape[-1]
        # Condition and token are the same for all slots, so their two thirds of the product are made once per row.
        shared = torch.cat([self.condition_norm(conditions), self.token_norm(token_embeds)], dim=-1)
        shared = nn.functional.linear(shared, self.fuse.weight[:, : 2 * hidden])
        queries = nn.functional.linear(
            self.query_norm(self.position_queries.weight), self.fuse.weight[:, 2 * hidden :]
        )
        slots = shared.unsqueeze(-2) + queries
        if self.prefix_broadcast:
            return slots
        return torch.cat([slots[..., :1, :], queries[1:].expand_as(slots[..., 1:, :])], dim=-2)


class SpecBlockModel(DraftHead, StrictPreTrainedModel):
    """
    The network: block forward, layer-wise shift, draft head and rank head.

    Args:
        config ([`SpecBlockConfig`]): The drafter's configuration.
    """

    config_class = SpecBlockConfig
    config: SpecBlockConfig
    main_input_name = "token_embeds"
    _no_split_modules = ["SpecBlockLayer"]

    def __init__(self, config: SpecBlockConfig):
        super().__init__(config)
        hidden = config.hidden_size
        self.input_layer = SpecBlockInput(config)
        self.layers = nn.ModuleList(SpecBlockLayer(config, i) for i in range(config.num_hidden_layers))
        self.shift_proj = nn.ModuleList(
            nn.Linear(2 * hidden, hidden, bias=False)
            for _ in range(config.num_hidden_layers - 1 if config.layer_shift else 0)
        )
        self.norm = LlamaRMSNorm(hidden, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(hidden, config.draft_vocab_size, bias=False)
        self.rank_head = nn.Sequential(
            nn.Linear(hidden + NUM_RANK_FEATURES, config.rank_hidden_size, bias=False),
            nn.SiLU(),
            nn.Linear(config.rank_hidden_size, config.num_rank_classes, bias=False),
        )
        if config.markov_rank:
            self.markov_head = MarkovHead(config.vocab_size, config.markov_rank, config.draft_vocab_size)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.register_draft_vocabulary()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if self.config.markov_rank and module is self.markov_head.markov_w2:  # starts as if it were not there
            nn.init.zeros_(module.weight)

    def project_features(self, features: torch.Tensor) -> torch.Tensor:
        """
        Target features `[..., F * d_target]`, concatenated in the order of `feature_layers`, to conditions `[...,
        d]`.
        """
        return self.input_layer.condition_proj(features)

    def forward(
        self,
        token_embeds: torch.Tensor,
        conditions: torch.Tensor,
        position_ids: torch.LongTensor,
        attention_mask: torch.BoolTensor | None = None,
        cache: BlockCache | GraphCache | None = None,
        opens: bool = False,
    ) -> torch.Tensor | OpenBlock:
        """
        One block forward.

        Args:
            token_embeds (`torch.Tensor` of shape `[B, R, d]`): The target's embedding of each row's token.
            conditions (`torch.Tensor` of shape `[B, R, d]`):
                `project_features(...)` in the first block, a slot's state as this method returned it in a later one.
            position_ids (`torch.LongTensor` of shape `[B, R]`): Position i of the committed pair that the row hangs
                on.
            attention_mask (`torch.BoolTensor` of shape `[B, 1, R * K, columns]`, *optional*):
                True where a slot sees a column. Without one, attention is causal over the flattened slots.
            cache (`BlockCache` or `GraphCache`, *optional*): Where keys and values of earlier rows are, and these go.
            opens (`bool`, *optional*, defaults to `False`):
                Go no further than to what others read of the slots; [`SpecBlockModel.read_slots`] gives their states.

        Returns:
            `torch.Tensor` of shape `[B, R, K, d]`: The last layer's states, before the final norm. With `opens` an
            [`OpenBlock`].
        """
        batch, rows, _ = token_embeds.shape
        size, implementation = self.config.block_size, self.config._attn_implementation
        steps = torch.arange(1, size + 1, device=position_ids.device)
        position_embeddings = self.rotary_emb(token_embeds, (position_ids.unsqueeze(-1) + steps).flatten(1))
        mask = masked_or_causal(attention_mask, implementation, rows * size, token_embeds)
        inputs = {"attention_mask": mask, "position_embeddings": position_embeddings, CACHE: cache}
        hidden = self.input_layer(conditions, token_embeds).flatten(1, 2)
        for index, layer in enumerate(self.layers):
            if index > 0 and self.config.layer_shift:
                hidden = self._shift(hidden, index - 1, batch, rows)
            if opens and layer is self.layers[-1]:
                keys, values = layer(hidden, step="open", position_embeddings=position_embeddings, cache=cache)
                return OpenBlock(hidden, position_embeddings, keys, values, attention_mask)
            hidden = layer(hidden, **inputs)
        return hidden.view(batch, rows, size, -1)

    def keep_keys(self, *args: Any) -> None:
        """[`SpecBlockModel.forward`], whose arguments these are, of rows of which nobody reads the states."""
        cast(Any, self).forward(*args, opens=True)  # past hooks, which would be told of states

    def read_slots(
        self, block: OpenBlock, texts: torch.LongTensor, rows: torch.LongTensor, slots: torch.LongTensor | int
    ) -> torch.Tensor:
        """
        The states that [`SpecBlockModel.forward`] would have given, of n slots alone.

        Args:
            block (`OpenBlock`): The block.
            texts (`torch.LongTensor` of shape `[n]`): Their rows of the batch, in ascending order.
            rows (`torch.LongTensor` of shape `[n]`): Their rows of the block.
            slots (`torch.LongTensor` of shape `[n]` or `int`): Which slots of those they are.

        Returns:
            `torch.Tensor` of shape `[n, d]`.
        """
        places = rows * self.config.block_size + slots
        hidden = block.hidden.flatten(0, 1).index_select(0, texts * block.hidden.shape[1] + places)
        return self.layers[-1](hidden, step="read", block=block, texts=texts, slots=places)

    def _shift(self, hidden: torch.Tensor, index: int, batch: int, rows: int) -> torch.Tensor:
        slots = hidden.view(batch, rows, self.config.block_size, -1)
        previous = torch.cat([slots[:, :, :1], slots[:, :, :-1]], dim=2)
        return self.shift_proj[index](torch.cat([slots, previous], dim=-1)).flatten(1, 2)

    def draft_logits(
        self, hidden: torch.Tensor, before: torch.LongTensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed, logits = super().draft_logits(hidden)
        if before is None or not self.config.markov_rank:
            return normed, logits
        return normed, logits + self.markov_head(before)

    def rank_logits(self, normed: torch.Tensor, top_logits: torch.Tensor) -> torch.Tensor:
        """
        Logits of the rank head. Gradients stop at its inputs, so that it learns to read the drafter and never bends
        it.

        Args:
            normed (`torch.Tensor` of shape `[..., d]`): Normed states.
            top_logits (`torch.Tensor` of shape `[..., T]`): The T largest draft logits in order, T at least 10.

        Returns:
            `torch.Tensor` of shape `[..., num_rank_classes]`.
        """
        features = rank_features(top_logits.detach().float()).to(normed.dtype)
        return self.rank_head(torch.cat([normed.detach(), features], dim=-1))


def rank_features(top_logits: torch.Tensor) -> torch.Tensor:
    """
    The 15 numbers that tell the rank head how sure the draft head is (section 3.2; taken from the top logits alone,
    as in the
    authors' training).

    Args:
        top_logits (`torch.Tensor` of shape `[..., T]`): In decreasing order, T at least 10.

    Returns:
        `torch.Tensor` of shape `[..., 15]`: 10 log-probabilities, the gaps 1-2, 1-3, 1-5, the first probability, the
            entropy.
    """
    log_probs = top_logits - top_logits.logsumexp(-1, keepdim=True)
    probs = log_probs.exp()
    # Slices, because a list of places would be moved to the device in every call.
    gaps = top_logits[..., :1] - torch.cat([top_logits[..., 1:3], top_logits[..., 4:5]], dim=-1)
    entropy = -(probs * log_probs).sum(-1, keepdim=True)
    return torch.cat([log_probs[..., :NUM_LISTED_LOG_PROBS], gaps, probs[..., :1], entropy], dim=-1)
