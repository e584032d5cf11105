# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The costliest step once before the start: whether it fits, how long the run will take, and what bounds it."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel


if TYPE_CHECKING:
    from .trainer import DrafterTrainer


ADVICE = {
    "target": "the target's forward; --views computes it once for all epochs",
    "forward": "the drafter's forward and its head",
    "backward": "the drafter's backward pass; fewer blocks or a smaller starts_share in --objective cost less",
    "update": "the optimiser; a larger --batch-tokens makes fewer of these",
}


@dataclass(frozen=True)
class Rehearsal:
    """
    What a step needs, in bytes and seconds.

    Args:
        target (`int`): Weights of the target.
        states (`int`): Weights, gradients and both moments of the drafter, in this process if it is not sharded.
        peak (`int`): The most memory that this process held during the step, the target and all else included.
        seconds (`float`): Of the step, without the optimiser's part.
        steps (`int`): Of the run.
        shares (`dict[str, float]`): Share of the step by phase.
        tokens (`int`): Answer tokens of the step, all processes together.
    """

    target: int
    states: int
    peak: int
    seconds: float
    steps: int
    shares: dict[str, float]
    tokens: int

    def __str__(self) -> str:
        bound = max(self.shares, key=self.shares.get)
        parts = ", ".join(f"{name} {share:.0%}" for name, share in self.shares.items())
        return (
            f"memory: target {self.target / 1e9:.2f} GB, drafter with gradients and moments "
            f"{self.states / 1e9:.2f} GB, peak of the largest step {self.peak / 1e9:.2f} GB\n"
            f"a step: {self.seconds:.2f} s for {self.tokens} answer tokens ({parts}), bound by {ADVICE[bound]}\n"
            f"the run: {self.steps} steps, at most {self.steps * self.seconds / 3600:.1f} h without evaluations"
        )


def rehearse(trainer: DrafterTrainer, target: PreTrainedModel) -> Rehearsal:
    """
    Take the step with the most tokens with everything joined, and leave no trace: weights, optimiser, step and
    randomness stay as they were.

    Args:
        trainer ([`DrafterTrainer`]): About to train.
        target ([`~transformers.PreTrainedModel`]): For its size.
    """
    batches = trainer.largest_step()
    device = trainer.accelerator.device
    trainer.clock.shares()
    started = time.perf_counter()
    trainer.gradients(batches, progress=1.0)
    trainer.optimizer.zero_grad()
    seconds = time.perf_counter() - started
    return Rehearsal(
        target=_bytes(target),
        states=4 * _bytes(trainer.module),
        peak=_peak(device),
        seconds=seconds,
        steps=trainer.total_steps,
        shares=trainer.clock.shares(),
        tokens=trainer.answer_tokens(batches),
    )


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere else
