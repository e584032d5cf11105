# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What takes the steps: AdamW for every weight, or Muon for the matrices of the layers."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from .arguments import DrafterTrainingArguments


def make_optimizers(drafter: PreTrainedModel, args: DrafterTrainingArguments) -> list[torch.optim.Optimizer]:
    """
    The optimisers of a run, which share the drafter's weights among them and run without weight decay.

    Args:
        drafter (`TreeDrafter`): About to be trained.
        args ([`DrafterTrainingArguments`]): Which ones, and their rate.

    Raises:
        ValueError: This version of torch has no Muon.
    """
    heads = {*drafter.parameters_of("head")}
    matrices = [module.weight for module in drafter.modules() if isinstance(module, nn.Linear)]
    matrices = [weight for weight in matrices if weight not in heads] if args.optimizer == "muon" else []
    taken = {*matrices}
    others = [weight for weight in drafter.parameters_of("full") if weight not in taken]
    adamw = torch.optim.AdamW(others, lr=args.learning_rate, betas=args.betas, weight_decay=0.0, fused=True)
    if not matrices:
        return [adamw]
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"torch {torch.__version__} has no Muon; install torch 2.9 or newer, or train with AdamW.")
    # Its steps are made as large as AdamW's, so that one rate suits both.
    muon = torch.optim.Muon(matrices, lr=args.learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [adamw, muon]
