# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What the time of a training step goes to."""

from __future__ import annotations

import time

import torch

from ..devices import synchronize


class StepClock:
    """
    Adds up wall time by phase.

    Args:
        device (`torch.device`): Waited for at every lap, so that a phase is charged with what it started.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}
        self.last = 0.0

    def start(self) -> None:
        """Begin the first phase of a step."""
        self.last = self._now()

    def lap(self, phase: str) -> None:
        """Charge `phase` with the time since the last call."""
        now = self._now()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now

    def shares(self) -> dict[str, float]:
        """Share of every phase since the last call of this method."""
        total = sum(self.seconds.values())
        shares = {phase: round(seconds / total, 3) for phase, seconds in self.seconds.items()}
        self.seconds = {}
        return shares

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()
