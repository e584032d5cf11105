# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Two steps and some drafts before the start: whether the costliest step fits, what bounds a usual one, and how long the
run will take with all that is measured on the way.
"""

from __future__ import annotations

import math
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
        seconds (`float`): Of a usual step.
        steps (`int`): Of the run.
        shares (`dict[str, float]`): Share of that step by phase.
        tokens (`int`): Answer tokens of that step, all processes together.
        eval_steps (`int`, *optional*, defaults to 1): Steps between evaluations.
        evaluation (`float`, *optional*, defaults to 0.0): Seconds of one in which nothing is accepted; 0 for none.
        finish (`float`, *optional*, defaults to 0.0): The same of measuring every plan at the end.
        tau (`float`, *optional*, defaults to 1.0): What the drafter accepts already.
    """

    target: int
    states: int
    peak: int
    seconds: float
    steps: int
    shares: dict[str, float]
    tokens: int
    eval_steps: int = 1
    evaluation: float = 0.0
    finish: float = 0.0
    tau: float = 1.0

    @property
    def evaluations(self) -> int:
        """After every `eval_steps`, and after the last step."""
        return math.ceil(self.steps / self.eval_steps) if self.evaluation else 0

    @property
    def evaluation_seconds(self) -> float:
        """Of all evaluations: the more a drafter accepts, the fewer rounds there are to simulate."""
        places = (min(number * self.eval_steps, self.steps) for number in range(1, self.evaluations + 1))
        return sum(self.evaluation / self.tau_after(step) for step in places)

    @property
    def finish_seconds(self) -> float:
        """Of what follows the last step."""
        return self.finish / self.tau_after(self.steps)

    @property
    def run_seconds(self) -> float:
        """Of the whole run."""
        return self.steps * self.seconds + self.evaluation_seconds + self.finish_seconds

    def tau_after(self, step: int) -> float:
        """What the drafter is expected to accept then."""
        return max(self.tau, expected_tau(step * self.tokens))

    def __str__(self) -> str:
        bound = max(self.shares, key=self.shares.get)
        measured = "nothing is held out to measure with"
        if self.evaluations:
            measured = (
                f"{self.evaluations} evaluation(s) of {duration(self.evaluation_seconds / self.evaluations)}, every "
                f"plan's acceptance in {duration(self.finish_seconds)}"
            )
        parts = ", ".join(f"{name} {share:.0%}" for name, share in self.shares.items())
        return (
            f"memory: target {self.target / 1e9:.2f} GB, drafter with gradients and moments "
            f"{self.states / 1e9:.2f} GB, peak of the largest step {self.peak / 1e9:.2f} GB\n"
            f"a step: {self.seconds:.2f} s for {self.tokens} answer tokens ({parts}), bound by {ADVICE[bound]}\n"
            f"the run: {self.steps} steps in {duration(self.steps * self.seconds)}, {measured}: about "
            f"{duration(self.run_seconds)} in all"
        )


def expected_tau(tokens: float) -> float:
    """
    Roughly what trees accept after so many answer tokens of training: 1.15 after 2,500, 1.5 after 30 thousand, 2.1
    after 540 thousand and 2.3 after 1.6 million, as with SmolLM2-135M-Instruct (`docs/training.md`).
    """
    return 1 + 0.19 * math.log1p(tokens / 2000)


def duration(seconds: float) -> str:
    """In the unit that suits it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def rehearse(
    trainer: DrafterTrainer,
    target: PreTrainedModel,
    evaluation: float = 0.0,
    finish: float = 0.0,
    tau: float = 1.0,
) -> Rehearsal:
    """
    Take the step with the most tokens and a usual one with everything joined, and leave no trace: weights, optimiser,
    step and randomness stay as they were.

    Args:
        trainer ([`DrafterTrainer`]): About to train.
        target ([`~transformers.PreTrainedModel`]): For its size.
        evaluation (`float`, *optional*, defaults to 0.0):
            Seconds that `trainer.evaluate` would take if nothing was accepted.
        finish (`float`, *optional*, defaults to 0.0): The same of what follows the last step.
        tau (`float`, *optional*, defaults to 1.0): What the drafter accepts already.
    """
    _seconds_of(trainer, trainer.sized_step(0))  # which warms up, too
    peak, usual = _peak(trainer.accelerator.device), trainer.sized_step(0.5)
    seconds, shares = _seconds_of(trainer, usual)
    steps = trainer.total_steps
    if trainer.args.max_seconds:
        steps = max(1, round(trainer.args.max_seconds / seconds))
    return Rehearsal(
        target=_bytes(target),
        states=4 * _bytes(trainer.module),
        peak=peak,
        seconds=seconds,
        steps=steps,
        shares=shares,
        tokens=trainer.answer_tokens(usual),
        eval_steps=trainer.args.eval_steps,
        evaluation=evaluation,
        finish=finish,
        tau=tau,
    )


def _seconds_of(trainer: DrafterTrainer, batches: list[list[int]]) -> tuple[float, dict[str, float]]:
    """What a step takes, and the shares of its phases. Its update is by nothing, at no rate, and is forgotten."""
    trainer.clock.shares()
    started = time.perf_counter()
    trainer.gradients(batches, progress=1.0)
    for parameter in trainer.module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in trainer.bare_optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
        optimizer.state.clear()
    trainer.module.zero_grad()
    trainer.clock.lap("update")
    return time.perf_counter() - started, trainer.clock.shares()


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere else
