# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
What a drafter knows before the first step: the target's rows of its draft vocabulary, or what another drafter has
learned.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn
from transformers import PreTrainedModel

from ..drafters.common.head import MarkovHead


MARKOV_SCALE = 0.7
"""Deviation of the rows of a new Markov term: its logits then change about as fast as the head's."""

ROWS = ("lm_head.weight", "markov_head.markov_w2.weight")
"""Weights with a row for every token of the draft vocabulary."""


@torch.no_grad()
def start_from_target(drafter: Any, target: PreTrainedModel) -> None:
    """
    Fill a new drafter's head with the target's own rows, which saves it from learning what every token means, and what
    a Markov term reads of the token before with the main directions of the target's embedding, which says what tokens
    are alike.

    Args:
        drafter ([`~transformers.PreTrainedModel`] with a [`DraftHead`]): With its draft vocabulary.
        target ([`~transformers.PreTrainedModel`]): The target.
    """
    drafter.lm_head.weight.copy_(_weight(target.get_output_embeddings())[drafter.draft_to_target.cpu()])
    for module in drafter.modules():
        if isinstance(module, MarkovHead):
            rows = _weight(target.get_input_embeddings()).float()
            rows = rows - rows.mean(0)
            rank = module.markov_w1.embedding_dim
            main = rows @ torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -rank:]
            module.markov_w1.weight.copy_(MARKOV_SCALE * main / main.std(0))


@torch.no_grad()
def reshape(
    drafter: Any, changes: dict[str, Any], target: PreTrainedModel, ids: torch.LongTensor | None = None
) -> Any:
    """
    A drafter of another shape that goes on from what this one has learned: weights that both have are taken over, a
    head's row by row. Rows of tokens that are new to the draft vocabulary come from the target's, by the linear map
    that fits the rows of all others best.

    Args:
        drafter ([`~transformers.PreTrainedModel`] with a [`DraftHead`]): The drafter.
        changes (`dict[str, Any]`): Fields of its configuration.
        target ([`~transformers.PreTrainedModel`]): Its target.
        ids (`torch.LongTensor` of shape `[draft_vocab_size]`, *optional*): Another draft vocabulary.
    """
    new = type(drafter)(type(drafter.config)(**drafter.config.to_dict() | {"acceptance": None} | changes))
    # The new one is made on the CPU, wherever the other is.
    known = drafter.draft_to_target.cpu()
    learned = {name: weight.cpu() for name, weight in drafter.state_dict().items()}
    new.set_draft_vocabulary(known if ids is None else ids)
    start_from_target(new, target)
    place = torch.full((drafter.config.vocab_size,), -1)
    place[known] = torch.arange(len(known))
    place, weights = place[new.draft_to_target], new.state_dict()
    head = _weight(target.get_output_embeddings()).float()
    change = torch.linalg.lstsq(head[known], learned["lm_head.weight"].float()).solution
    weights["lm_head.weight"].copy_(head[new.draft_to_target] @ change)
    for name in weights.keys() & learned.keys() - {"d2t", "t2d"}:
        if name in ROWS and weights[name].shape[1:] == learned[name].shape[1:]:
            weights[name][place >= 0] = learned[name][place[place >= 0]].to(weights[name].dtype)
        elif weights[name].shape == learned[name].shape:
            weights[name].copy_(learned[name])
    return new


def _weight(module: nn.Module) -> torch.Tensor:
    """The weight of a part of the target, on the CPU even if it is offloaded."""
    with align_module_device(module, execution_device="cpu"):
        return module.weight.detach().cpu()
