# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Random drafters of every kind that stands beside SpecBlock, and texts to tell them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from conftest import VOCAB, tiny_target
from training_for_tests import DRAFT_VOCAB, Told

from specblock_hf.drafters.common.registry import drafter_kinds
from specblock_hf.drafting.pairs import Pairs
from specblock_hf.drafting.target_batch import TargetBatch


BASELINES = ("eagle3", "medusa", "parallelspec", "falcon_drafter")
FORWARDS = {"eagle3": 4, "medusa": 1, "parallelspec": 1, "falcon_drafter": 3}
"""Of a round."""
DEPTH = {"eagle3": 4, "medusa": 3, "parallelspec": 3, "falcon_drafter": 6}
"""Tokens that they reach."""
_SIZES: dict[str, dict[str, Any]] = {
    "eagle3": {"num_blocks": 4, "beam_width": 3},
    "medusa": {"block_size": 3, "tree_width": 3},
    "parallelspec": {"block_size": 3, "tree_width": 3},
    "falcon_drafter": {"block_size": 2, "num_blocks": 3, "rank_weights": [0.6, 0.2, 0.1]},
}


def baseline(
    name: str,
    kind: str = "llama",
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
    base: type | None = None,
    **fields,
):
    """
    A drafter with random weights and a random draft vocabulary.

    Args:
        name (`str`): Its `model_type`.
        kind (`str`, *optional*, defaults to `"llama"`): The tiny target that it is for.
        seed (`int`, *optional*, defaults to 1): Of weights and vocabulary.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Of the weights.
        base (`type`, *optional*): A subclass of its class.
        **fields: Of its configuration.
    """
    made = base or drafter_kinds()[name]
    sizes = {"draft_vocab_size": DRAFT_VOCAB} | _SIZES[name] | fields
    drafter = made(made.config_class.for_target(tiny_target(kind).config, **sizes))
    generator = torch.Generator().manual_seed(seed)
    for weight in drafter.parameters():
        # What starts from zero would hide what it is multiplied with.
        weight.data = torch.randn(weight.shape, generator=generator) * 0.3
    drafter.set_draft_vocabulary(torch.randperm(VOCAB, generator=generator)[: drafter.config.draft_vocab_size])
    return drafter.to(dtype).eval()


def read_by(drafter, features: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The first of some features, as many as the drafter reads."""
    return tuple(features[: len(drafter.feature_layers)])


def pairs_for(
    drafter, told: Told, first: Sequence[int], last: Sequence[int], rows: Sequence[int] | None = None
) -> Pairs:
    """As [`Told.pairs`], with the features that the drafter reads."""
    pairs = told.pairs(first, last, rows)
    return replace(pairs, features=read_by(drafter, pairs.features))


def batch_for(drafter, told: Told, lengths: Sequence[int], answer_starts: Sequence[int], top: int = 4) -> TargetBatch:
    """
    Texts to train on: their targets are a few likely tokens each, mostly led by the text's own, some of them outside
    the draft vocabulary.
    """
    generator = torch.Generator().manual_seed(5)
    shape = told.tokens.shape
    draft_ids = torch.full((VOCAB,), -1)
    draft_ids[drafter.draft_to_target] = torch.arange(len(drafter.draft_to_target))
    order = torch.rand(*shape, VOCAB, generator=generator).scatter_(2, told.tokens[..., None], 2.0)
    likely = order.topk(top).indices
    swapped = torch.rand(shape, generator=generator) < 0.2
    likely[swapped] = likely[swapped].roll(1, dims=-1)
    probs = torch.rand(*shape, top, generator=generator).sort(-1, descending=True).values / top
    batch = told.batch(lengths, answer_starts)
    features = torch.cat(read_by(drafter, told.features.unbind(2)), dim=-1)
    return replace(batch, features=features, top_ids=draft_ids[likely], top_probs=probs)


def favouring(drafter, told: Told) -> None:
    """Make a drafter and texts agree often: both mostly say the same two tokens."""
    drafter.lm_head.weight.data[:2] *= 6
    generator = torch.Generator().manual_seed(7)
    favourites = drafter.draft_to_target[torch.randint(2, told.tokens.shape, generator=generator)]
    rare = torch.rand(told.tokens.shape, generator=generator) < 0.1
    told.tokens = torch.where(rare, told.tokens, favourites)


def listening(name: str) -> type:
    """The drafter's class, keeping in `heard` the states of every forward that drafts."""

    class Listening(drafter_kinds()[name]):
        def best_tokens(self, hidden, width):
            self.__dict__.setdefault("heard", []).append(hidden)
            return super().best_tokens(hidden, width)

    return Listening
