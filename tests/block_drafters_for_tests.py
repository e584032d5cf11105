# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Block-diffusion drafters of every variant with random weights, ones that know the text, and what a client does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import SIZES
from transformers import AutoModelForCausalLM

from specblock_hf import AutoDrafter, BlockDiffusionConfig, BlockDiffusionDrafter


BLOCK = 5
VARIANTS: dict[str, dict[str, Any]] = {
    "dflash": {},
    "sliding": {
        "layer_types": ["sliding_attention", "full_attention"],
        "use_sliding_window": True,
        "sliding_window": 4,
    },
    "causal-window": {
        "layer_types": ["sliding_attention", "sliding_attention"],
        "use_sliding_window": True,
        "sliding_window": 4,
    },
    "jetspec": {"causal": True},
    "dflash2": {"conv_kernel_size": 2, "conv_group_size": 8, "selector_rank": 4, "selector_top_k": 6},
    "dspark": {
        "predicts_from_anchor": True,
        "own_embedding": True,
        "markov_rank": 4,
        "confidence_head": True,
        "confidence_head_with_markov": True,
        "confidence_threshold": 0.4,
    },
    "dspark-bare": {"predicts_from_anchor": True, "own_embedding": True, "confidence_head": True},
    "scaled": {"input_embedding_scale": 0.5, "output_multiplier": 2.0, "final_logit_softcapping": 5.0},
    "block-window": {
        "layer_types": ["sliding_attention", "full_attention"],
        "use_sliding_window": True,
        "sliding_window": 3,
        "window_from_anchor": True,
    },
}


def block_config(variant: str = "dflash", **overrides: Any) -> BlockDiffusionConfig:
    sizes = {name: SIZES[name] for name in SIZES if name not in ("num_hidden_layers", "initializer_range")}
    fields = {"num_hidden_layers": 2, "head_dim": 8, "block_size": BLOCK, "feature_layers": [1, 2, 3]}
    fields |= {"tree_budget": 12, "initializer_range": 0.3}
    return BlockDiffusionConfig(**(sizes | fields | VARIANTS[variant] | overrides))


def block_drafter(
    variant: str = "dflash", kind: type[BlockDiffusionDrafter] = BlockDiffusionDrafter, **overrides: Any
) -> BlockDiffusionDrafter:
    """A drafter with random weights, its convolutions and norms included, for the tiny targets."""
    torch.manual_seed(3)
    drafter = kind(block_config(variant, **overrides)).eval()
    with torch.no_grad():
        for name, weight in drafter.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            elif "conv" in name:
                weight.normal_(std=0.3)
    return drafter


class OracleBlockDrafter(BlockDiffusionDrafter):
    """Runs its network and then lifts, in every slot, the token that the target will write there."""

    text: list[int] = []

    def draft_block(self, state, anchors, positions, depth):
        block = super().draft_block(state, anchors, positions, depth)
        text = torch.tensor(self.text + [self.text[-1]] * 64)
        right = text[positions + 1 + torch.arange(depth)]
        block.logits.scatter_add_(2, right.unsqueeze(-1), torch.full((*right.shape, 1), 200.0))
        return block


def pull_and_generate(name: str, folder: Path, prompt: list[int], length: int) -> tuple[str, list[int], list[int]]:
    """Load a drafter for the target of a folder by its name and decode: class, text, accepted lengths."""
    target = AutoModelForCausalLM.from_pretrained(folder).eval()
    drafter = AutoDrafter.from_pretrained(name, target=target)
    output = target.generate(torch.tensor([prompt]), assistant_model=drafter, do_sample=False, max_length=length)
    return type(drafter).__name__, output[0].tolist(), drafter.last_statistics.accepted
