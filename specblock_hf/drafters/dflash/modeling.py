# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
The network of DFlash (https://huggingface.co/papers/2602.06036), DFlash 2, JetSpec and DSpark and nothing else: it
knows no tree.

The known text never passes through the layers. Its features f become rows g = norm_h(W_fc f), which every layer turns
into keys and values of its own:

    k = rope(norm_k(W_k g)),   v = W_v g

A block is the last known token and masks, [E anchor, E mask, ...]; its rows are the queries, and see each other and
the rows of the known text:

    h = x + Attention(norm_1(x)),   y = h + MLP(norm_2(h)),   logits = head(norm(y))

Row j of the block sits at RoPE index c + j, where c is the number of known features and thereby the position of the
anchor. One forward predicts the whole block, and nothing of it is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP, Qwen3RMSNorm, Qwen3RotaryEmbedding

from ...checkpoints.loading import StrictPreTrainedModel
from ...drafting.pairs import TokenTable
from ..common.cache import BlockCache, GraphCache, backend_mask, keys_and_values
from ..common.head import MarkovHead
from .configuration import BlockDiffusionConfig


Masks = Mapping[tuple[bool, int | None], torch.Tensor | None]
"""What a layer's rows see, `[B or 1, 1, rows, columns]` by the layer's rule; `None` where it is everything."""


class BlockConvolution(nn.Module):
    """
    A causal convolution over the rows of a block before and after a sublayer, with kernels that are partly predicted
    from the sublayer's input, one for each group of channels (DFlash 2).
    """

    def __init__(self, config: BlockDiffusionConfig):
        super().__init__()
        self.size, self.group = config.conv_kernel_size, config.conv_group_size
        self.groups = config.hidden_size // self.group
        self.base_kernel = nn.Parameter(torch.empty(2, self.size, config.hidden_size))
        self.kernel_projection = nn.Linear(config.hidden_size, 2 * self.size * self.groups, bias=False)

    def forward(self, normed: torch.Tensor, sublayer: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """`[B, R, b, d]` to `[B, R, b, d]`: the sublayer between its two convolutions."""
        predicted = self.kernel_projection(normed).unflatten(-1, (2, self.size, self.groups))
        kernels = self.base_kernel.to(normed.dtype) + predicted.repeat_interleave(self.group, dim=-1)
        first, last = kernels.unbind(-3)
        return self._convolve(sublayer(self._convolve(normed, first)), last)

    def _convolve(self, rows: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
        """`[..., b, d]` with kernels `[..., b, size, d]`: row t is the sum of kernel o of t times row t - o."""
        length, out = rows.shape[-2], torch.zeros_like(rows)
        for offset in range(min(self.size, length)):
            shifted = nn.functional.pad(rows[..., : length - offset, :], (0, 0, offset, 0))
            out = out + kernels[..., offset, :] * shifted
        return out


class CandidateSelector(nn.Module):
    """
    Scores a slot's candidates given the token before: the logit plus sum_r P[before]_r (W y)_r S[candidate]_r
    (DFlash 2).
    """

    def __init__(self, config: BlockDiffusionConfig):
        super().__init__()
        rank = config.selector_rank
        self.hidden_projection = nn.Linear(config.hidden_size, rank, bias=False)
        # Published without the `.weight` that an embedding would add.
        self.predecessor_codebook = nn.Parameter(torch.empty(config.vocab_size, rank))
        self.successor_codebook = nn.Parameter(torch.empty(config.vocab_size, rank))

    def forward(self, hidden: torch.Tensor, before: torch.LongTensor, candidates: torch.LongTensor) -> torch.Tensor:
        """States `[B, d]`, tokens before `[B, F]` and candidates `[B, k]` to what the logits gain, `[B, F, k]`."""
        weighted = self.predecessor_codebook[before] * self.hidden_projection(hidden).unsqueeze(1)
        return weighted.float() @ self.successor_codebook[candidates].float().transpose(1, 2)


class ConfidenceHead(nn.Module):
    """The logit of the probability that the target accepts a row's token (DSpark)."""

    def __init__(self, config: BlockDiffusionConfig):
        super().__init__()
        self.proj = nn.Linear(config.hidden_size + config.markov_rank * config.confidence_head_with_markov, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[..., d + r]` to `[...]`."""
        return self.proj(inputs).squeeze(-1).float()


class BlockDiffusionLayer(nn.Module):
    """
    A Qwen3-type layer, the queries of which are the rows of blocks. The known text only leaves keys and values in it,
    which goes through `forward` too, because that is where a sharded layer has its weights.
    """

    def __init__(self, config: BlockDiffusionConfig, index: int):
        super().__init__()
        self.rule = config.layer_rules[index]
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Qwen3Attention(config, index)
        self.self_attn.is_causal = False  # without a mask everything is visible
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = Qwen3MLP(config)
        if config.conv_kernel_size:
            self.attention_conv = BlockConvolution(config)
            self.mlp_conv = BlockConvolution(config)
        self.convolves = bool(config.conv_kernel_size)

    def forward(self, hidden: torch.Tensor, *args: Any, step: Literal["block", "context"] = "block") -> Any:
        return (self._block if step == "block" else self._context)(hidden, *args)

    def _context(
        self, rows: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows g `[B, T, d]` to their keys and values, `[B, heads, T, head_dim]` each."""
        return keys_and_values(self.self_attn, rows, position_embeddings, self.self_attn.k_norm)

    def _block(
        self,
        hidden: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        cache: BlockCache | GraphCache,
    ) -> torch.Tensor:
        """`[B, R, b, d]` to `[B, R, b, d]`."""

        def attend(rows: torch.Tensor) -> torch.Tensor:
            attended, _ = self.self_attn(rows.flatten(1, 2), position_embeddings, attention_mask, cache)
            return attended.view_as(rows)

        normed = self.input_layernorm(hidden)
        hidden = hidden + (self.attention_conv(normed, attend) if self.convolves else attend(normed))
        normed = self.post_attention_layernorm(hidden)
        return hidden + (self.mlp_conv(normed, self.mlp) if self.convolves else self.mlp(normed))


class BlockDiffusionModel(StrictPreTrainedModel):
    """
    The network. Weight names are the published ones.

    Args:
        config ([`BlockDiffusionConfig`]): The drafter's configuration.
    """

    config_class = BlockDiffusionConfig
    config: BlockDiffusionConfig
    main_input_name = "block_embeds"
    _no_split_modules = ["BlockDiffusionLayer"]

    def __init__(self, config: BlockDiffusionConfig):
        super().__init__(config)
        hidden = config.hidden_size
        if config.own_embedding:
            self.embed_tokens = nn.Embedding(config.vocab_size, hidden)
            self.lm_head = nn.Linear(hidden, config.vocab_size, bias=False)
        if config.restricted_vocabulary:
            self.register_buffer("t2d", torch.ones(config.vocab_size, dtype=torch.bool))
        self.fc = nn.Linear(len(config.feature_layers) * config.target_hidden_size, hidden, bias=False)
        self.hidden_norm = Qwen3RMSNorm(hidden, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(BlockDiffusionLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Qwen3RMSNorm(hidden, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config)
        if config.selector_rank:
            self.candidate_selector = CandidateSelector(config)
        if config.markov_rank:
            self.markov_head = MarkovHead(config.vocab_size, config.markov_rank, config.vocab_size)
        if config.confidence_head:
            self.confidence_head = ConfidenceHead(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BlockConvolution):  # starts as if it were not there
            nn.init.zeros_(module.base_kernel)
            nn.init.ones_(module.base_kernel[:, 0])
            nn.init.zeros_(module.kernel_projection.weight)
        elif isinstance(module, CandidateSelector):
            nn.init.normal_(module.predecessor_codebook, std=self.config.initializer_range)
            nn.init.normal_(module.successor_codebook, std=self.config.initializer_range)

    def own_table(self, table: TokenTable) -> TokenTable:
        """The embedding and head that the drafter uses: its own if it has them, otherwise the target's."""
        if self.config.own_embedding:
            return TokenTable(self.embed_tokens, self.lm_head, self.config.vocab_size)
        return table

    def block_embeds(self, anchors: torch.LongTensor, rows: int, table: TokenTable) -> torch.Tensor:
        """Anchors `[B, R]` to the input `[B, R, rows, d]` of their blocks: the anchor's embedding, then masks."""
        ids = torch.full((*anchors.shape, rows), self.config.mask_token_id, device=table.device)
        ids[..., 0] = anchors
        return table.embed(ids).to(self.device, self.dtype) * self.config.input_embedding_scale

    def project_features(self, features: torch.Tensor) -> torch.Tensor:
        """Target features `[..., F * d_target]`, in the order of `feature_layers`, to rows g `[..., d]`."""
        return self.hidden_norm(self.fc(features))

    def append_context(
        self, features: torch.Tensor, position_ids: torch.LongTensor, cache: BlockCache | GraphCache
    ) -> None:
        """
        Write the keys and values of known positions into the cache, layer by layer, without attention.

        Args:
            features (`torch.Tensor` of shape `[B, T, F * d_target]`): The target's states.
            position_ids (`torch.LongTensor` of shape `[B, T]`): Their positions i.
            cache (`BlockCache` or `GraphCache`): Takes them in.
        """
        context = self.project_features(features)
        position_embeddings = self.rotary_emb(context, position_ids)
        for index, layer in enumerate(self.layers):
            cache.update(*layer(context, position_embeddings, step="context"), index)

    def masks(
        self,
        queries: torch.LongTensor,
        keys: torch.LongTensor,
        anchors: torch.LongTensor,
        visible: torch.BoolTensor | None = None,
    ) -> Masks:
        """
        What rows see under the rule of each layer.

        Args:
            queries (`torch.LongTensor` of shape `[B or 1, Q]`): Position of every row of the blocks.
            keys (`torch.LongTensor` of shape `[B or 1, columns]`): Position of every column.
            anchors (`torch.LongTensor` of shape `[B or 1, Q or 1]`): Position of the anchor of every row's block.
            visible (`torch.BoolTensor` of shape `[B or 1, Q, columns]`, *optional*):
                What a row may see at all. All columns if not given.
        """
        masks: dict[tuple[bool, int | None], torch.Tensor | None] = {}
        backend = self.config._attn_implementation
        ahead = keys.unsqueeze(1) - queries.unsqueeze(2)
        if self.config.window_from_anchor:  # and there are that many columns before it
            back = anchors.unsqueeze(2) - keys.unsqueeze(1) - 1
        else:
            back = ahead.abs()
        everything = torch.ones_like(ahead, dtype=torch.bool) if visible is None else visible
        for causal, window in set(self.config.layer_rules):
            if visible is None and not causal and window is None and backend == "sdpa":
                masks[causal, window] = None  # which other backends may take for causal
                continue
            mask = everything & (ahead <= 0) if causal else everything
            mask = (mask & (back < window) if window is not None else mask).unsqueeze(1)
            masks[causal, window] = backend_mask(mask, backend, self.dtype)
        return masks

    def forward(
        self,
        block_embeds: torch.Tensor,
        position_ids: torch.LongTensor,
        masks: Masks,
        cache: BlockCache | GraphCache,
    ) -> torch.Tensor:
        """
        Predict R blocks of b rows.

        Args:
            block_embeds (`torch.Tensor` of shape `[B, R, b, d]`): As [`~BlockDiffusionModel.block_embeds`] makes them.
            position_ids (`torch.LongTensor` of shape `[B, R, b]`): Positions of the rows, from the anchor's on.
            masks (`dict`): As [`~BlockDiffusionModel.masks`] makes them, over the cache's columns and the rows.
            cache (`BlockCache` or `GraphCache`): Holds the known text; the rows' own keys go behind it.

        Returns:
            `torch.Tensor` of shape `[B, R, b, d]`: The states after the final norm.
        """
        hidden = block_embeds
        position_embeddings = self.rotary_emb(hidden, position_ids.flatten(1))
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings, masks[layer.rule], cache)
        return self.norm(hidden)

    def head_logits(self, hidden: torch.Tensor, table: TokenTable) -> torch.Tensor:
        """
        The logits `[..., vocab_size]` of normed states `[..., d]`, in float32 whatever the head is in: rounded ones
        tie.
        """
        hidden = hidden.to(table.device, table.embedding.weight.dtype)
        logits = table.head(hidden).to(self.device).float()
        if self.config.output_multiplier != 1:
            logits = logits * self.config.output_multiplier
        if self.config.final_logit_softcapping:
            bound = self.config.final_logit_softcapping
            logits = torch.tanh(logits / bound) * bound
        return logits.masked_fill(~self.t2d, -torch.inf) if self.config.restricted_vocabulary else logits
