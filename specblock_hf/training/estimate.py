# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Two steps and some drafts before the start: whether the costliest step fits, what bounds a usual one, and how long the
run will take with all that is measured on the way.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel


if TYPE_CHECKING:
    from .trainer import DrafterTrainer


EASING = ("num_blocks", "starts_share")
"""Fields of objectives that make the backward pass cheaper the smaller they are."""


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """
    What a step needs, in bytes and seconds.

    Args:
        target (`int`): Weights of the target.
        states (`int`): Weights, gradients and both moments of the drafter, in this process if it is not sharded.
        peak (`int`):
            The most memory that this process held during the step, the target and all else included; 0 if unknown.
        seconds (`float`): Of a usual step.
        steps (`int`): Of the run.
        shares (`dict[str, float]`): Share of that step by phase.
        tokens (`int`): Answer tokens of that step, all processes together.
        eval_steps (`int`, *optional*, defaults to 1): Steps between evaluations.
        evaluation (`float`, *optional*, defaults to 0.0): Seconds of one in which nothing is accepted; 0 for none.
        finish (`float`, *optional*, defaults to 0.0): The same of measuring every plan at the end.
        tau (`float`, *optional*, defaults to 1.0): What the drafter accepts already.
        done (`int`, *optional*, defaults to 0): Steps of the run that were taken before.
        views (`int`, *optional*, defaults to 0):
            What the target's views of all conversations would take on the disk; 0 if they are there.
        easing (`list[str]`, *optional*, defaults to `[]`): The fields of [`EASING`] that the objective has.
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
    done: int = 0
    views: int = 0
    easing: list[str] = dataclasses.field(default_factory=list)

    @property
    def left(self) -> int:
        """Steps that are still to be taken."""
        return self.steps - self.done

    @property
    def evaluations(self) -> list[int]:
        """The steps before them: every `eval_steps`, and the last one."""
        if not self.evaluation or not self.left:
            return []
        first = self.done - self.done % self.eval_steps + self.eval_steps
        return [*range(first, self.steps, self.eval_steps), self.steps]

    @property
    def evaluation_seconds(self) -> float:
        """Of all evaluations: the more a drafter accepts, the fewer rounds there are to simulate."""
        return sum(self.evaluation / self.tau_after(step) for step in self.evaluations)

    @property
    def finish_seconds(self) -> float:
        """Of what follows the last step."""
        return self.finish / self.tau_after(self.steps)

    @property
    def run_seconds(self) -> float:
        """Of what is left of the run."""
        return self.left * self.seconds + self.evaluation_seconds + self.finish_seconds

    def tau_after(self, step: int) -> float:
        """What the drafter is expected to accept then."""
        return max(self.tau, expected_tau(step * self.tokens))

    @property
    def bound(self) -> str:
        """What most of a step is spent on, and what makes it less."""
        stored = f"; --views DIR computes it once for all epochs and takes {self.views / 1e9:.2f} GB of disk"
        eased = f"; a smaller {' or '.join(self.easing)} in --objective costs less"
        return {
            "target": f"the target's forward{stored}" if self.views else "reading the target's views",
            "forward": "the drafter's forward and its head",
            "backward": f"the drafter's backward pass{eased if self.easing else ''}",
            "update": "the optimiser; a larger --batch-tokens makes fewer of these",
        }[max(self.shares, key=self.shares.get)]

    def __str__(self) -> str:
        measured = "nothing is held out to measure with"
        if self.evaluation:
            count = len(self.evaluations)
            measured = (
                f"{count} evaluation(s) of {duration(self.evaluation_seconds / max(1, count))}, every "
                f"plan's acceptance in {duration(self.finish_seconds)}"
            )
        parts = ", ".join(f"{name} {share:.0%}" for name, share in self.shares.items())
        peak = f", peak of the largest step {self.peak / 1e9:.2f} GB" if self.peak else ""
        run = f"the rest of the run: {self.left} of {self.steps}" if self.done else f"the run: {self.steps}"
        return (
            f"memory: target {self.target / 1e9:.2f} GB, drafter with gradients and moments "
            f"{self.states / 1e9:.2f} GB{peak}\n"
            f"a step: {self.seconds:.2f} s for {self.tokens} answer tokens ({parts}), bound by {self.bound}\n"
            f"{run} steps in {duration(self.left * self.seconds)}, {measured}: about "
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
    kept: bool = False,
    evaluation: float = 0.0,
    finish: float = 0.0,
    tau: float = 1.0,
) -> Rehearsal:
    """
    Take the step with the most tokens and a usual one with everything joined, and leave no trace: weights, optimiser,
    step and randomness stay as they were.

    Args:
        trainer ([`DrafterTrainer`]): About to train, from the step that it is at.
        target ([`~transformers.PreTrainedModel`]): For its size.
        kept (`bool`, *optional*, defaults to `False`): The target's views are on the disk already.
        evaluation (`float`, *optional*, defaults to 0.0):
            Seconds that `trainer.evaluate` would take if nothing was accepted.
        finish (`float`, *optional*, defaults to 0.0): The same of what follows the last step.
        tau (`float`, *optional*, defaults to 1.0): What the drafter accepts already.
    """
    _seconds_of(trainer, trainer.sized_step(0))  # which warms up, too
    peak, usual = _peak(trainer.accelerator.device), trainer.sized_step(0.5)
    seconds, shares = _seconds_of(trainer, usual)
    left = max(0, trainer.total_steps - trainer.step)
    if trainer.args.max_seconds:
        left = round(max(0.0, trainer.args.max_seconds - trainer.seconds) / seconds)
    objective = [] if trainer.objective is None else dataclasses.fields(trainer.objective)
    return Rehearsal(
        target=_bytes(target),
        states=4 * _bytes(trainer.module),
        peak=peak,
        seconds=seconds,
        steps=max(1, trainer.step + left),
        shares=shares,
        tokens=trainer.answer_tokens(usual),
        eval_steps=trainer.args.eval_steps,
        evaluation=evaluation,
        finish=finish,
        tau=tau,
        done=trainer.step,
        views=0 if kept else _bytes_of_views(trainer, usual[0]),
        easing=[field.name for field in objective if field.name in EASING],
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
    shares = trainer.clock.shares()  # which waits for the device
    return time.perf_counter() - started, shares


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _bytes_of_views(trainer: DrafterTrainer, batch: list[int]) -> int:
    """What the target's views of all conversations take, by those of a batch."""
    tokens = [len(example.input_ids) for example in trainer.examples]
    return sum(view.nbytes for view in trainer.views(batch)) * sum(tokens) // sum(tokens[i] for i in batch)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows has none
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere else
