# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The reduced vocabulary that a draft head scores, the head, and what its logits gain from the token before."""

from __future__ import annotations

import torch
from torch import nn

from ...drafting.pairs import TokenTable


class MarkovHead(nn.Module):
    """
    What a slot's logits gain from the token before: W_2 W_1[before] (DSpark, "vanilla").

    Args:
        num_tokens (`int`): Tokens that may come before.
        rank (`int`): Width between the two.
        num_logits (`int`): Tokens that are scored.
    """

    def __init__(self, num_tokens: int, rank: int, num_logits: int):
        super().__init__()
        self.markov_w1 = nn.Embedding(num_tokens, rank)
        self.markov_w2 = nn.Linear(rank, num_logits, bias=False)

    def forward(self, before: torch.LongTensor, candidates: torch.LongTensor | None = None) -> torch.Tensor:
        """
        Args:
            before (`torch.LongTensor` of shape `[...]`): Token ids; -1, where nothing is known, gains nothing.
            candidates (`torch.LongTensor` of shape `[..., C]`, *optional*): Which logits are asked for.

        Returns:
            `torch.Tensor` of shape `[..., num_logits]`, or `[..., C]` of the candidates.
        """
        known = self.markov_w1(before.clamp_min(0)).masked_fill((before < 0).unsqueeze(-1), 0.0)
        if candidates is None:
            return self.markov_w2(known)
        return (self.markov_w2.weight[candidates] @ known.unsqueeze(-1)).squeeze(-1)


class DraftHead(nn.Module):
    """
    Mixin of networks that end in `norm` and an `lm_head` over `draft_vocab_size` of the target's tokens.

    Attributes:
        d2t (`torch.LongTensor` of shape `[draft_vocab_size]`):
            Buffer of offsets: target id = draft id + d2t[draft id].
        t2d (`torch.BoolTensor` of shape `[vocab_size]`): Buffer: whether a target id is in the draft vocabulary.
    """

    def register_draft_vocabulary(self) -> None:
        """Add the buffers, at first with the target's first tokens; of the constructor."""
        size = self.config.draft_vocab_size
        self.register_buffer("d2t", torch.zeros(size, dtype=torch.long))
        self.register_buffer("t2d", torch.arange(self.config.vocab_size) < size)

    def set_draft_vocabulary(self, target_ids: torch.LongTensor) -> None:
        """
        Choose the tokens that the draft head scores.

        Args:
            target_ids (`torch.LongTensor` of shape `[draft_vocab_size]`): Distinct target ids.
        """
        ids = target_ids.sort().values.to(self.d2t.device)
        self.d2t.copy_(ids - torch.arange(len(ids), device=ids.device))
        self.t2d.fill_(False)
        self.t2d[ids] = True

    @property
    def draft_to_target(self) -> torch.LongTensor:
        """`[draft_vocab_size]`: the target id of every row of the draft head."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def own_table(self, table: TokenTable) -> TokenTable:
        """The embedding and head that the drafter uses: the target's, unless it has its own."""
        return table

    def draft_logits(
        self, hidden: torch.Tensor, before: torch.LongTensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden (`torch.Tensor` of shape `[..., d]`): States before the final norm.
            before (`torch.LongTensor` of shape `[...]`, *optional*):
                Target ids of the tokens before the predicted ones, -1 where there is none: for drafters with a Markov
                term, the others have no use for them.

        Returns:
            The normed states `[..., d]` and the logits `[..., draft_vocab_size]` over the draft vocabulary.
        """
        normed = self.norm(hidden)
        return normed, self.lm_head(normed)

    def best_tokens(self, hidden: torch.Tensor, width: int) -> tuple[torch.LongTensor, torch.Tensor]:
        """
        The likeliest tokens of states `[..., d]`.

        Returns:
            Target ids and log-probabilities `[..., width]`, best first.
        """
        _, logits = self.draft_logits(hidden)
        best = logits.topk(width, dim=-1)
        log_probs = best.values.float() - logits.float().logsumexp(-1, keepdim=True)
        return best.indices + self.d2t[best.indices], log_probs
